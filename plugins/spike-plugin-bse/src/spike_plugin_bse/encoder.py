"""Bit spike encoding (LASER, section 3.1): an activation becomes the bits of an integer, one bit a step, MSB first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from spikeplug.coding.rate import check_percentile, check_steps
from spikeplug.coding.statistics import ActivationStats, require_finite
from spikeplug.coding.types import CodeParams, Encoder, impulse, straight_through
from spikeplug.errors import CalibrationError, OptionError

MAX_STEPS = 32
GRANULARITIES = ("tensor", "channel", "token")

FLOAT32_STEPS = 16
"""Largest N that is computed in float32: its two roundings move a code by at most 2^(N-23) of a step, here 1/128.
Beyond it the code, its parameters and its sums are float64."""


@dataclasses.dataclass(frozen=True)
class BSE(Encoder):
    """`q = clip(round(λ (x + μ)), 0, 2^N - 1)`, rounding half to even; the spikes are the bits of q (Eq. 1-4).

    In the terms of CodeParams `λ = 1 / scale` and `μ = -offset`.

    Args:
        steps: N, the number of bits and of time steps, 1 to 32.
        granularity: what shares one (λ, μ): the `tensor` or each `channel`, both calibrated; or each `token`, found
            at run time from the activation's last dimension.
        percentile: share of the calibration values, in percent, that the range covers; 100 covers all of them.
        headroom: how much wider than what calibration saw the range is, as a fraction, half of it at each end. An
            end at exactly 0 stays there.
        align_zero: where the range spans 0, shift it by at most half a step so that a code stands for exactly 0.
            The paper's μ = -min leaves 0 between two codes, so that the many activations near 0 share one bias.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 16
    granularity: str = "tensor"
    percentile: float = 100.0
    headroom: float = 0.0
    align_zero: bool = True

    name: ClassVar[str] = "bse"

    def __post_init__(self) -> None:
        check_steps(self.steps, MAX_STEPS)
        check_percentile(self.percentile)
        if self.granularity not in GRANULARITIES:
            raise OptionError(f"granularity='{self.granularity}': choose one of {', '.join(GRANULARITIES)}")
        if not 0 <= self.headroom <= 10:
            raise OptionError(f"headroom={self.headroom}: a number from 0 to 10 is needed")
        if self.granularity == "token" and (self.percentile != 100 or self.headroom != 0):
            raise OptionError("granularity='token' has no calibrated range: percentile and headroom have no use")

    @property
    def static(self) -> bool:
        return self.granularity != "token"

    @property
    def top(self) -> int:
        """Largest code, 2^N - 1."""
        return (1 << self.steps) - 1

    @property
    def dtype(self) -> torch.dtype:
        """What the code computes in, at the least."""
        return torch.float32 if self.steps <= FLOAT32_STEPS else torch.float64

    def weights(self, p: CodeParams) -> Tensor:
        return torch.tensor([2.0 ** (self.steps - 1 - t) for t in range(self.steps)], dtype=torch.float64)

    def fit(self, stats: ActivationStats) -> CodeParams:
        low, high = stats.limits(self.percentile, by_channel=self.granularity == "channel")
        margin = (high - low) * self.headroom / 2
        low = torch.where(low == 0, low, low - margin)
        high = torch.where(high == 0, high, high + margin)
        p = self._params(low, high)
        if not bool(torch.isfinite(p.scale * self.top).all()):
            raise CalibrationError(f"the range [{float(low.min()):g}, {float(high.max()):g}] has no {self.dtype} scale")
        return p

    def _params(self, low: Tensor, high: Tensor) -> CodeParams:
        # A site that only ever carries one value: code 0 stands for it, whatever the scale.
        # Divided one by one, so that the widest range does not overflow; kept a normal number, so that the narrowest
        # has a finite reciprocal.
        scale = (high / self.top - low / self.top).to(self.dtype).clamp_(min=torch.finfo(self.dtype).tiny)
        scale = torch.where(high > low, scale, torch.ones_like(scale))
        offset = low.to(self.dtype)
        if self.align_zero:
            # Computed as `scaled` computes it, so that the code of 0 decodes to exactly 0.
            zero = torch.round(-offset / scale) * scale
            offset = torch.where((low < 0) & (high > 0), -zero, offset)
        return CodeParams(scale, offset)

    def params(self, x: Tensor, p: CodeParams) -> CodeParams:
        if self.static:
            return p
        if x.numel() == 0:
            return CodeParams(p.scale.to(self.dtype), p.offset.to(self.dtype))
        low, high = torch.aminmax(x.detach().to(torch.promote_types(x.dtype, self.dtype)), dim=-1, keepdim=x.ndim > 0)
        return self._params(low, high)

    def quantize(self, x: Tensor, p: CodeParams) -> Tensor:
        """Codes q of `x`, whole numbers `[*S]` in the dtype of computation, in a tensor of their own."""
        require_finite(x)
        dtype = torch.promote_types(x.dtype, p.scale.dtype)
        q = torch.sub(x.to(dtype), p.offset.to(dtype))
        return q.mul_(p.scale.to(dtype).reciprocal()).round_().clamp_(0, self.top)

    def drive(self, x: Tensor, p: CodeParams) -> Iterator[Tensor]:
        return impulse(self.quantize(x, p), self.steps)  # Eq. 4

    def encode(self, x: Tensor, p: CodeParams) -> Tensor:
        q = self.quantize(x, p).to(torch.int64)
        shifts = torch.arange(self.steps - 1, -1, -1, device=q.device).reshape(-1, *[1] * q.ndim)
        return ((q >> shifts) & 1).to(x.dtype)

    def fused(self, x: Tensor, p: CodeParams) -> Tensor:
        return straight_through(x, lambda x: self.scaled(self.quantize(x, p), p).to(x.dtype))

    def count(self, x: Tensor, p: CodeParams) -> Tensor:
        q = self.quantize(x, p)
        ones = _ones(q.device)
        if self.steps <= 16:
            # index_select takes int32 indices, at a third of the time of indexing by int64.
            return ones.index_select(0, q.to(torch.int32).reshape(-1)).reshape(q.shape)
        codes = q.to(torch.int64)
        return ones[codes & 0xFFFF] + ones[codes >> 16]

    def span(self, p: CodeParams) -> tuple[Tensor, Tensor]:
        return p.offset, p.offset + self.top * p.scale

    def error_bound(self, p: CodeParams) -> Tensor:
        return p.scale / 2


@functools.cache
def _ones(device: torch.device) -> Tensor:
    """Number of one-bits of every 16-bit number, uint8 `[65536]`."""
    numbers = torch.arange(1 << 16, device=device)
    return sum((numbers >> bit) & 1 for bit in range(16)).to(torch.uint8)  # type: ignore[union-attr]
