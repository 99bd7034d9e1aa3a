"""The phase neuron: integrate and fire on a magnitude, with its own threshold and reset in every step (Eq. 8)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from spikeplug.coding.types import CodeParams, Neuron
from spikeplug.errors import OptionError


class PhaseState(NamedTuple):
    """Potential and sign of the input `[*S]`, spikes fired so far, steps since the first, and the time step."""

    v: Tensor
    sign: Tensor
    fired: Tensor
    since: Tensor
    t: int


@dataclasses.dataclass(frozen=True)
class PhaseIF(Neuron):
    """`s(t) = sign [v >= θ(t)]; v = v - h(t) [v >= θ(t)]`, driven by one impulse in whole units at t = 0.

    Unbound it has `θ(t) = h(t) = 2^(15 - t)`; `bind` gives it those of a site.

    Args:
        spikes: largest number of spikes in a window; 0: any.
        mask: steps from the first spike on that may fire; 0: all.
    """

    spikes: int = 0
    mask: int = 0

    name: ClassVar[str] = "phase-if"

    def __post_init__(self) -> None:
        if self.spikes not in (0, 1, 2):
            raise OptionError(f"spikes={self.spikes}: 1, 2, or 0 for any number is needed")
        if self.mask < 0:
            raise OptionError(f"mask={self.mask}: a whole number of at least 0 is needed")

    def bind(self, p: CodeParams) -> Neuron:
        return _Bound(self.spikes, self.mask, tuple(p.extra["threshold"].tolist()), tuple(p.extra["reset"].tolist()))

    def schedule(self, t: int) -> tuple[float, float]:
        """Threshold and reset of a step."""
        return (2.0 ** (15 - t), 2.0 ** (15 - t))

    def init(self, x: Tensor) -> PhaseState:
        nothing = torch.zeros_like(x)
        return PhaseState(nothing, nothing, nothing, nothing, 0)

    def step(self, x: Tensor, state: PhaseState) -> tuple[Tensor, PhaseState]:
        threshold, reset = self.schedule(state.t)
        v = state.v + x.abs()
        sign = torch.where(x == 0, state.sign, torch.sign(x))
        s = v >= threshold
        if self.spikes:
            s = s & (state.fired < self.spikes)
        if self.mask:
            s = s & (state.since < self.mask)
        s = s.to(x.dtype)
        fired = state.fired + s
        return s * sign, PhaseState(v - reset * s, sign, fired, state.since + (fired > 0), state.t + 1)


@dataclasses.dataclass(frozen=True)
class _Bound(PhaseIF):
    """A phase neuron with the thresholds and resets of a site."""

    thresholds: tuple[int, ...] = ()
    resets: tuple[int, ...] = ()

    def schedule(self, t: int) -> tuple[float, float]:
        return (self.thresholds[t], self.resets[t]) if t < len(self.thresholds) else (float("inf"), 0.0)
