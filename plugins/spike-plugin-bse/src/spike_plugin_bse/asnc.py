"""Adaptive spiking neural codec (LASER, section 3.2 and appendix C): a scalar function as segments of spiking codecs.

This module is the mathematics, in float64: where the segments lie and what their spikes are worth. The module that
runs inside a network is `spike_plugin_bse.codec`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spikeplug.errors import CalibrationError, OptionError
from spikeplug.rate import check_steps

from .encoder import MAX_STEPS

Function = Callable[[Tensor], Tensor]

CANDIDATES = 31
"""Split points that a segment offers by value, and as many by the mass of the distribution."""

GRID = 2048
"""Points of the uniform grid that is fitted beside the samples."""

CELLS = 16384
"""Even cells of the range, on whose borders the edges lie: the segment of an input is one look-up, not a search."""

LEVEL_BITS = 8
"""Bits of a segment's input code. The last so many steps send them; a window has steps before those, which compare."""

FRACTION_BITS = 22
"""Decode weights are whole multiples of a power of two, 2^-22 of the largest output: every sum of them is then exact in
float32, in whatever order the spikes are added, and on integer hardware."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a function is split into segments and fitted.

    A segment i is split while `L_i / L * (1 + σ_i²) * ρ_i > τ` (Eq. 7, 18), where L_i is its mean squared error, L that
    of all, `σ_i² = var(e²) / mean(e²)²` the variance of its loss, ρ_i its share of the distribution, and
    `τ = threshold * α_stag * α_prog` (Eq. 19-21): a segment stagnates when the split that made it lowered the loss by
    less than a tenth, and the progress is that of the last split. Of the segments above τ the one with the largest
    criterion times its weight w_i (Eq. 9, 23) is split, with `I_func = R_region / 3` (Eq. 24),
    `I_error = L_i / max L_j` and `D_i = ρ_i / max ρ_j`.

    The paper leaves the terms of the split score (Eq. 8, 22) open. Here, for the halves l and r of a candidate:
    `E_sep = 1 - (L_l ρ_l + L_r ρ_r) / (L_i ρ_i)`, the share of the loss that goes away; `C_cons = 1 - |L_l - L_r| /
    (L_l + L_r)`, even difficulty; `B_bal = 2 min(ρ_l, ρ_r) / ρ_i`, even data; `Y_sep = |mean y_l - mean y_r| / (max y -
    min y)`, different targets.

    Args:
        steps: T, the window of a segment's codec, 1 to 32.
        segments: N, how many segments at most.
        separation, consistency, balance, target: α_1 to α_4 of the split score.
        threshold: τ_base.
        refine: sweeps that move the inner edges to where the loss is least, after the splitting.
        tails: share of the weight that a uniform grid over the whole range has; the samples have the rest. Without it
            rare large inputs are fitted to nothing.
        margin: how far the range goes beyond what was seen, at each end, as a fraction of what was seen. Beyond the
            range the function goes on as the line through its end with the slope there; for SiLU and GELU that is
            their asymptote.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 16
    segments: int = 32
    separation: float = 1.0
    consistency: float = 0.05
    balance: float = 0.05
    target: float = 0.05
    threshold: float = 0.02
    refine: int = 8
    tails: float = 0.002
    margin: float = 0.25

    def __post_init__(self) -> None:
        check_steps(self.steps, MAX_STEPS)
        if not 1 <= self.segments <= 1024:
            raise OptionError(f"segments={self.segments}: a whole number from 1 to 1024 is needed")
        if not 0 < self.tails < 1:
            raise OptionError(f"tails={self.tails}: a number between 0 and 1 is needed")
        for option in ("separation", "consistency", "balance", "target", "threshold", "refine", "margin"):
            if not 0 <= getattr(self, option) < float("inf"):
                raise OptionError(f"{option}={getattr(self, option)}: a finite number of at least 0 is needed")
        if self.separation + self.consistency + self.balance + self.target == 0:
            raise OptionError("separation, consistency, balance and target are all 0: no split point can be chosen")


@dataclasses.dataclass(frozen=True)
class Table:
    """A fitted function: K segments, each with T spikes (Eq. 5, 15, 16). Tensors are float64, but for `owner`.

    The segment of x is `owner[floor((x - low) / (high - low) * cells)]`. In segment i,
    `q = clip(round(rate_i * (x - start_i)), 0, 2^B - 1)` drives an integrate-and-fire neuron of the thresholds and
    resets of `schedule`, and the value is `bias_i + sum_t weights_i(t) spikes(t)`. An input beyond the range has the
    value of its end, plus the distance times the slope there.

    Attributes:
        owner: segment of every cell, int16 `[cells]`.
        start, rate: `[K]`, b_i and s_i of Eq. 5 as `quantize(rate (x - start))`.
        bias: `[K]`.
        weights: `[K, T]`, w_i(t).
        ends: `[2, 2]`, for the lower and upper end its position and its slope.
    """

    owner: Tensor
    start: Tensor
    rate: Tensor
    bias: Tensor
    weights: Tensor
    ends: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Table:
        """The inverse of `tensors`; other names are left out."""
        return cls(**{field.name: tensors[field.name] for field in dataclasses.fields(cls)})

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Segment and code q of every input, int64 `[*S]`."""
        (low, _), (high, _) = self.ends.tolist()
        cell = ((x - low) * (self.owner.numel() / (high - low))).clamp(0, self.owner.numel() - 1)
        i = self.owner[cell.to(torch.int64)].to(torch.int64)
        top = 2 ** min(self.steps, LEVEL_BITS) - 1
        return i, torch.round((x - self.start[i]) * self.rate[i]).clamp(0, top).to(torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        """The reference: value of every input, step by step in float64, `[*S] -> [*S]`."""
        x = x.double()
        i, v = self.codes(x)
        y = self.bias[i].clone()
        for t, (threshold, reset) in enumerate(schedule(self.steps)):
            spikes = (v >= threshold).to(v.dtype)
            v = v - reset * spikes
            y += self.weights[i, t] * spikes
        (low, below), (high, above) = self.ends
        y += below * (x - low).clamp(max=0) + above * (x - high).clamp(min=0)
        return y

    @property
    def steps(self) -> int:
        """T."""
        return self.weights.shape[1]

    @property
    def edges(self) -> Tensor:
        """Inner edges `[K - 1]`; an input equal to one belongs to the segment above."""
        return self.start[1:]


def schedule(steps: int) -> list[tuple[int, int]]:
    """Threshold and reset of every step of a codec, in codes.

    The last B = min(T, 8) steps send the bits of q, most significant first, with a reset of the threshold. The steps
    before them, where there are any, compare q with evenly spaced levels and reset nothing: with their own decode
    weights each segment follows the curve that one line leaves.
    """
    bits = min(steps, LEVEL_BITS)
    compare = steps - bits
    levels = [(2**bits * (t + 1) + compare) // (compare + 1) for t in range(compare)]
    return [(level, 0) for level in levels] + [(2**bit, 2**bit) for bit in reversed(range(bits))]


def patterns(steps: int) -> Tensor:
    """Spikes of every code, float64 `[2^B, T]`."""
    v = torch.arange(2 ** min(steps, LEVEL_BITS))
    spikes = []
    for threshold, reset in schedule(steps):
        spikes.append(v >= threshold)
        v = v - reset * spikes[-1]
    return torch.stack(spikes, dim=1).double()


def fit(function: Function, samples: Tensor, fit: Fit, limits: tuple[float, float] | None = None) -> Table:
    """Fit a scalar function on a sample of its inputs.

    Args:
        function: elementwise, differentiable at the ends of the range.
        samples: inputs, any shape.
        limits: smallest and largest input seen, where `samples` is only a part of them.

    Raises:
        CalibrationError: the sample is empty, of one value or not finite, or the function is constant or not finite.
    """
    samples = samples.detach().double().flatten().cpu()
    if samples.numel() == 0:
        raise CalibrationError("the distribution of inputs is empty: give calibration data that reaches it")
    low, high = limits or (float(samples.min()), float(samples.max()))
    if not (torch.isfinite(samples).all() and -float("inf") < low <= high < float("inf")):
        raise CalibrationError("the distribution of inputs holds NaN or infinity")
    if low == high:
        raise CalibrationError(f"every input seen is {low:g}: a function cannot be fitted to one value")
    margin = fit.margin * (high - low)
    # An end at exactly 0 is one of the function's own, as of exp in a softmax.
    low, high = low - margin * (low != 0), high + margin * (high != 0)
    points = _Points(function, samples, low, high, fit)
    edges = _refined(points, _split(points, fit), fit)
    cells = torch.unique(torch.round((edges - low) * (CELLS / (high - low))))
    return _codecs(points, cells, _slopes(function, low, high), fit)


def _slopes(function: Function, low: float, high: float) -> Tensor:
    """Position and slope of both ends, `[2, 2]`."""
    with torch.enable_grad():
        ends = torch.tensor([low, high], dtype=torch.float64, requires_grad=True)
        y = function(ends)
        slopes = torch.autograd.grad(y.sum(), ends)[0] if y.requires_grad else torch.zeros_like(ends)
    if not bool(torch.isfinite(slopes).all()):
        raise CalibrationError(f"the function has no finite slope at {low:g} or {high:g}: choose another margin")
    return torch.stack([ends.detach(), slopes], dim=1)


class _Points:
    """Samples and grid in order, with sums from the left, so that the loss of any interval is a few look-ups."""

    def __init__(self, function: Function, samples: Tensor, low: float, high: float, fit: Fit) -> None:
        self.low, self.high, self.levels = low, high, 2 ** min(fit.steps, LEVEL_BITS) - 1
        grid = torch.linspace(low, high, GRID, dtype=torch.float64)
        weight = torch.cat(
            [torch.full_like(samples, (1 - fit.tails) / samples.numel()), torch.full_like(grid, fit.tails / GRID)]
        )
        self.x, order = torch.sort(torch.cat([samples, grid]))
        self.w = weight[order]
        self.y = function(self.x).detach()
        if not bool(torch.isfinite(self.y).all()):
            worst = float(self.x[~torch.isfinite(self.y)][0])
            raise CalibrationError(f"the function is not finite at {worst:g}, inside the range [{low:g}, {high:g}]")
        self.spread = float(self.y.max() - self.y.min())
        if self.spread == 0:
            raise CalibrationError(f"the function is constant on [{low:g}, {high:g}]: it needs no approximation")
        # Centred, so that the differences of sums below keep their digits.
        self.centre = (float((self.w * self.x).sum()), float((self.w * self.y).sum()))
        x, y = self.x - self.centre[0], self.y - self.centre[1]
        rows = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]) * self.w
        self.sums = torch.cat([torch.zeros(6, 1, dtype=torch.float64), rows.cumsum(1)], dim=1)

    def index(self, edge: Tensor) -> Tensor:
        """How many points lie below an edge."""
        return torch.searchsorted(self.x, edge.contiguous())

    def line(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The best line over `[a, b)`: loss (summed), mass, mean of y, slope, value at a.

        The loss is that of the line and of the rounding of x to the codec's levels.
        """
        s = self.sums[:, self._upto(b)] - self.sums[:, self.index(a)]
        mass = s[0].clamp(min=1e-300)
        mx, my = s[1] / mass, s[2] / mass
        sxx, sxy, syy = s[3] - mass * mx * mx, s[4] - mass * mx * my, s[5] - mass * my * my
        slope = torch.where(sxx > 1e-14 * s[3].abs().clamp(min=1e-300), sxy / sxx.clamp(min=1e-300), 0.0)
        rounding = (slope * (b - a) / self.levels).square() / 12 * mass
        loss = (syy - slope * sxy).clamp(min=0) + rounding
        at_start: Tensor = my + self.centre[1] + slope * (a - self.centre[0] - mx)
        return loss, s[0], my + self.centre[1], slope, at_start

    def variance(self, a: float, b: float) -> float:
        """σ² of a segment: variance of its squared errors over the square of their mean."""
        start, stop = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        _, mass, _, slope, y0 = self.line(start, stop)
        part = slice(int(self.index(start)), int(self._upto(stop)))
        errors = (self.y[part] - y0 - slope * (self.x[part] - a)).square()
        w = self.w[part] / mass
        mean = (w * errors).sum()
        return float(((w * errors.square()).sum() - mean * mean) / (mean * mean).clamp(min=1e-300)) if mean > 0 else 0.0

    def candidates(self, a: float, b: float) -> Tensor:
        """Split points inside a segment: evenly by value, and evenly by mass."""
        t = torch.linspace(0, 1, CANDIDATES + 2, dtype=torch.float64)[1:-1]
        first, last = self.index(torch.tensor([a, b], dtype=torch.float64))
        mass = self.sums[0, first] + (self.sums[0, last] - self.sums[0, first]) * t
        by_mass = self.x[torch.searchsorted(self.sums[0], mass).clamp(max=self.x.numel() - 1)]
        found = torch.unique(torch.cat([a + (b - a) * t, by_mass]))
        found = found[(found > a) & (found < b)]
        n = self.index(found)
        return torch.masked_select(found, (n - first >= 2) & (last - n >= 2))

    def _upto(self, edge: Tensor) -> Tensor:
        # The last point belongs to the last segment.
        return torch.where(edge >= self.high, self.x.numel(), self.index(edge))


@dataclasses.dataclass
class _Segment:
    a: float
    b: float
    loss: float
    mass: float
    variance: float
    stagnates: bool = False


def _split(points: _Points, fit: Fit) -> Tensor:
    """Edges `[K + 1]` of the segments, by adaptive splitting."""
    segments = [_segment(points, points.low, points.high)]
    progress = 1.0
    while len(segments) < fit.segments:
        total = sum(segment.loss for segment in segments)
        if total <= 0:
            break
        stagnating = sum(segment.stagnates for segment in segments) / len(segments)
        threshold = fit.threshold * _stagnation(stagnating) * _progress(progress)
        # L_i / L * ρ_i is the segment's share of the summed loss.
        criterion = [segment.loss / total * (1 + segment.variance) for segment in segments]
        weights = _weights(segments)
        ranked = sorted(range(len(segments)), key=lambda i: -criterion[i] * weights[i])
        chosen = next((i for i in ranked if criterion[i] > threshold and _halves(points, segments[i], fit)), None)
        if chosen is None:
            break
        halves = _halves(points, segments[chosen], fit)
        left = total - segments[chosen].loss + sum(half.loss for half in halves)
        progress = (total - left) / total
        segments[chosen : chosen + 1] = halves
    return torch.tensor([points.low, *(segment.b for segment in segments)], dtype=torch.float64)


def _segment(points: _Points, a: float, b: float) -> _Segment:
    loss, mass, *_ = points.line(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    return _Segment(a, b, float(loss), float(mass), points.variance(a, b))


def _halves(points: _Points, segment: _Segment, fit: Fit) -> list[_Segment]:
    """The two halves at the best split point (Eq. 8); none where the segment cannot be split."""
    cut = points.candidates(segment.a, segment.b)
    if cut.numel() == 0:
        return []
    left, left_mass, left_y, *_ = points.line(torch.full_like(cut, segment.a), cut)
    right, right_mass, right_y, *_ = points.line(cut, torch.full_like(cut, segment.b))
    left_mean, right_mean = left / left_mass.clamp(min=1e-300), right / right_mass.clamp(min=1e-300)
    separation = 1 - (left + right) / max(segment.loss, 1e-300)
    consistency = 1 - (left_mean - right_mean).abs() / (left_mean + right_mean).clamp(min=1e-300)
    balance = 2 * torch.minimum(left_mass, right_mass) / max(segment.mass, 1e-300)
    target = (left_y - right_y).abs() / points.spread
    score = fit.separation * separation + fit.consistency * consistency + fit.balance * balance + fit.target * target
    at = float(cut[score.argmax()])
    halves = [_segment(points, segment.a, at), _segment(points, at, segment.b)]
    stagnates = sum(half.loss for half in halves) > 0.9 * segment.loss
    return [dataclasses.replace(half, stagnates=stagnates) for half in halves]


def _stagnation(share: float) -> float:
    """Eq. 20."""
    return 0.2 if share > 0.6 else 0.4 if share > 0.3 else 1.0


def _progress(made: float) -> float:
    """Eq. 21."""
    return 0.4 if made < 0.005 else 0.6 if made < 0.02 else 1.0


def _weights(segments: list[_Segment]) -> list[float]:
    """Eq. 23, with Eq. 24."""
    worst = max(segment.loss / max(segment.mass, 1e-300) for segment in segments)
    densest = max(segment.mass for segment in segments)
    found = []
    for segment in segments:
        region = 3.0 if segment.a < 0 < segment.b else 2.5 if segment.b <= 0 else 2.0
        error = segment.loss / max(segment.mass, 1e-300) / max(worst, 1e-300)
        found.append(0.5 * region / 3 + 0.35 * error + 0.15 * segment.mass / densest)
    return found


def _refined(points: _Points, edges: Tensor, fit: Fit) -> Tensor:
    """Move every other inner edge to where the loss of its two segments is least, then the others, and so on."""
    if edges.numel() < 3:
        return edges
    even = torch.linspace(0, 1, CANDIDATES + 2, dtype=torch.float64)[1:-1]
    near = torch.tensor([0.0, *(sign * size for size in (0.003, 0.01, 0.03) for sign in (-1, 1))], dtype=torch.float64)
    total = float("inf")
    for _ in range(fit.refine):
        for parity in (1, 2):
            moved = torch.arange(parity, edges.numel() - 1, 2)
            if moved.numel() == 0:
                continue
            a, b, now = edges[moved - 1, None], edges[moved + 1, None], edges[moved, None]
            cut = torch.cat([a + (b - a) * even, now + (b - a) * near], dim=1)
            enough = (points.index(cut) - points.index(a) >= 2) & (points.index(b) - points.index(cut) >= 2)
            cut = torch.where((cut > a) & (cut < b) & enough, cut, now)
            loss = points.line(a.expand_as(cut), cut)[0] + points.line(cut, b.expand_as(cut))[0]
            edges[moved] = cut.gather(1, loss.argmin(1, keepdim=True)).squeeze(1)
        left = float(points.line(edges[:-1], edges[1:])[0].sum())
        if left > 0.999 * total:
            break
        total = left
    return edges


def _codecs(points: _Points, cells: Tensor, ends: Tensor, fit: Fit) -> Table:
    """Decode weights of every segment by least squares, held near those of its line where the data say little."""
    edges = points.low + cells * ((points.high - points.low) / CELLS)
    a, b = edges[:-1], edges[1:]
    owner = torch.searchsorted(cells[1:-1], torch.arange(CELLS).double(), right=True).to(torch.int16)
    _, _, _, slope, at_start = points.line(a, b)
    rate = points.levels / (b - a)
    of_line = torch.tensor([float(reset) for _, reset in schedule(fit.steps)], dtype=torch.float64)
    weights, bias = slope[:, None] / rate[:, None] * of_line, at_start.clone()
    table = Table(owner, a, rate, bias, weights, ends)
    i, q = table.codes(points.x)
    spikes = patterns(fit.steps)[q]
    features = torch.cat([torch.ones_like(spikes[:, :1]), spikes], dim=1)
    residual = points.y - table(points.x)
    bounds = torch.searchsorted(i, torch.arange(a.numel() + 1)).tolist()
    for segment, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = slice(first, last)
        if last - first < 2:
            continue
        weighted = features[part] * (points.w[part] / points.w[part].sum())[:, None]
        gram = weighted.T @ features[part] + 1e-3 * torch.eye(fit.steps + 1, dtype=torch.float64)
        change = torch.linalg.solve(gram, weighted.T @ residual[part])
        bias[segment] += change[0]
        weights[segment] += change[1:]
    largest = float((bias.abs() + weights.abs().sum(1)).max())
    unit = 2.0 ** (torch.tensor(largest).log2().ceil().item() - FRACTION_BITS)
    return dataclasses.replace(table, bias=torch.round(bias / unit) * unit, weights=torch.round(weights / unit) * unit)
