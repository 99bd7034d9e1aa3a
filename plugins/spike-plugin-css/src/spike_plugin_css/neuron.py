"""Ternary self-amplifying neurons: TSA (Eq. A.19-A.22), and TSA-ReLU, which also rectifies (Eq. A.23-A.24).

Potentials are in amplitudes of the neuron's own spikes, as after Algorithm 2. Three things are not as printed:

* the silent period is of L steps (A.5), where Algorithm 1's loop has L + 1 and adds one input twice;
* what was emitted counts `β^L` in `g` (A.23 leaves the factor out; A.21 has it);
* a neuron takes T steps of input and no more (`min` in A.23, where `max` is printed).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from spikeplug.coding.types import Neuron
from spikeplug.errors import OptionError


def check_beta(beta: float) -> None:
    """Raise OptionError unless 1 < β <= 2."""
    if not 1 < beta <= 2:
        raise OptionError(f"beta={beta}: a number above 1, at most 2, is needed")


def ternary(u: Tensor, threshold: float, out: Tensor, spare: Tensor) -> Tensor:
    """`[u >= threshold] - [u <= -threshold]` into `out`; `spare` is overwritten, all of one shape and dtype."""
    torch.ge(u, threshold, out=out)
    torch.le(u, -threshold, out=spare)
    return out.sub_(spare)


class TSAState(NamedTuple):
    """`t` steps are done; membrane potential `u` `[*S]`."""

    t: int
    u: Tensor


class RectifyingState(NamedTuple):
    """`t` steps are done; accumulated input `h` and output `g`, each `[*S]`."""

    t: int
    h: Tensor
    g: Tensor


@dataclasses.dataclass(frozen=True)
class TSA(Neuron):
    """`u <- β u + z`; after the silent steps fire s = ±1 where `|u| >= β^L / 2`, and `u <- u - β^L s` (A.19-A.22).

    Args:
        beta: β, above 1, at most 2.
        silent: L, steps that only integrate, 0 to 16.
        negative: whether spikes of -1 are fired. Without them the threshold is `β^L`, since what half of it fires too
            early could not be taken back; an ablation of the paper.
        compiled: whether windows run as one kernel that `torch.compile` makes of all steps, 2 to 3 times as fast on a
            CPU, after half a minute for the first; the spikes are the same.

    Raises:
        OptionError: an option is out of range.
    """

    beta: float = 1.5
    silent: int = 1
    negative: bool = True
    compiled: bool = False

    name: ClassVar[str] = "tsa"

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if isinstance(self.silent, bool) or not isinstance(self.silent, int) or not 0 <= self.silent <= 16:
            raise OptionError(f"silent={self.silent!r}: a whole number of steps from 0 to 16 is needed")

    @property
    def latency(self) -> int:  # type: ignore[override]
        return self.silent

    @property
    def amplitude(self) -> float:
        """`β^L`, what a spike takes from the potential."""
        return float(self.beta**self.silent)

    @property
    def threshold(self) -> float:
        """Potential from which on it fires."""
        return self.amplitude / 2 if self.negative else self.amplitude

    def activated(self, op: str, top: float = float("inf"), steps: int = 0) -> Neuron:
        if op == "identity":
            if not self.negative:
                raise OptionError("negative=False: a neuron that carries signed values needs negative spikes")
            return TSA(self.beta, self.silent, compiled=self.compiled)
        if op in ("relu", "clip"):
            return TSAReLU(self.beta, self.silent, self.negative, self.compiled, top, steps)
        return super().activated(op, top, steps)

    def init(self, x: Tensor) -> Any:
        return TSAState(0, torch.zeros_like(x))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        u = self.beta * state.u + x
        if state.t < self.silent:
            return torch.zeros_like(u), TSAState(state.t + 1, u)
        s = self.fire(u)
        return s, TSAState(state.t + 1, u - self.amplitude * s)

    def fire(self, u: Tensor) -> Tensor:
        """Spikes for potentials `u`, with a gradient within one amplitude of zero."""
        fired: Tensor = _Fire.apply(u, self.threshold, self.amplitude, self.negative)  # type: ignore[no-untyped-call]
        return fired

    def residual(self, state: Any) -> Tensor:
        return state.u / self.amplitude  # type: ignore[no-any-return]

    def window(self, xs: Tensor) -> Tensor:
        if xs.shape[0] == 0:
            return torch.zeros_like(xs)
        if torch.is_grad_enabled() and xs.requires_grad:
            spikes: Tensor = _Window.apply(xs, self)  # type: ignore[no-untyped-call]
            return spikes
        return self.scan(xs.detach())

    def scan(self, xs: Tensor) -> Tensor:
        """Spikes of a window in place: no tensor but the result and a few of one step's size are made."""
        if self.compiled:
            return _kernel()(xs, None, self.beta, self.silent, self.negative)
        out, spare = torch.empty_like(xs), torch.empty_like(xs[0])
        u = torch.zeros_like(xs[0])
        for t in range(len(xs) + self.silent):
            u.mul_(self.beta)
            if t < len(xs):
                u.add_(xs[t])
            if t >= self.silent:
                u.sub_(self._fired(u, out[t - self.silent], spare), alpha=self.amplitude)
        return out

    def _fired(self, u: Tensor, out: Tensor, spare: Tensor) -> Tensor:
        if self.negative:
            return ternary(u, self.threshold, out, spare)
        return torch.ge(u, self.threshold, out=out)

    def within(self, total: Tensor, most: float) -> Tensor:
        """Where a window's output follows its input, for accumulated inputs `[*S]` of a window worth `most` at most."""
        return total.abs() <= most


