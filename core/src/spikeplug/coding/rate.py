"""The rate code, the baseline of every scheme, with its integrate-and-fire neuron (soft reset).

An activation becomes a constant input current of `n` parts of a threshold of T parts, `n = round(T x / scale)`
(half to even) clipped to [-T, T], and the neuron then fires exactly |n| spikes of the sign of n in T steps
(Rueckauer et al., 2017, with the input current on a grid so that no rounding of floats decides a spike).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from spikeplug.errors import OptionError

from .statistics import ActivationStats, require_finite
from .types import CodeParams, Encoder, Neuron, Recipe, State, straight_through

MAX_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Rate(Encoder):
    """Rate code with signed spikes: `decode = scale / T * sum_t s(t)`.

    Args:
        steps: T, 1 to 4096.
        percentile: share of the calibration values, in percent, whose magnitude the scale covers.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 32
    percentile: float = 100.0

    name: ClassVar[str] = "rate"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps(self.steps, MAX_STEPS)
        check_percentile(self.percentile)

    def weights(self, p: CodeParams) -> Tensor:
        return torch.ones(self.steps, dtype=torch.float64)

    def fit(self, stats: ActivationStats) -> CodeParams:
        low, high = stats.limits(self.percentile)
        largest = torch.maximum(low.abs(), high.abs())
        # A site that only ever carries zero: any scale represents it.
        scale = torch.where(largest > 0, largest / self.steps, torch.ones_like(largest))
        return CodeParams(scale.float(), torch.zeros_like(scale, dtype=torch.float32))

    def quantize(self, x: Tensor, p: CodeParams) -> Tensor:
        """Signed spike counts n of `x`, whole numbers `[*S]` in the dtype of computation."""
        require_finite(x)
        dtype = torch.promote_types(x.dtype, p.scale.dtype)
        n = x.to(dtype) * p.scale.to(dtype).reciprocal()
        return n.round_().clamp_(-self.steps, self.steps)

    def drive(self, x: Tensor, p: CodeParams) -> Iterator[Tensor]:
        current = self.quantize(x, p)
        for _ in range(self.steps):
            yield current

    def encode(self, x: Tensor, p: CodeParams) -> Tensor:
        n = self.quantize(x, p)
        # After t steps of current |n| a neuron of threshold T has fired floor(t |n| / T) times.
        t = torch.arange(self.steps + 1, dtype=n.dtype, device=n.device).reshape(-1, *[1] * n.ndim)
        fired = torch.floor(t * n.abs() / self.steps)
        return (fired.diff(dim=0) * n.sign()).to(x.dtype)

    def fused(self, x: Tensor, p: CodeParams) -> Tensor:
        return straight_through(x, lambda x: self.scaled(self.quantize(x, p), p).to(x.dtype))

    def count(self, x: Tensor, p: CodeParams) -> Tensor:
        return self.quantize(x, p).abs_().to(torch.int32)

    def span(self, p: CodeParams) -> tuple[Tensor, Tensor]:
        return -self.steps * p.scale, self.steps * p.scale

    def error_bound(self, p: CodeParams) -> Tensor:
        return p.scale / 2


@dataclasses.dataclass(frozen=True)
class IF(Neuron):
    """Integrate-and-fire neuron with soft reset: `u = v + x; s = [u >= θ] - [u <= -θ]; v = u - θ s`.

    Args:
        threshold: θ, above 0.
    """

    threshold: float = 1.0

    name: ClassVar[str] = "if"

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise OptionError(f"threshold={self.threshold}: a number above 0 is needed")

    def init(self, x: Tensor) -> State:
        return torch.zeros_like(x)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        u = state + x
        s = (u >= self.threshold).to(u.dtype) - (u <= -self.threshold).to(u.dtype)
        return s, u - self.threshold * s


def check_steps(steps: object, largest: int) -> None:
    """Raise OptionError unless `steps` is a whole number from 1 to `largest`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= largest:
        raise OptionError(f"steps={steps!r}: a whole number from 1 to {largest} is needed")


def check_percentile(percentile: float) -> None:
    """Raise OptionError unless 50 < percentile <= 100."""
    if not 50 < percentile <= 100:
        raise OptionError(f"percentile={percentile}: a number above 50, at most 100, is needed")


RECIPE = Recipe(
    name="rate",
    summary="rate code with soft-reset IF neurons, the baseline",
    encoder="rate",
    neuron="if",
    neuron_options={"threshold": "steps"},
)
