"""A site: the place in a network where an activation becomes a window of spikes."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spikeplug.errors import CalibrationError, ConversionError, NonFiniteError, indexed

from .listeners import Listener, recomputing
from .padding import without_padding
from .statistics import ActivationStats
from .types import CodeParams, Encoder, Neuron, straight_through

Execution = Literal["fused", "stepped"]
Mode = Literal["dense", "fused", "stepped"]
"""How what codes runs: an execution, or as the dense network, with every code left out."""
Receiver = Callable[[CodeParams, Iterator[Tensor]], Tensor]
EXECUTIONS: tuple[str, ...] = get_args(Execution)


class Coder(nn.Module):
    """What fires spikes under calibrated parameters: a site, or the codec of an approximated operation.

    Args:
        name: where in the network it stands; messages and reports use it.
        channels: dimensions of the observed activation that make up a channel; none: all values are alike.

    Attributes:
        listeners: who hears what happens in it.
    """

    mode: Mode = "fused"
    _modes: tuple[tuple[Mode, object], ...] = ()  # the mode ahead of all `in_mode`, and those of all that are entered
    static: bool = True
    """Whether it has parameters, which `calibrate` fits and `save` stores."""
    observes: bool = True
    """Whether the parameters are fitted to what it sees; if not, `fit` is called with None before the first batch."""
    sequence: int | None = -2
    """The dimension of positions in a sequence, of which some may be padding, counted from the end; None: none."""
    spatial: int = 0
    """Last dimensions that a convolution slides over, whose places do not all have as many synapses."""

    def __init__(self, name: str, channels: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.name, self.channels = name, channels
        self.listeners: tuple[Listener, ...] = ()

    def fit(self, stats: ActivationStats | None) -> Mapping[str, Tensor]:
        """Parameters by name, for activations of these statistics.

        Raises:
            CalibrationError: none can be found for them.
        """
        raise NotImplementedError

    def fit_all(self, coders: Sequence[Any], stats: Sequence[ActivationStats]) -> list[Mapping[str, Tensor]]:
        """Parameters of several coders of this one's `batch`, itself among them; by default one after the other.

        Raises:
            CalibrationError: as `fit`; its `index` says for which of them.
        """
        found = []
        for index, (coder, each) in enumerate(zip(coders, stats, strict=True)):
            with indexed(index):
                found.append(coder.fit(each))
        return found

    @property
    def batch(self) -> Hashable:
        """Coders of equal `batch` are fitted together."""
        return id(self)

    @property
    def calibrated(self) -> bool:
        """Whether it can code: it has parameters, or needs none."""
        return bool(self._buffers) or not self.static

    def require_calibrated(self) -> None:
        """Raises CalibrationError when it is not."""
        if not self.calibrated:
            raise CalibrationError(
                f"site '{self.name}' is not calibrated: call spikeplug.calibrate(model, batches) before the model"
            )

    def heard(self, event: str) -> bool:
        """Whether anyone hears events of this name."""
        return any(each.hears(event) for each in self.listeners)

    def tell(self, event: str, *what: Any) -> None:
        """Tell of an event, a method of `Listener`; not again of what checkpointing recomputes."""
        if not self.listeners or recomputing():
            return
        for each in self.listeners:
            getattr(each, event)(self, *what)

    def set_params(self, tensors: Mapping[str, Tensor]) -> None:
        """Store copies of parameters, as buffers of their names."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Coder:
        """Move the parameters with the model, but never let `.half()` or `.bfloat16()` round them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Put the name into an error of numbers that are not finite."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"site '{self.name}': {error}") from None


class Site(Coder):
    """Codes one activation. Called, it gives the decoded value, or hands the spikes to a receiver step by step.

    Several layers may read one site (q, k and v projections): the first call with an activation codes it and the
    following ones, with the same tensor, get the same result. It is kept on the tensor, so that it lives as long as the
    activation does, and forward passes in several threads do not meet.

    Args:
        name, channels: as of a Coder.
        kind: what it carries: `input`, `embedding`, `head`, `query`, `key`, `value`, `probabilities`.
        consumers: how many times an activation is read in a forward pass.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        encoder: Encoder,
        neuron: Neuron | None = None,
        channels: tuple[int, ...] = (-1,),
        consumers: int = 1,
    ) -> None:
        super().__init__(name, channels)
        self.kind, self.encoder, self.consumers = kind, encoder, consumers
        # The neuron of a streaming code answers currents, not activations; here the code makes its own spikes.
        self.neuron = None if encoder.streams else neuron

    @property
    def steps_now(self) -> bool:
        """Whether layers take its spikes step by step, and not its decoded value."""
        return self.mode == "stepped"

    def extra_repr(self) -> str:
        return f"{self.encoder}"

    @property
    def static(self) -> bool:  # type: ignore[override]
        return self.encoder.static

    def fit(self, stats: ActivationStats | None) -> Mapping[str, Tensor]:
        assert stats is not None
        return self.encoder.fit(stats).tensors()

    def fit_all(self, coders: Sequence[Any], stats: Sequence[ActivationStats]) -> list[Mapping[str, Tensor]]:
        return [p.tensors() for p in self.encoder.fit_all(stats)]

    @property
    def batch(self) -> Hashable:
        return self.encoder

    def params(self, x: Tensor) -> CodeParams:
        """The parameters for activation `x`, on its device.

        Raises:
            CalibrationError: there are none yet.
        """
        self.require_calibrated()
        if not self.static:
            unit = torch.ones((), device=x.device)
            return self.encoder.params(x, CodeParams(unit, torch.zeros_like(unit)))
        tensors = {name: buffer.to(x.device) for name, buffer in self._buffers.items() if buffer is not None}
        return self.encoder.params(x, CodeParams.from_tensors(tensors))

    def forward(self, x: Tensor, new: slice | None = None, receive: Receiver | None = None) -> Tensor:
        """Decoded value of the window of `x`, same shape and dtype; or what the receiver makes of its spikes.

        Args:
            receive: given the parameters and the T spikes `[*S]` of `x`, in stepped execution. A layer passes itself
                through here, and not around it, so that hooks which place the parameters (offload) see every use.
            new: only these positions of dimension -2 are counted; the others, which come from a cache, were
                counted when they were new.

        Raises:
            NonFiniteError: `x` holds NaN or infinity; the message names the site.
        """
        if receive is not None:
            with self.named():
                p = self.params(x)
                counted = self._first_reader(x)
                if counted and self.heard("window"):
                    self.tell("window", x, self.encoder.encode(x, p))
                return receive(p, self._stream(x, p, new, counted))
        if self.consumers == 1:
            return self._value(x, new)
        kept = _Kept.of(x, self)
        if kept is None:
            kept = _Kept(version(x), self._value(x, new), self.consumers)
        kept.read(x, self)
        return kept.value

    def _value(self, x: Tensor, new: slice | None) -> Tensor:
        with self.named():
            if self.mode == "dense":
                self.tell("activation", x)
                return x
            p = self.params(x)
            if self.heard("window"):
                self.tell("window", x, self.encoder.encode(x, p))
            if self.mode == "stepped":
                return straight_through(x, lambda x: self._decoded(x, p, new))
            if self.heard("fired"):
                fresh = without_padding(_fresh(x, new), self.sequence)
                known = p if self.static else self.params(fresh)
                self.tell("fired", self.encoder.count(fresh, known), fresh.numel(), self.encoder.steps)
            return self.encoder.fused(x, p)

    def _stream(self, x: Tensor, p: CodeParams, new: slice | None, counted: bool = True) -> Iterator[Tensor]:
        """Spikes of `x`, one step at a time: T tensors `[*S]` in the dtype of `x`."""
        neuron, encoder, heard = self.neuron, self.encoder, counted and self.heard("fired")
        spikes = encoder.encode(x, p) if neuron is None else neuron.bind(p).stream(encoder.drive(x, p))
        for step, s in enumerate(spikes):
            if heard:
                fresh = without_padding(_fresh(s, new), self.sequence)
                self.tell("fired", fresh.abs(), fresh.numel() if step == 0 else 0, 1)
            yield s.to(x.dtype)

    def _first_reader(self, x: Tensor) -> bool:
        """Whether this is the first of the layers that read the spikes of this activation, for which they count."""
        if self.consumers == 1:
            return True
        known = _Kept.of(x, self)
        kept = known or _Kept(version(x), x, self.consumers)
        kept.read(x, self)
        return known is None

    def _decoded(self, x: Tensor, p: CodeParams, new: slice | None) -> Tensor:
        total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, p.scale.dtype))
        for weight, s in zip(self.encoder.weights(p).tolist(), self._stream(x, p, new), strict=True):
            total.add_(s, alpha=weight)
        return self.encoder.scaled(total, p).to(x.dtype)


