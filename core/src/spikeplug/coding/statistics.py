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
    return [shape[dim] if dim in dims else 1 for dim in range(min(dims, default=len(shape)), len(shape))]


@dataclasses.dataclass(frozen=True)
class ActivationStats:
    """What was seen at one site.

    Attributes:
        low, high: smallest and largest value seen by channel, float64, shaped to broadcast against the activation.
        values: a uniform sample of all values seen, `[V]`.
        rows: a uniform sample of positions with all their C channels, `[R, C]`; R is small where C is large.
        count: number of values seen.
        device: where they were.
    """

    low: Tensor
    high: Tensor
    values: Tensor
    rows: Tensor
    count: int
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

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

        Raises:
            CalibrationError: the sample has too few rows for such a percentile of a channel.
        """
        if percentile == 100.0:
            return (self.low, self.high) if by_channel else (self.low.min(), self.high.max())
        tail = (1 - percentile / 100) / 2
        sample = (self.rows if by_channel else self.values.unsqueeze(1)).double()
        seen = self.count // self.rows.shape[1]
        if by_channel and sample.shape[0] * tail < 1 and sample.shape[0] < seen:
            needed = int(1 / tail + 1) * sample.shape[1]
            raise CalibrationError(
                f"percentile={percentile} by channel needs more than the {sample.shape[0]} rows that were kept: "
                f"calibrate with samples={needed} or more"
            )
        # torch.quantile refuses more than 2^24 values; the sample is far smaller.
        cut = torch.quantile(sample, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        shape = self.low.shape if by_channel else ()
        return cut[0].reshape(shape), cut[1].reshape(shape)


class Reservoir:
    """A uniform sample of the rows of a stream, `[keep, C]`: those with the smallest of independent random keys."""

    def __init__(self, keep: int, generator: torch.Generator) -> None:
        self.keep = keep
        self._rows = self._keys = torch.empty(0)
        self._limit = 1.0  # rows with a key above it are not kept
        self._generator = generator

    def add(self, rows: Tensor) -> None:
        """Add rows `[R, C]` of the stream."""
        count = rows.shape[0]
        # Of so many rows at least `keep` have a key below this, as good as surely.
        self._limit = min(self._limit, 2 * (self.keep + 32) / count)
        if self._limit < 0.5:
            # How many rows have a key below the limit is drawn, and then which, so that the others cost nothing.
            trials = torch.tensor(float(count), dtype=torch.float64)
            entering = int(torch.binomial(trials, torch.full_like(trials, self._limit), generator=self._generator))
            chosen = torch.unique(torch.randint(count, (entering,), generator=self._generator))
            keys = torch.rand(chosen.numel(), generator=self._generator) * self._limit
        else:
            keys = torch.rand(count, generator=self._generator)
            chosen = (keys < self._limit).nonzero().squeeze(1)
            keys = keys[chosen]
        new = rows[chosen.to(rows.device)].float().cpu()
        self._rows = torch.cat([self._rows, new]) if self._keys.numel() else new
        self._keys = torch.cat([self._keys, keys])
        if self._keys.numel() > 4 * self.keep:
            self._prune()

    @property
    def rows(self) -> Tensor:
        """The sample."""
        self._prune()
        return self._rows

    def _prune(self) -> None:
        if self._keys.numel() >= self.keep:
            self._keys, chosen = torch.topk(self._keys, self.keep, largest=False, sorted=False)
            self._rows, self._limit = self._rows[chosen], float(self._keys.max())


class Observer:
    """Gathers ActivationStats over batches: running minimum and maximum by channel, and uniform samples.

    Args:
        channels: dimensions of the activation that make up a channel: (-1,) for a linear layer.
        samples: how many values to keep, once singly and once in whole rows.
        seed: of the generator that chooses the samples.
    """

    def __init__(self, channels: tuple[int, ...] = (-1,), samples: int = 65536, seed: int = 0) -> None:
        if samples < 1:
            raise OptionError(f"samples={samples}: at least 1 is needed")
        self.channels = channels
        self.samples = samples
        self.count = 0
        self.device = torch.device("cpu")
        self._generator = torch.Generator().manual_seed(seed)
        self._shape: list[int] | None = None
        self._low = self._high = torch.empty(0)
        self._values = Reservoir(samples, self._generator)
        self._rows = Reservoir(samples, self._generator)

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
        if self._shape is None:
            self._shape, self._low, self._high = shape, low, high
            self._rows.keep = max(1, self.samples // rows.shape[1])
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self.count += x.numel()
        self.device = x.device
        self._rows.add(rows)
        self._values.add(x.reshape(-1, 1))

    def stats(self) -> ActivationStats:
        """What was gathered.

        Raises:
            CalibrationError: nothing was.
        """
        if self._shape is None:
            raise CalibrationError("no activation was seen: give at least one calibration batch that reaches it")
        values = self._values.rows.squeeze(1)
        return ActivationStats(self._low, self._high, values, self._rows.rows, self.count, self.device)

    def _by_row(self, x: Tensor) -> Tensor:
        if x.ndim == 0:
            return x.reshape(1, 1)
        dims = sorted(dim % x.ndim for dim in self.channels)
        rest = [dim for dim in range(x.ndim) if dim not in dims]
        size = 1
        for dim in dims:
            size *= x.shape[dim]
        return x.permute(*rest, *dims).reshape(-1, size)
