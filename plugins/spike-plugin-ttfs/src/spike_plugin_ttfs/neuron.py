"""The first-spike neuron: Corollary 1's linear case of the discrete neuron of QC-A2S (Eq. 7 and 11)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from spikeplug.coding.types import CodeParams, Neuron
from spikeplug.errors import OptionError


class FirstSpikeState(NamedTuple):
    """Potential `[*S]`, whether each neuron has fired, and the step of the emit phase."""

    v: Tensor
    fired: Tensor
    t: int


@dataclasses.dataclass(frozen=True)
class FirstSpikeIF(Neuron):
    """Emit phase in units of λ: `s(t) = [v >= T - 1 - z]` once, before the last step; `v = v + 1` (ψ = 1/τ).

    What the receive phase gave comes as the current of step 0. The last step's spike would be worth nothing.

    Args:
        steps: T.
        zero: z, the zero point; `bind` gives it that of a site.
    """

    steps: int = 64
    zero: float = 0.0

    name: ClassVar[str] = "ttfs-if"

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise OptionError(f"steps={self.steps}: at least 2 are needed")

    def bind(self, p: CodeParams) -> Neuron:
        return dataclasses.replace(self, zero=float(p.extra["zero"]))

    def init(self, x: Tensor) -> FirstSpikeState:
        return FirstSpikeState(torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool), 0)

    def step(self, x: Tensor, state: FirstSpikeState) -> tuple[Tensor, FirstSpikeState]:
        v, last = state.v + x, self.steps - 1
        s = (v >= last - self.zero) & ~state.fired & (state.t < last)
        return s.to(x.dtype), FirstSpikeState(v + 1, state.fired | s, state.t + 1)