KEPT = "_spikeplug_kept"
"""Attribute of an activation that holds what sites keep of it."""


@dataclasses.dataclass
class _Kept:
    """What a site keeps of an activation, on the activation, until the last of the layers that read it has come."""

    version: int
    value: Tensor
    left: int

    @staticmethod
    def of(x: Tensor, site: Site) -> _Kept | None:
        """What this site keeps of the tensor, if it was not changed since."""
        kept: _Kept | None = getattr(x, KEPT, {}).get(id(site))
        return kept if kept is not None and kept.version == version(x) else None

    def read(self, x: Tensor, site: Site) -> None:
        """One more layer has come."""
        self.left -= 1
        known = {key: kept for key, kept in getattr(x, KEPT, {}).items() if key != id(site)}
        setattr(x, KEPT, known | ({id(site): self} if self.left else {}))


def version(x: Tensor) -> int:
    """Number of changes in place; tensors of inference mode do not count them."""
    return 0 if x.is_inference() else x._version


def _fresh(x: Tensor, new: slice | None) -> Tensor:
    return x if new is None else x[..., new, :]


def sites(model: nn.Module) -> dict[str, Coder]:
    """Everything in a converted model that fires spikes, by its place in it.

    Raises:
        ConversionError: it has none, so it is not a converted model.
    """
    found = {
        path.removesuffix(".site").removesuffix("_site"): module
        for path, module in model.named_modules()
        if isinstance(module, Coder)
    }
    if not found:
        raise ConversionError(f"{type(model).__name__} has no spiking site: convert it with spikeplug.convert first")
    return found


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode; what was in training is in training again behind it."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


_MODES = threading.Lock()
"""Held while the modes of coders are changed."""


@contextlib.contextmanager
def in_mode(of: nn.Module | Sequence[Coder], mode: Mode) -> Iterator[None]:
    """Inside, a converted network, or some coders, run in this mode; in `dense`, as the network it was made of."""
    coders = [each for each in of.modules() if isinstance(each, Coder)] if isinstance(of, nn.Module) else of
    entered = (mode, object())  # each context is one of its own, also where several threads ask for one mode
    with _MODES:
        for coder, was in [(coder, coder.mode) for coder in coders]:
            coder._modes = (*(coder._modes or ((was, None),)), entered)
        for coder in coders:
            coder.mode = mode
    try:
        yield
    finally:
        with _MODES:
            for coder in coders:
                coder._modes = tuple(each for each in coder._modes if each != entered)
                coder.mode = coder._modes[-1][0]
                if len(coder._modes) == 1:
                    coder._modes = ()