@dataclasses.dataclass(frozen=True)
class TSAReLU(TSA):
    """Accumulates input `h` and output `g` apart: `o = clip(h, 0, top c(t)) - g`, then fires as TSA (A.23-A.24).

    `c(t)` is what an input of 1 has grown to: `β^(t-T+1)` at step t of a window of T. It is known in a window, so a
    finite top needs `steps`.

    Args:
        beta, silent, negative: as of TSA.
        top: largest value that passes, in amplitudes: of ReLU6, 6 / θ.
        steps: T, for a finite top in `step`; 0: the length of the window.
    """

    top: float = float("inf")
    steps: int = 0

    name: ClassVar[str] = "tsa-relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.top > 0:
            raise OptionError(f"top={self.top}: a number above 0 is needed")

    def _ceiling(self, t: int, steps: int) -> float:
        return float(self.top * self.beta ** (t - steps + 1))

    def init(self, x: Tensor) -> Any:
        if self.top < float("inf") and not self.steps:
            raise OptionError(f"top={self.top}: a neuron that clips needs steps, the length of its window")
        return RectifyingState(0, torch.zeros_like(x), torch.zeros_like(x))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        t, h, g = state.t, self.beta * state.h + x, self.beta * state.g
        if t < self.silent:
            return torch.zeros_like(h), RectifyingState(t + 1, h, g)
        o = h.clamp(min=0)
        if self.top < float("inf"):
            o = o.clamp(max=self._ceiling(t, self.steps))
        s = self.fire(o - g)
        return s, RectifyingState(t + 1, h, g + self.amplitude * s)

    def residual(self, state: Any) -> Tensor:
        o = state.h.clamp(min=0)
        if self.top < float("inf"):
            o = o.clamp(max=self._ceiling(state.t - 1, self.steps))
        return (o - state.g) / self.amplitude  # type: ignore[no-any-return]

    def scan(self, xs: Tensor) -> Tensor:
        if self.compiled:
            tops = [self._ceiling(t, len(xs)) for t in range(len(xs) + self.silent)]
            return _kernel()(
                xs, torch.tensor(tops, dtype=xs.dtype, device=xs.device), self.beta, self.silent, self.negative
            )
        out, spare = torch.empty_like(xs), torch.empty_like(xs[0])
        h, g, o = torch.zeros_like(xs[0]), torch.zeros_like(xs[0]), torch.empty_like(xs[0])
        for t in range(len(xs) + self.silent):
            h.mul_(self.beta)
            g.mul_(self.beta)
            if t < len(xs):
                h.add_(xs[t])
            if t >= self.silent:
                torch.clamp(h, 0, self._ceiling(t, len(xs)), out=o)
                g.add_(self._fired(o.sub_(g), out[t - self.silent], spare), alpha=self.amplitude)
        return out

    def within(self, total: Tensor, most: float) -> Tensor:
        return (total > 0) & (total <= min(most, self.top))


def _unrolled(xs: Tensor, tops: Tensor | None, beta: float, silent: int, negative: bool) -> Tensor:
    """The steps of a window one after another, for the compiler, which makes one loop over neurons of them.

    Args:
        tops: what accumulated input is clipped to at every step `[T + L]`; None: it is not rectified either.
    """
    amplitude = beta**silent
    threshold = amplitude / 2 if negative else amplitude
    h, g, spikes = torch.zeros_like(xs[0]), torch.zeros_like(xs[0]), []
    for t in range(len(xs) + silent):
        h = h * beta + xs[t] if t < len(xs) else h * beta
        g = g * beta
        if t >= silent:
            o = h if tops is None else h.clamp(min=0).minimum(tops[t]) - g
            s = (o >= threshold).to(o.dtype)
            s = s - (o <= -threshold).to(o.dtype) if negative else s
            if tops is None:
                h = h - amplitude * s
            else:
                g = g + amplitude * s
            spikes.append(s)
    return torch.stack(spikes)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    kernel: Callable[..., Tensor] = torch.compile(_unrolled, dynamic=True)
    return kernel


class _Fire(torch.autograd.Function):
    """Spikes of one step; in the backward pass the spike follows the potential within one amplitude of zero."""

    @staticmethod
    def forward(u: Tensor, threshold: float, amplitude: float, negative: bool) -> Tensor:
        s = (u >= threshold).to(u.dtype)
        return s.sub_((u <= -threshold).to(u.dtype)) if negative else s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.amplitude = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        near = u.abs() <= ctx.amplitude
        return gradients[0] * near / ctx.amplitude, None, None, None


class _Window(torch.autograd.Function):
    """A whole window as one node: the value it decodes to follows the value that came in, where it can (STE)."""

    @staticmethod
    def forward(xs: Tensor, neuron: TSA) -> Tensor:
        return neuron.scan(xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, TSA], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.neuron = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (xs,) = ctx.saved_tensors
        d = ctx.neuron.beta ** torch.arange(len(xs) - 1, -1, -1, dtype=xs.dtype, device=xs.device)
        within = ctx.neuron.within(torch.tensordot(d, xs, dims=1), float(d.sum()))
        # The gradient of the decoded value: the one whose multiples by d(t) are nearest to what came back.
        value = torch.tensordot(d, gradients[0], dims=1).mul_(within).div_(d.square().sum())
        return d.reshape(-1, *[1] * value.ndim) * value, None
