"""LASER's integrate-and-fire neurons with dynamic threshold, and the soma that feeds them (Eq. 1-5)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from spikeplug.coding.rate import check_steps
from spikeplug.coding.types import CodeParams, Neuron

from .asnc import schedule
from .encoder import BSE, MAX_STEPS


class BitState(NamedTuple):
    """Membrane potential `[*S]` and the time step."""

    v: Tensor
    t: int


@dataclasses.dataclass(frozen=True)
class BitIF(Neuron):
    """Integrate-and-fire neuron with soft reset and threshold `Θ(t) = 2^(N-1-t)` (Eq. 1).

    Driven by one impulse q at t = 0 (Eq. 4) it fires the bits of q, most significant first. Whole-number currents
    below 2^24 in float32, 2^53 in float64, are exact.

    Args:
        steps: N, 1 to 32.
    """

    steps: int = 16

    name: ClassVar[str] = "bse-if"

    def __post_init__(self) -> None:
        check_steps(self.steps, MAX_STEPS)

    def init(self, x: Tensor) -> BitState:
        return BitState(torch.zeros_like(x), 0)

    def step(self, x: Tensor, state: BitState) -> tuple[Tensor, BitState]:
        threshold = 2.0 ** (self.steps - 1 - state.t)
        u = state.v + x
        s = (u >= threshold).to(u.dtype)
        return s, BitState(u - threshold * s, state.t + 1)


@dataclasses.dataclass(frozen=True)
class CodecIF(Neuron):
    """The neuron of a codec's segment (Eq. 5, 15): thresholds and resets of `asnc.schedule`, which differ by step.

    Args:
        steps: T, 1 to 32.
    """

    steps: int = 16

    name: ClassVar[str] = "asnc-if"

    def __post_init__(self) -> None:
        check_steps(self.steps, MAX_STEPS)

    def init(self, x: Tensor) -> BitState:
        return BitState(torch.zeros_like(x), 0)

    def step(self, x: Tensor, state: BitState) -> tuple[Tensor, BitState]:
        # After its window it is silent.
        threshold, reset = schedule(self.steps)[state.t] if state.t < self.steps else (math.inf, 0)
        u = state.v + x
        s = (u >= threshold).to(u.dtype)
        return s, BitState(u - reset * s, state.t + 1)


def soma(
    spikes: Tensor, weight: Tensor, bias: Tensor | None, encoder: BSE, p_in: CodeParams, p_out: CodeParams
) -> Tensor:
    """The integer current that one linear layer sends to its output neurons (Eq. 3), step by step in float64.

    Args:
        spikes: input spikes S_a, `[N, B, in]`.
        weight: W, `[out, in]`.
        bias: β, `[out]`.
        encoder: code of the output; its N is also that of the input.
        p_in, p_out: (λ, μ) of input and output, per tensor.

    Returns:
        Q_y, whole numbers `[B, out]`.
    """
    weight = weight.double()
    a = torch.zeros(spikes.shape[1], weight.shape[0], dtype=torch.float64)
    for t in range(encoder.steps):
        a += spikes[t].double() @ (weight * 2.0 ** (encoder.steps - 1 - t)).T  # G(t) = W W_bit(t), Eq. 2
    y = a * p_in.scale.double() + p_in.offset.double() * weight.sum(1)
    y = y if bias is None else y + bias.double()
    return torch.clip(torch.round((y - p_out.offset.double()) / p_out.scale.double()), 0, encoder.top)
