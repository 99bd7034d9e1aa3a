"""Canonic signed spikes: ternary spikes whose worth falls by the factor β from step to step.

Source: "Canonic Signed Spike Coding", section 4 and Theorem 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from spikeplug.coding.rate import check_percentile, check_steps
from spikeplug.coding.statistics import ActivationStats, require_finite
from spikeplug.coding.types import CodeParams, Encoder, impulse
from spikeplug.errors import CalibrationError, OptionError

from .neuron import check_beta, ternary

MAX_STEPS = 64


@dataclasses.dataclass(frozen=True)
class CSS(Encoder):
    """`decode = θ sum_t β^(T-1-t) s(t)`, s in {-1, 0, 1}: the last spike is worth θ, the amplitude.

    Args:
        steps: T, 1 to 64.
        beta: β, above 1, at most 2.
        percentile: share of the magnitudes seen in calibration, in percent, that all spikes together cover.
        headroom: how many times that they cover; above 1 where a layer must take back what it fired too early.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 12
    beta: float = 1.5
    percentile: float = 99.99
    headroom: float = 1.0

    name: ClassVar[str] = "css"
    signed: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps(self.steps, MAX_STEPS)
        check_beta(self.beta)
        check_percentile(self.percentile)
        if not 1 <= self.headroom <= 16:
            raise OptionError(f"headroom={self.headroom}: a number from 1 to 16 is needed")

    def weights(self, p: CodeParams) -> Tensor:
        return self.beta ** torch.arange(self.steps - 1, -1, -1, dtype=torch.float64)

    @property
    def total(self) -> float:
        """`sum_t β^(T-1-t)`, what all spikes together are worth in amplitudes."""
        return sum(self.beta**t for t in range(self.steps))

    def fit(self, stats: ActivationStats) -> CodeParams:
        largest = torch.maximum(stats.low.abs().max(), stats.high.abs().max())
        if self.percentile < 100:
            largest = torch.quantile(stats.values.double().abs(), self.percentile / 100)
        scale = (largest * self.headroom / self.total).to(torch.float32)
        if largest > 0 and not (torch.isfinite(scale) and scale >= torch.finfo(torch.float32).tiny):
            raise CalibrationError(f"the largest magnitude {float(largest):g} has no float32 amplitude")
        # A site that only ever carries zero: any amplitude represents it.
        scale = scale if largest > 0 else torch.ones(())
        return CodeParams(scale, torch.zeros_like(scale))

    def first(self, x: Tensor, p: CodeParams) -> Tensor:
        """Potential of the first step, in amplitudes: `a / β^T` of Theorem 3, times β."""
        require_finite(x)
        dtype = torch.promote_types(x.dtype, p.scale.dtype)
        return x.to(dtype) / p.scale.to(dtype) / self.beta ** (self.steps - 1)

    def drive(self, x: Tensor, p: CodeParams) -> Iterator[Tensor]:
        return impulse(self.first(x, p), self.steps)

    def encode(self, x: Tensor, p: CodeParams) -> Tensor:
        u = self.first(x, p)
        out = torch.empty((self.steps, *u.shape), dtype=u.dtype, device=u.device)
        spare = torch.empty_like(u)
        for t, s in enumerate(out):
            if t:
                u.mul_(self.beta)
            ternary(u, 0.5, s, spare)
            u.sub_(s)
        return out.to(x.dtype)

    def span(self, p: CodeParams) -> tuple[Tensor, Tensor]:
        top = self.total * p.scale
        return -top, top

    def error_bound(self, p: CodeParams) -> Tensor:
        return p.scale / 2
