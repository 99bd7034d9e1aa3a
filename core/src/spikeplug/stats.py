"""Statistics of the activations of one site, gathered batch by batch in bounded memory."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spikeplug.errors import CalibrationError, NonFiniteError, OptionError


def require_finite(x: Tensor, what: str = "activation") -> None:
    """Refuse NaN and infinity, which a clipping code would turn into an ordinary number.

    One pass that reads `x`; on an accelerator it waits for the device.

    Raises:
        NonFiniteError: `x` holds NaN or infinity.
    """
    if x.numel() == 0 or not x.is_floating_point():
        return
    low, high = torch.aminmax(x.detach())
    if not bool(torch.isfinite(high - low)):
        bad = int((~torch.isfinite(x.detach())).sum())
        if bad:
            raise NonFiniteError(f"{what} of shape {list(x.shape)} holds {bad} values that are NaN or infinite")


def channel_shape(shape: torch.Size, channels: tuple[int, ...]) -> list[int]:
    """Shape that broadcasts one number per channel against an activation: `[8, 3, 5, 5]`, dim 1 -> `[3, 1, 1]`."""
    if not shape:
        return []
    dims = {dim % len(shape) for dim in channels}
    return [shape[dim] if dim in dims else 1 for dim in range(min(dims), len(shape))]


@dataclasses.dataclass(frozen=True)
class ActivationStats:
    """What was seen at one site.

    Attributes:
        low, high: smallest and largest value seen by channel, float64, shaped to broadcast against the activation.
        rows: a uniform sample of what was seen, `[R, C]`: R positions, all C channels of each.
        count: number of values seen.
    """

    low: Tensor
    high: Tensor
    rows: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, channels: tuple[int, ...] = (-1,)) -> ActivationStats:
        """Statistics of one tensor; `channels` are the dimensions that make up a channel."""
        observer = Observer(channels)
        observer.update(x)
        return observer.stats()

    def limits(self, percentile: float = 100.0, by_channel: bool = False) -> tuple[Tensor, Tensor]:
        """Range that holds the given share of the values, in percent; 100 is the exact smallest and largest.

        Below 100, both tails are cut alike, at quantiles of the sample: with 65,536 samples, 99.99 leaves about
        three of them outside on each side.
        """
        if percentile == 100.0:
            return (self.low, self.high) if by_channel else (self.low.min(), self.high.max())
        tail = (1 - percentile / 100) / 2
        rows = self.rows.double() if by_channel else self.rows.double().reshape(-1, 1)
        # torch.quantile refuses more than 2^24 values; the sample is far smaller.
        cut = torch.quantile(rows, torch.tensor([tail, 1 - tail], dtype=torch.float64, device=rows.device), dim=0)
        shape = self.low.shape if by_channel else ()
        return cut[0].reshape(shape), cut[1].reshape(shape)


class Observer:
    """Gathers ActivationStats over batches: running minimum and maximum by channel, and a uniform sample of rows.

    Args:
        channels: dimensions of the activation that make up a channel: (-1,) for a linear layer.
        samples: how many values to keep.
        seed: of the generator that chooses the sample.
    """

    def __init__(self, channels: tuple[int, ...] = (-1,), samples: int = 65536, seed: int = 0) -> None:
        if samples < 1:
            raise OptionError(f"samples={samples}: at least 1 is needed")
        self.channels = channels
        self.samples = samples
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._shape: list[int] | None = None
        self._low = self._high = self._rows = self._keys = torch.empty(0)

    def update(self, x: Tensor) -> None:
        """Add one batch.

        Raises:
            NonFiniteError: it holds NaN or infinity.
            CalibrationError: its channels are not those of the batches before.
        """
        x = x.detach()
        if x.numel() == 0:
            return
        require_finite(x)
        shape = channel_shape(x.shape, self.channels)
        if self._shape is not None and shape != self._shape:
            raise CalibrationError(f"channels of shape {shape} after channels of shape {self._shape}")
        rows = self._by_row(x)  # [R, C]
        low, high = (limit.double().reshape(shape).cpu() for limit in torch.aminmax(rows, dim=0))
        first = self._shape is None
        self._shape = shape
        self._low = low if first else torch.minimum(self._low, low)
        self._high = high if first else torch.maximum(self._high, high)
        self.count += x.numel()
        self._sample(rows)

    def stats(self) -> ActivationStats:
        """What was gathered.

        Raises:
            CalibrationError: nothing was.
        """
        if self._shape is None:
            raise CalibrationError("no activation was seen: give at least one calibration batch that reaches it")
        return ActivationStats(self._low, self._high, self._rows, self.count)

    def _by_row(self, x: Tensor) -> Tensor:
        if x.ndim == 0:
            return x.reshape(1, 1)
        dims = sorted(dim % x.ndim for dim in self.channels)
        rest = [dim for dim in range(x.ndim) if dim not in dims]
        size = 1
        for dim in dims:
            size *= x.shape[dim]
        return x.permute(*rest, *dims).reshape(-1, size)

    def _sample(self, rows: Tensor) -> None:
        """Keep the rows with the smallest of independent random keys: a uniform sample of the whole stream."""
        keep = max(1, self.samples // rows.shape[1])
        keys = torch.rand(rows.shape[0], generator=self._generator)
        if self._keys.numel() == keep:
            fresh = (keys < self._keys.max()).nonzero().squeeze(1)
            rows, keys = rows[fresh.to(rows.device)], keys[fresh]
        new = rows.float().cpu()
        merged = torch.cat([self._keys, keys])
        if self._keys.numel():
            new = torch.cat([self._rows, new])
        if merged.numel() > keep:
            merged, chosen = torch.topk(merged, keep, largest=False, sorted=False)
            new = new[chosen]
        self._keys, self._rows = merged, new.clone()
