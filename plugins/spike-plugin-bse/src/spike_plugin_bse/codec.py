"""A scalar function inside a network, as an adaptive spiking neural codec with BSE output (LASER, Eq. 5 and 6)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeplug.coding.padding import real_elements
from spikeplug.coding.site import Coder
from spikeplug.coding.statistics import ActivationStats, require_finite
from spikeplug.coding.types import CodeParams, impulse

from .asnc import Table, fit, patterns
from .encoder import BSE
from .neuron import BitIF, CodecIF
from .segments import Fit, Function

CHUNK = 1 << 16
"""Inputs that a CPU computes at a time, so that what lies between input and output stays in its cache."""


class Codec(Coder):
    """Stands for a function of one number: two windows of spikes, the codec's and that of its BSE output.

    Args:
        name: as of a Coder.
        function: the exact function, elementwise; its own gradient is that of the codec.
        options: how it is fitted.
        domain: the range of inputs, where it is known; None: that of calibration.
    """

    def __init__(self, name: str, function: Function, options: Fit, domain: tuple[float, float] | None = None) -> None:
        super().__init__(name, channels=())
        self.function, self.options, self.domain = function, options, domain
        self.output = BSE(steps=options.steps)
        self.delay = 2 * options.steps  # its own window, and that of its output
        self._ready: dict[tuple[torch.device, torch.dtype], _Ready] = {}

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.domain is None

    def extra_repr(self) -> str:
        return f"segments={self.options.segments}, steps={self.options.steps}"

    def fit(self, stats: ActivationStats | None) -> Mapping[str, Tensor]:
        if self.domain is not None:
            table = _fit_domain(self.function, self.options, *self.domain)
        else:
            assert stats is not None
            limits = float(stats.low), float(stats.high)
            table = fit(self.function, stats.values, self.options, limits)
        (low, _), (high, _) = table.ends.tolist()
        # The range of the output is that of the function wherever the segments reach, so that nothing in it is clipped.
        y = self.function(torch.linspace(low, high, 4096, dtype=torch.float64))
        out = self.output.fit(ActivationStats.of(torch.cat([y, table(torch.linspace(low, high, 4096))]), ()))
        return {**table.tensors(), "scale": out.scale, "offset": out.offset}

    def set_params(self, tensors: Mapping[str, Tensor]) -> None:
        super().set_params(tensors)
        self._ready = {}

    def forward(self, x: Tensor) -> Tensor:
        """`function(x)` in spikes, same shape and dtype.

        Raises:
            NonFiniteError: `x` holds NaN or infinity; the message names the place.
            CalibrationError: it is not fitted yet.
        """
        with self.named():
            if self.mode == "dense":
                self.tell("activation", x)
                return self.function(x)
            self.require_calibrated()
            require_finite(x)
            y: Tensor = _OwnGradient.apply(x, self.function, self._spiking)  # type: ignore[no-untyped-call]
            return y

    def _spiking(self, x: Tensor) -> Tensor:
        ready = self._prepared(torch.promote_types(x.dtype, torch.float32), x.device)
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        size = CHUNK if x.device.type == "cpu" else max(1, x.numel())
        real = real_elements(x, self.sequence) if self.heard("fired") else None
        parts = (None,) * -(-x.numel() // size) if real is None else torch.split(real.reshape(-1), size)
        for part, place, kept in zip(
            torch.split(x.reshape(-1), size), torch.split(result.view(-1), size), parts, strict=True
        ):
            place.copy_(self._part(ready, part.to(ready.start.dtype), kept))
        return result

    def _part(self, ready: _Ready, x: Tensor, real: Tensor | None) -> Tensor:
        """The values of some inputs `[n]`, of which those that are real are counted; None: all are."""
        i, q = self._codes(ready, x)
        y = self._stepped(ready, i, q, real) if self.mode == "stepped" else self._fused(ready, i, q, real)
        if self.domain is None:
            (low, below), (high, above) = ready.ends
            y.add_((x - low).clamp_(max=0), alpha=below).add_((x - high).clamp_(min=0), alpha=above)
        return self._recoded(y, ready.out, real)

    def _tell(self, fired: Tensor, largest: int, real: Tensor | None, first: bool = True) -> None:
        fired = fired if real is None else fired[real]
        self.tell("fired", fired, fired.numel() if first else 0, largest)

    def _prepared(self, dtype: torch.dtype, device: torch.device) -> _Ready:
        """The tables for computing in this dtype on this device, made once."""
        key = (device, dtype)
        if key not in self._ready:
            buffers = {name: buffer.cpu() for name, buffer in self._buffers.items() if buffer is not None}
            table, spikes = Table.from_tensors(buffers), patterns(self.options.steps)
            values = table.bias[:, None] + table.weights @ spikes.T
            self._ready[key] = _Ready(
                owner=table.owner.to(device, torch.int32),
                start=table.start.to(*key),
                rate=table.rate.to(*key),
                values=values.reshape(-1).to(*key),
                bias=table.bias.to(*key),
                weights=table.weights.T.contiguous().to(*key),
                fired=spikes.sum(1).to(device, torch.int32),
                ends=table.ends.tolist(),
                out=CodeParams(buffers["scale"].to(device), buffers["offset"].to(device)),
            )
        return self._ready[key]

    @staticmethod
    def _codes(ready: _Ready, x: Tensor) -> tuple[Tensor, Tensor]:
        """`Table.codes` of a flat tensor, without its temporaries: int32, and whole numbers in the dtype of `x`."""
        (low, _), (high, _) = ready.ends
        cells = ready.owner.numel()
        cell = torch.sub(x, low).mul_(cells / (high - low)).clamp_(0, cells - 1).to(torch.int32)
        i = ready.owner.index_select(0, cell)
        start, rate = ready.start.index_select(0, i), ready.rate.index_select(0, i)
        return i, torch.sub(x, start, out=start).mul_(rate).round_().clamp_(0, ready.fired.numel() - 1)

    def _fused(self, ready: _Ready, i: Tensor, q: Tensor, real: Tensor | None) -> Tensor:
        code = q.to(torch.int32)
        if self.heard("fired"):
            self._tell(ready.fired.index_select(0, code), self.options.steps, real)
        return ready.values.index_select(0, code.add_(i, alpha=ready.fired.numel()))

    def _stepped(self, ready: _Ready, i: Tensor, q: Tensor, real: Tensor | None) -> Tensor:
        y = ready.bias.index_select(0, i)
        neuron = CodecIF(steps=self.options.steps)
        for t, s in enumerate(neuron.stream(impulse(q, neuron.steps))):
            self._tell(s, 1, real, first=t == 0)
            y.addcmul_(ready.weights[t].index_select(0, i), s)
        return y

    def _recoded(self, y: Tensor, out: CodeParams, real: Tensor | None) -> Tensor:
        """The value of the BSE window that carries `y` on (Eq. 6)."""
        if self.mode == "stepped":
            neuron = BitIF(steps=self.output.steps)
            total = torch.zeros_like(y, dtype=torch.promote_types(y.dtype, out.scale.dtype))
            for t, s in enumerate(neuron.stream(self.output.drive(y, out))):
                self._tell(s, 1, real, first=t == 0)
                total.add_(s, alpha=2.0 ** (self.output.steps - 1 - t))
            return self.output.scaled(total, out)
        if self.heard("fired"):
            self._tell(self.output.count(y, out), self.output.steps, real)
        return self.output.scaled(self.output.quantize(y, out), out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codec:
        super()._apply(fn, recurse)
        self._ready = {}
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ready": {}}


@functools.cache
def _fit_domain(function: Function, options: Fit, low: float, high: float) -> Table:
    """A function on a whole domain, all of it alike; every layer has the same."""
    return fit(function, torch.linspace(low, high, 4096, dtype=torch.float64), options)


class _Ready(NamedTuple):
    """A table as inputs of one dtype and device use it.

    Attributes:
        owner: as in Table, int32.
        start, rate, bias, ends: as in Table.
        weights: `[T, K]`.
        values: value of every code of every segment, `[K * 2^B]`.
        fired: spikes of every code, int32 `[2^B]`.
        out: parameters of the BSE output.
    """

    owner: Tensor
    start: Tensor
    rate: Tensor
    values: Tensor
    bias: Tensor
    weights: Tensor
    fired: Tensor
    ends: list[list[float]]
    out: CodeParams


class _OwnGradient(torch.autograd.Function):
    """The spiking value in the forward pass, the exact function's gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function, value: Function) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return value(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(ctx.function(x), x, gradients[0])[0], None, None
