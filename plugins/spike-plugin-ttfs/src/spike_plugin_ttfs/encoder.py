"""Time to first spike: one spike in a window of T steps; the earlier it comes, the larger the number.

Source: QC-A2S, Eq. 7 and 10 and Corollary 1; TTFSFormer, Eq. 1-5 of the same paper, as the baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from spikeplug.coding.rate import check_percentile
from spikeplug.coding.statistics import ActivationStats, require_finite
from spikeplug.coding.types import CodeParams, Encoder, impulse, straight_through
from spikeplug.errors import CalibrationError, OptionError

MAX_STEPS = 4096
CONTINUOUS_MAX_STEPS = 16384
SHARES = 41
"""Clipped ranges that a search compares first, from all of the range seen to a hundredth of it."""

WIDTHS = (0.1, 0.03, 0.01)
"""Steps by which it then moves either end, as shares of it."""


@dataclasses.dataclass(frozen=True)
class TTFS(Encoder):
    """`q = clip(floor(x / λ) + z, 0, N)` with N = T - 1 (Eq. 10); its one spike comes at step `N - q`.

    A spike at step t is worth `λ (N - t)`, and a silent window `-λ z`. Code 0 is silent, for its spike would come at
    the end of the window and be worth nothing. λ is rounded up to 11 significant bits, so that the values of all codes,
    and the points half-way between them, are exact in float32 where the range spans 0.

    Args:
        steps: T, 2 to 4096, the number of time steps and of codes.
        rounding: `floor` as in Eq. 10; or `nearest`, a threshold lower by half of λ: `floor(x / λ + 1/2)`.
        percentile: share of the calibration values, in percent, that the range covers.
        clip: `none`, or `mse`: the range is shrunk to the one with the least squared error, each end for itself.
        power_of_two: whether T must be one, as for a quantized model of n bits.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 64
    rounding: str = "nearest"
    percentile: float = 100.0
    clip: str = "none"
    power_of_two: bool = False

    name: ClassVar[str] = "ttfs"
    most: ClassVar[int] = MAX_STEPS

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 2 <= self.steps <= self.most:
            raise OptionError(f"steps={self.steps!r}: a whole number from 2 to {self.most} is needed")
        if self.power_of_two and self.steps & self.top:
            below = 1 << (self.steps.bit_length() - 1)
            raise OptionError(
                f"steps={self.steps}: a model of n bits has 2^n steps, choose {below} or {min(2 * below, self.most)}; "
                "or power_of_two=false"
            )
        check_percentile(self.percentile)
        for option, choices in {"rounding": ("nearest", "floor"), "clip": ("none", "mse")}.items():
            if getattr(self, option) not in choices:
                raise OptionError(f"{option}='{getattr(self, option)}': choose one of {', '.join(choices)}")

    @property
    def top(self) -> int:
        """N, the largest code."""
        return self.steps - 1

    def weights(self, p: CodeParams) -> Tensor:
        return torch.arange(self.top, -1, -1, dtype=torch.float64)

    def fit(self, stats: ActivationStats) -> CodeParams:
        low, high = stats.limits(self.percentile)
        if not high > low:
            raise CalibrationError(
                f"every activation seen is {float(low):g}: a range of no width has no code; exclude the site"
            )
        if self.clip == "none":
            return self.params_of(low, high, stats)
        seen = torch.stack([low, high])
        found = self._best([seen * share for share in torch.logspace(0, -2, SHARES, dtype=torch.float64)], stats)
        # Then one end at a time, ever finer: tails are seldom alike.
        for width in WIDTHS:
            for end in (0, 1):
                ranges = [found[1].clone() for _ in range(9)]
                for each, by in zip(ranges, range(-4, 5), strict=True):
                    each[end] = (each[end] * (1 + width * by)).clamp(low, high)
                found = self._best(ranges, stats)
        return self.params_of(found[1][0], found[1][1], stats)

    def _best(self, ranges: list[Tensor], stats: ActivationStats) -> tuple[float, Tensor]:
        """The range `[2]` with the least squared error on the sample, and that error."""
        found = []
        for each in ranges:
            p = self.params_of(each[0], each[1], stats)
            found.append((float((self.fused(stats.values, p) - stats.values).double().square().mean()), each))
        return min(found, key=lambda pair: pair[0])

    def params_of(self, low: Tensor, high: Tensor, stats: ActivationStats) -> CodeParams:
        """Parameters of a range, and what was seen, which the error's bound is about.

        Raises:
            CalibrationError: the range has no float32 scale.
        """
        scale = _short(high / self.top - low / self.top).to(torch.float32)
        if not bool(torch.isfinite(scale)) or scale < torch.finfo(torch.float32).tiny:
            raise CalibrationError(f"the range [{float(low):g}, {float(high):g}] has no float32 scale")
        zero = -torch.floor(low / scale.double() + (0.5 if self.rounding == "nearest" else 0.0))
        extra = {
            "zero": zero.to(torch.float32),
            "low": stats.low.min().to(torch.float32),
            "high": stats.high.max().to(torch.float32),
        }
        return CodeParams(scale, -(scale * extra["zero"]), extra)

    def whole(self, x: Tensor, p: CodeParams) -> Tensor:
        """Potential of the receive phase in whole units of λ, `[*S]` in the dtype of computation.

        Whole, because a sum of floats would now and then meet the threshold a step too late or too early.
        """
        require_finite(x)
        dtype = torch.promote_types(x.dtype, p.scale.dtype)
        v = torch.div(x.to(dtype), p.scale.to(dtype))
        return (v.add_(0.5) if self.rounding == "nearest" else v).floor_()

    def quantize(self, x: Tensor, p: CodeParams) -> Tensor:
        """Codes q of `x`, whole numbers `[*S]` in the dtype of computation."""
        v = self.whole(x, p)
        return v.add_(p.extra["zero"].to(v.dtype)).clamp_(0, self.top)

    def drive(self, x: Tensor, p: CodeParams) -> Iterator[Tensor]:
        # What is out of the window's reach is so by any amount; large numbers would swallow the ramp's steps of 1.
        zero = float(p.extra["zero"])
        return impulse(self.whole(x, p).clamp_(-zero - 1, self.top - zero), self.steps)

    def encode(self, x: Tensor, p: CodeParams) -> Tensor:
        q = self.quantize(x, p)
        when = torch.arange(self.top, -1, -1, device=q.device, dtype=q.dtype).reshape(-1, *[1] * q.ndim)
        return ((q == when) & (q > 0)).to(x.dtype)

    def fused(self, x: Tensor, p: CodeParams) -> Tensor:
        return straight_through(x, lambda x: self.scaled(self.quantize(x, p), p).to(x.dtype))

    def count(self, x: Tensor, p: CodeParams) -> Tensor:
        return (self.quantize(x, p) > 0).to(torch.int32)

    def span(self, p: CodeParams) -> tuple[Tensor, Tensor]:
        return p.offset, p.offset + self.top * p.scale

    def error_bound(self, p: CodeParams) -> Tensor:
        return p.scale / 2 if self.rounding == "nearest" else p.scale


