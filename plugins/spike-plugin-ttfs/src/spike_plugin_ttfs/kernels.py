"""The discrete first-spike neuron with any kernels (QC-A2S, Eq. 7 and Theorem 2), in float64, step by step.

With the kernels of Theorem 2 it computes `clip(h(sum_j w_j f(x_j)), a, b)` on the grid of its window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spikeplug.errors import OptionError

Function = Callable[[Tensor], Tensor]


class Window(NamedTuple):
    """What the spike times of a window stand for (Eq. 2 and 3): step t is `high - t / τ`, and silence is `low`."""

    low: float
    high: float
    steps: int

    @property
    def last(self) -> int:
        """N = T - 1, the time of a spike that would be worth no more than silence."""
        return self.steps - 1

    @property
    def tau(self) -> float:
        """Steps for one unit of value."""
        return self.last / (self.high - self.low)

    def values(self, when: Tensor) -> Tensor:
        """Values of spike times; `last` stands for silence."""
        return self.high - when.double() / self.tau


@dataclasses.dataclass(frozen=True)
class KernelNeuron:
    """A neuron that is given spikes of one window and fires one in the next.

    Args:
        f: what every input counts for; elementwise, any function.
        h_inverse: inverse of the monotone increasing h.
        incoming, outgoing: the two windows.
        rounding: `floor`, as in the paper; or `nearest`, the emit kernel sampled half a step on.

    Raises:
        OptionError: a window has no width or too few steps, or h is not monotone increasing on the outgoing one.
    """

    f: Function
    h_inverse: Function
    incoming: Window
    outgoing: Window
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "floor"):
            raise OptionError(f"rounding='{self.rounding}': choose one of nearest, floor")
        for window in (self.incoming, self.outgoing):
            if not window.low < window.high:
                raise OptionError(f"window [{window.low:g}, {window.high:g}]: a range of no width has no code")
            if window.steps < 2:
                raise OptionError(f"steps={window.steps}: at least 2 are needed")
        # A kernel that is not finite (NaN among others) is not above 0 either.
        if not bool((self.psi() > 0).all() & torch.isfinite(self.psi()).all()):
            raise OptionError(
                f"h is not monotone increasing on [{self.outgoing.low:g}, {self.outgoing.high:g}]: a kernel ψ that is "
                "not above 0 would let the potential fall; choose another window or another h"
            )

    def eta(self) -> Tensor:
        """Receive kernel `[N]`, u = 0 .. N - 1; the factors τ of Eq. 7 and of Theorem 2 cancel."""
        grid = self.f(self.incoming.values(torch.arange(self.incoming.last, -1, -1)))
        return grid.diff()

    def constant(self) -> Tensor:
        """What an input counts for without a spike, `f(a)`: C of Theorem 2 over the whole receive phase."""
        return self.f(torch.tensor(self.incoming.low, dtype=torch.float64))

    def psi(self) -> Tensor:
        """Emit kernel `[N - 1]`, v = 0 .. N - 2; the step after would lead to the spike that is worth nothing."""
        levels = self._levels()
        return -levels.diff() if levels.numel() > 1 else torch.ones(1)

    def theta(self) -> Tensor:
        """Threshold, `h^-1(b)`; for `nearest` that of half a step below."""
        return self._levels()[0]

    def _levels(self) -> Tensor:
        """Potentials from which on the neuron fires at step t = 0 .. N - 1, falling."""
        half = 0.5 if self.rounding == "nearest" else 0.0
        return self.h_inverse(self.outgoing.values(torch.arange(self.outgoing.last) + half))

    def receive(self, when: Tensor, weight: Tensor) -> Tensor:
        """Potential at the end of the receive phase, step by step.

        Args:
            when: spike times `[*S, J]` of the inputs; `incoming.last` is silence.
            weight: `[J]`.
        """
        eta, weight = self.eta(), weight.double()
        v = (weight * self.constant()).sum().expand(when.shape[:-1]).clone()
        for t in range(self.incoming.last):
            u = t - when
            v += (weight * torch.where(u >= 0, eta[u.clamp(min=0)], 0.0)).sum(-1)
        return v

    def emit(self, v: Tensor) -> Tensor:
        """Spike times `[*S]` of potentials, step by step; `outgoing.last` is silence."""
        psi, theta = self.psi(), self.theta()
        v, when = v.double().clone(), torch.full(v.shape, self.outgoing.last)
        for t in range(self.outgoing.last):
            when = torch.where((v >= theta) & (when == self.outgoing.last), t, when)
            if t < psi.numel():
                v += psi[t]
        return when

    def fused(self, when: Tensor, weight: Tensor) -> Tensor:
        """The same spike times in closed form: `sum_j w_j f(x_j)`, sought among the levels."""
        v = (weight.double() * self.f(self.incoming.values(when))).sum(-1)
        rising = self._levels().flip(0)
        return self.outgoing.last - torch.bucketize(v, rising, right=True)
