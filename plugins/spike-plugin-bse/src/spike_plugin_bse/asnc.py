"""Adaptive spiking neural codec (LASER, section 3.2 and appendix C): a scalar function as segments of spiking codecs.

This module is the mathematics, in float64: what the spikes of each segment are worth. Where the segments lie is
`spike_plugin_bse.segments`; the module that runs inside a network is `spike_plugin_bse.codec`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from spikeplug.errors import CalibrationError

from .segments import LEVEL_BITS, Fit, Function, Points, refined, split

CELLS = 16384
"""Even cells of the range, on whose borders the edges lie: the segment of an input is one look-up, not a search."""

FRACTION_BITS = 22
"""Decode weights are whole multiples of a power of two, 2^-22 of the largest output: every sum of them is then exact in
float32, in whatever order the spikes are added, and on integer hardware."""


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
    points = Points(function, samples, low, high, fit)
    edges = refined(points, split(points, fit), fit)
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


def _codecs(points: Points, cells: Tensor, ends: Tensor, fit: Fit) -> Table:
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