def _short(scale: Tensor) -> Tensor:
    """The next number of 11 significant bits."""
    mantissa, exponent = torch.frexp(scale.double())
    return torch.ldexp(torch.ceil(mantissa * 2.0**11), exponent - 11)


@dataclasses.dataclass(frozen=True)
class ContinuousTTFS(TTFS):
    """The baseline: a network converted for continuous time, whose spikes then come with the next tick of a clock.

    The spike time `(b - x) / λ` (Eq. 2) is rounded up to a whole step. The range [a, b] is the one seen; no code stands
    for exactly 0, since continuous time needs none.
    """

    steps: int = 4096
    rounding: str = "floor"

    name: ClassVar[str] = "ttfs-continuous"
    most: ClassVar[int] = CONTINUOUS_MAX_STEPS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding != "floor" or self.clip != "none":
            raise OptionError("ttfs-continuous rounds times up and covers its range: rounding='floor', clip='none'")

    def params_of(self, low: Tensor, high: Tensor, stats: ActivationStats) -> CodeParams:
        p = super().params_of(low, high, stats)
        return CodeParams(p.scale, low.to(torch.float32), {**p.extra, "zero": torch.zeros(())})

    def whole(self, x: Tensor, p: CodeParams) -> Tensor:
        require_finite(x)
        dtype = torch.promote_types(x.dtype, p.scale.dtype)
        return torch.sub(x.to(dtype), p.offset.to(dtype)).div_(p.scale.to(dtype)).floor_()
