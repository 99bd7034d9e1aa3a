"""Where the segments of an adaptive spiking neural codec lie (LASER, section 3.2 and appendix C)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from spikeplug.coding.rate import check_steps
from spikeplug.errors import CalibrationError, OptionError

from .encoder import MAX_STEPS

Function = Callable[[Tensor], Tensor]

CANDIDATES = 31
"""Split points that a segment offers by value, and as many by the mass of the distribution."""

GRID = 2048
"""Points of the uniform grid that is fitted beside the samples."""

LEVEL_BITS = 8
"""Bits of a segment's input code. The last so many steps send them; a window has steps before those, which compare."""


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


class Points:
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


def split(points: Points, fit: Fit) -> Tensor:
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


def _segment(points: Points, a: float, b: float) -> _Segment:
    loss, mass, *_ = points.line(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    return _Segment(a, b, float(loss), float(mass), points.variance(a, b))


def _halves(points: Points, segment: _Segment, fit: Fit) -> list[_Segment]:
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


def refined(points: Points, edges: Tensor, fit: Fit) -> Tensor:
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
