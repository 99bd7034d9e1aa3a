"""Phase coding: a spike at step t is worth d(t), a power of a base; thresholds and resets may differ from it.

Sources: multi-granularity phase coding (MGPC), Eq. 1-3 and 7-8; LAS, `θ = h = d = τ 2^-t`; SpikedAttention, at most one
or two spikes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spikeplug.coding.rate import check_percentile, check_steps
from spikeplug.coding.statistics import ActivationStats, require_finite
from spikeplug.coding.types import CodeParams, Encoder, impulse, straight_through
from spikeplug.errors import CalibrationError, OptionError

MAX_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Learning:
    """Options of Algorithms 1 and 2, which the code and the trainer share.

    Args:
        rounds, inner_neuron, inner_bases: N, N1 and N2 of Algorithm 1.
        lr_neuron, lr_bases: η1 and η2, in units of the last step's worth.
        samples: calibration values that are learned from.
        allocation: which steps have which base: `even`, as even as can be; or `search` (Algorithm 2).

    Raises:
        OptionError: an option is out of range.
    """

    rounds: int = 32
    inner_neuron: int = 5
    inner_bases: int = 5
    lr_neuron: float = 0.3
    lr_bases: float = 0.3
    samples: int = 10000
    allocation: str = "even"

    def __post_init__(self) -> None:
        for option in ("rounds", "inner_neuron", "inner_bases", "samples"):
            if getattr(self, option) < 1:
                raise OptionError(f"{option}={getattr(self, option)}: at least 1 is needed")
        for option in ("lr_neuron", "lr_bases"):
            if not 0 < getattr(self, option) < float("inf"):
                raise OptionError(f"{option}={getattr(self, option)}: a positive number is needed")
        _choose(self, "allocation", ("even", "search"))


@dataclasses.dataclass(frozen=True)
class Phase(Learning, Encoder):
    """Sign and magnitude: `v = |x| / scale`; at step t the neuron fires where `v >= θ(t)`, then `v -= h(t)` (Eq. 8).

    The value is `sign(x) * scale * sum_t d(t) s(t)`. Potential, thresholds and resets are whole multiples of
    `2^-fraction`, decode weights of `2^-22`: every sum is exact in float32, so fused and stepped give the same.

    Args:
        steps: T, 1 to 16.
        grains: number of bases of d(t). 0: nothing is learned; from 1 on bases, thresholds and resets are learned by
            Algorithm 1 from the rounding neuron of base 2 on, which the result is never worse than.
        bases: the bases that are not learned, or that learning starts from; empty: 2. Several of them share the steps
            as evenly as can be, the largest worth first.
        rounding: how the neuron that is not learned, or that learning starts from, rounds: `floor` has `θ = h = d`;
            `nearest` fires half of the last step's worth earlier.
        spikes: largest number of spikes in a window, 1 or 2; 0: any.
        mask: steps from a window's first spike on that may fire, later spikes are dropped (appendix D.7); 0: all.
        percentile: share of the calibration values, in percent, whose magnitude the scale covers.
        clip: `none`, or `mse`: the scale is the share of that magnitude, 0.01 to 1, with the least squared error.
        The others: as of `Learning`.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 8
    grains: int = 0
    bases: tuple[float, ...] = ()
    rounding: str = "nearest"
    spikes: int = 0
    mask: int = 0
    percentile: float = 100.0
    clip: str = "none"

    name: ClassVar[str] = "phase"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.steps, MAX_STEPS)
        check_percentile(self.percentile)
        if not 0 <= self.grains <= self.steps:
            raise OptionError(f"grains={self.grains}: a whole number from 0 to steps={self.steps} is needed")
        object.__setattr__(self, "bases", tuple(self.bases))  # JSON knows lists only
        self._check_bases()
        _choose(self, "rounding", ("nearest", "floor"))
        _choose(self, "clip", ("none", "mse"))
        if self.spikes not in (0, 1, 2):
            raise OptionError(f"spikes={self.spikes}: 1, 2, or 0 for any number is needed")
        if not 0 <= self.mask <= self.steps:
            raise OptionError(f"mask={self.mask}: a whole number from 0 to steps={self.steps} is needed")
        if self.spikes and self.grains:
            raise OptionError(f"spikes={self.spikes}: a code of grains={self.grains} fires any number, spikes=0")

    def _check_bases(self) -> None:
        for base in self.bases:
            if not 1 < base < float("inf"):
                raise OptionError(f"bases={list(self.bases)}: {base:g} is no base: a number above 1 is needed")
        if len(self.bases) > self.steps:
            raise OptionError(f"bases={list(self.bases)}: at most one for each of steps={self.steps} is needed")
        if self.bases and float(self.start()[2].min()) < 2.0**-self.fraction:
            raise OptionError(f"bases={list(self.bases)}: a step is worth less than 2^-{self.fraction}: fewer steps")
        if self.bases and self.grains not in (0, len(self.bases)):
            raise OptionError(f"bases={list(self.bases)}: learning of grains={self.grains} starts from as many bases")

    @property
    def updates(self) -> int:
        """The mask costs as much as another update (Eq. 60)."""
        return 2 if self.mask else 1

    @property
    def fraction(self) -> int:
        """Bits of the potential behind the point: six more than the steps, so that a threshold has room to learn."""
        return self.steps + 6

    def weights(self, p: CodeParams) -> Tensor:
        return p.extra["weight"].double()

    def fit(self, stats: ActivationStats) -> CodeParams:
        return self.fit_all([stats])[0] if self.grains else self.params_of(self.scale_for(stats), *self.start())

    def fit_all(self, stats: Sequence[ActivationStats]) -> list[CodeParams]:
        if not self.grains:
            return super().fit_all(stats)
        from .trainer import learn_all

        return learn_all(self, stats)[0]

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, resets and decode weights of the neuron that nothing was learned for, float64 `[T]`."""
        bases = torch.tensor(self.bases or (2.0,), dtype=torch.float64)
        owner = torch.tensor(even(self.steps, len(bases)))
        d = bases[owner] ** -torch.arange(1, self.steps + 1, dtype=torch.float64)
        return (d - d.min() / 2 if self.rounding == "nearest" else d.clone()), d.clone(), d

    def scale_for(self, stats: ActivationStats) -> Tensor:
        """The magnitude that v = 1 stands for."""
        low, high = stats.limits(self.percentile)
        largest = torch.maximum(low.abs(), high.abs()).double()
        if largest == 0:
            # A site that only ever carries zero: any scale represents it.
            return torch.ones((), dtype=torch.float64)
        # All spikes together may be worth less than 1; rounded down, one more of the last is within reach.
        d = self.start()[2]
        largest = largest / (d.sum() + d.min() * (self.rounding == "floor")).clamp(max=1.0)
        return self._searched(stats.values.double().abs(), largest) if self.clip == "mse" else largest

    def _searched(self, magnitudes: Tensor, largest: Tensor) -> Tensor:
        plain = dataclasses.replace(self, grains=0)
        best, chosen = float("inf"), largest
        for share in torch.logspace(-2, 0, 41, dtype=torch.float64):
            p = plain.params_of(largest * share, *plain.start())
            error = float((plain.fused(magnitudes, p) - magnitudes).square().mean())
            if error < best:
                best, chosen = error, largest * share
        return chosen

    def params_of(self, scale: Tensor, threshold: Tensor, reset: Tensor, weight: Tensor) -> CodeParams:
        """Parameters with everything put on its grid.

        Raises:
            CalibrationError: the scale is no ordinary number of float32.
        """
        scale = scale.to(torch.float32)
        if not bool(torch.isfinite(scale)) or scale < torch.finfo(torch.float32).tiny:
            raise CalibrationError(f"the largest magnitude {float(scale):g} has no float32 scale")
        unit = 2.0**self.fraction
        extra = {
            "threshold": torch.round(threshold * unit).to(torch.int32).clamp(min=1),
            "reset": torch.round(reset * unit).to(torch.int32),
            "weight": (torch.round(weight * 2.0**22) / 2.0**22).to(torch.float32),
        }
        return CodeParams(scale, torch.zeros_like(scale), extra)

    def potential(self, x: Tensor, p: CodeParams) -> Tensor:
        """v(1) of `x`, in units of `2^-fraction`: whole numbers `[*S]` in the dtype of computation."""
        require_finite(x)
        dtype = torch.promote_types(x.dtype, p.scale.dtype)
        unit = 2.0**self.fraction
        return x.abs().to(dtype).mul_(unit / p.scale.to(dtype)).floor_().clamp_(max=unit)

    def drive(self, x: Tensor, p: CodeParams) -> Iterator[Tensor]:
        return impulse(self.potential(x, p) * torch.sign(x), self.steps)  # Eq. 1, with the sign of x

    def encode(self, x: Tensor, p: CodeParams) -> Tensor:
        spikes = self._tables(p)[1][:, self.potential(x, p).to(torch.int64)]
        return (spikes.to(x.dtype) * torch.sign(x)).to(x.dtype)

    def fused(self, x: Tensor, p: CodeParams) -> Tensor:
        def value(x: Tensor) -> Tensor:
            v = self.potential(x, p)
            total = self._tables(p)[0].index_select(0, v.to(torch.int32).reshape(-1)).reshape(x.shape).to(v.dtype)
            return self.scaled(total.copysign_(x), p).to(x.dtype)

        return straight_through(x, value)

    def count(self, x: Tensor, p: CodeParams) -> Tensor:
        fired = self._tables(p)[2]
        return fired.index_select(0, self.potential(x, p).to(torch.int32).reshape(-1)).reshape(x.shape)

    def span(self, p: CodeParams) -> tuple[Tensor, Tensor]:
        top = self._tables(p)[0].max() * p.scale
        return -top, top

    def error_bound(self, p: CodeParams) -> Tensor:
        values = self._tables(p)[0].double()
        # Between two whole potentials the value stays that of the lower one.
        v = torch.arange(values.numel(), device=values.device) / 2.0**self.fraction
        inside = v <= values.max()
        worst = torch.maximum((values - v).abs(), (values - v - 2.0**-self.fraction).abs())
        return (worst[inside].max() * p.scale).to(p.scale.dtype)

    def _tables(self, p: CodeParams) -> tuple[Tensor, Tensor, Tensor]:
        """Of every potential 0 .. 2^fraction: value float32 `[V]`, spikes int8 `[T, V]`, their number int32 `[V]`."""
        weight = p.extra["weight"]
        kept = _TABLES.get(weight)  # type: ignore[no-untyped-call]
        key = (self.spikes, self.mask, *(tensor._version for tensor in p.extra.values()))
        if kept is None or kept[0] != key:
            v = torch.arange(2**self.fraction + 1, dtype=torch.int32, device=weight.device)
            spikes = list(fire(v, p.extra["threshold"], p.extra["reset"], self.spikes, self.mask))
            planes = torch.stack(spikes)
            value = (planes.double() * weight.double().reshape(-1, 1)).sum(0).to(torch.float32)
            kept = (key, (value, planes, planes.sum(0, dtype=torch.int32)))
            _TABLES[weight] = kept
        tables: tuple[Tensor, Tensor, Tensor] = kept[1]
        return tables


def even(steps: int, grains: int) -> tuple[int, ...]:
    """Steps to bases, in order and as even as can be; the first bases have the steps that are left over."""
    size, more = divmod(steps, grains)
    return tuple(base for base in range(grains) for _ in range(size + (base < more)))


def _choose(options: Any, option: str, choices: tuple[str, ...]) -> None:
    if getattr(options, option) not in choices:
        raise OptionError(f"{option}='{getattr(options, option)}': choose one of {', '.join(choices)}")


_TABLES = WeakTensorKeyDictionary()
"""Decode weights of a site -> its tables, as long as the site has those weights."""


def fire(v: Tensor, threshold: Tensor, reset: Tensor, limit: int = 0, mask: int = 0) -> Iterator[Tensor]:
    """Spikes int8 of every step for potentials `v`, in whole units (Eq. 8).

    Args:
        limit: as `Phase.spikes`.
        mask: as `Phase.mask`.
    """
    fired, left = torch.zeros_like(v), torch.full_like(v, mask or threshold.numel())
    for t in range(threshold.numel()):
        s = (v >= threshold[t]) & (left > 0)
        if limit:
            s = s & (fired < limit)
        v, fired = v - reset[t] * s, fired + s
        left = left - (fired > 0).to(left.dtype)
        yield s.to(torch.int8)
