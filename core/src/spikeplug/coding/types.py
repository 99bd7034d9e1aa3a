"""The types that plugins and core share: codes, neurons, approximators, passes and recipes.

Time is the first axis everywhere: a window is `[T, *S]` for an activation of shape `[*S]`. Spikes are 0, 1 or -1.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from spikeplug.errors import OptionError, indexed

if TYPE_CHECKING:
    from .statistics import ActivationStats


@dataclasses.dataclass(frozen=True)
class CodeParams:
    """What calibration found for one site: tensors only, so that it is stored and moved like any buffer.

    Their dtype is the one a code computes in.

    Attributes:
        scale: value of a decoded sum of 1; broadcasts against the activation (`[]` per tensor, `[C]` per channel).
        offset: value of a window without spikes; same shape as `scale`.
        extra: what else a scheme learns, by name.
    """

    scale: Tensor
    offset: Tensor
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as a site stores them."""
        return {"scale": self.scale, "offset": self.offset, **self.extra}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CodeParams:
        """The inverse of `tensors`."""
        extra = {name: tensor for name, tensor in tensors.items() if name not in ("scale", "offset")}
        return cls(tensors["scale"], tensors["offset"], extra)


class Encoder(ABC):
    """A code: how a number becomes a window of T spikes and back.

    A subclass is a frozen dataclass; its fields are its options, checked in `__post_init__`. It must give `weights`,
    `fit` and `encode`. The other methods follow from those three; a code with a closed form overrides `fused` and
    `count`, so that no window is made where none is needed. `spikeplug.testing.EncoderConformance` holds it to all
    that is said here.
    """

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    """Whether spikes may be -1."""
    collapsible: ClassVar[bool] = True
    """Whether `fused(x)` equals `decode(encode(x))` exactly."""
    streams: ClassVar[bool] = False
    """Whether whole trains stream through a network: every site has the weights d(t), which depend on no parameters,
    and the recipe's neuron turns the currents of one site into the spikes of the next. Such a code runs stepped only.
    """
    steps: int
    """T, the number of time steps of a window."""

    @property
    def static(self) -> bool:
        """Whether the parameters are those of calibration; a dynamic code computes them from each activation."""
        return True

    @property
    def updates(self) -> int:
        """Updates that a neuron of this code costs in one step, in those of a plain integrate-and-fire neuron."""
        return 1

    @abstractmethod
    def weights(self, p: CodeParams) -> Tensor:
        """Decode weights d(t), float64 `[T]`; of the code, or what was learned for these parameters."""

    @abstractmethod
    def fit(self, stats: ActivationStats) -> CodeParams:
        """Parameters for activations of these statistics.

        Raises:
            CalibrationError: no parameters can be found for them.
        """

    def fit_all(self, stats: Sequence[ActivationStats]) -> list[CodeParams]:
        """Parameters of many sites, for a code that learns them together; by default one after the other.

        Raises:
            CalibrationError: as `fit`; its `index` says for which of them.
        """
        found = []
        for index, each in enumerate(stats):
            with indexed(index):
                found.append(self.fit(each))
        return found

    @abstractmethod
    def encode(self, x: Tensor, p: CodeParams) -> Tensor:
        """Spikes of `x`: `[*S] -> [T, *S]`, in the dtype of `x`.

        Raises:
            NonFiniteError: `x` holds NaN or infinity.
        """

    def decode(self, s: Tensor, p: CodeParams) -> Tensor:
        """Value of a window: `scale * sum_t d(t) s(t) + offset`, `[T, *S] -> [*S]`, in the dtype of `s`."""
        dtype = torch.promote_types(s.dtype, p.scale.dtype)
        total = torch.tensordot(self.weights(p).to(s.device, dtype), s.to(dtype), dims=1)
        return self.scaled(total, p).to(s.dtype)

    def scaled(self, total: Tensor, p: CodeParams) -> Tensor:
        """Value of the weighted sum of a window's spikes, in place: `scale * total + offset`."""
        return total.mul_(p.scale.to(total.dtype)).add_(p.offset.to(total.dtype))

    def fused(self, x: Tensor, p: CodeParams) -> Tensor:
        """`decode(encode(x))` with the identity as gradient, `[*S] -> [*S]`. Raises as `encode`."""
        return straight_through(x, lambda x: self.decode(self.encode(x, p), p))

    def count(self, x: Tensor, p: CodeParams) -> Tensor:
        """Spikes fired per element, of an integer dtype, `[*S]`; a spike of -1 counts as one. Raises as `encode`."""
        return self.encode(x, p).abs().sum(0).to(torch.int32)

    def params(self, x: Tensor, p: CodeParams) -> CodeParams:
        """The parameters for this activation: `p` itself, unless the code is dynamic."""
        return p

    def drive(self, x: Tensor, p: CodeParams) -> Iterator[Tensor]:
        """The T input currents, each `[*S]`, with which the code's neuron fires the spikes of `encode`."""
        raise NotImplementedError(f"code '{self.name}' has no neuron: its spikes come from `encode`")

    @abstractmethod
    def span(self, p: CodeParams) -> tuple[Tensor, Tensor]:
        """Smallest and largest value that the code represents."""

    @abstractmethod
    def error_bound(self, p: CodeParams) -> Tensor:
        """Largest `|decode(encode(x)) - x|` for x within `span`, in exact arithmetic."""


State = Any
"""What a neuron carries from step to step: a tensor or a NamedTuple of tensors."""


class Neuron(ABC):
    """Dynamics that make spikes: pure functions of an explicit state. It fires on `>=`.

    A subclass is a frozen dataclass; its fields are its options.
    """

    name: ClassVar[str]
    latency: int = 0
    """Silent steps: the spike that answers step t comes at step t + latency."""

    def bind(self, p: CodeParams) -> Neuron:
        """The neuron as it is at a site with these parameters: itself, unless some of them are its own."""
        return self

    def activated(self, op: str, top: float = float("inf"), steps: int = 0) -> Neuron:
        """The neuron whose accumulated input passes an activation before it fires, for streaming codes.

        Args:
            op: `identity`, `relu`, or `clip` (to 0 .. `top`).
            top: in amplitudes of its spikes.
            steps: T.

        Raises:
            OptionError: there is no form with this activation.
        """
        if op == "identity":
            return self
        raise OptionError(f"neuron '{self.name}' has no form with the activation '{op}'")

    def residual(self, state: State) -> Tensor:
        """Potential left after the last step, in amplitudes: what the window's spikes do not tell, `[*S]`."""
        raise NotImplementedError(f"neuron '{self.name}' does not say what it has left")

    @abstractmethod
    def init(self, x: Tensor) -> State:
        """State before the first step, for currents shaped and placed like `x` `[*S]`."""

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One time step: current `[*S]` in, spikes `[*S]` and the next state out. The given state is not changed."""

    def window(self, xs: Tensor) -> Tensor:
        """Spikes of a whole window, `[T, *S] -> [T, *S]`, the silent steps drained inside."""
        if xs.shape[0] == 0:
            return torch.zeros_like(xs)
        return torch.stack(list(self.stream(xs)))

    def stream(self, currents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Spikes of a window, one step at a time: T currents in, T spikes out, the silent steps drained inside."""
        state = None
        for index, current in enumerate(self._then_silence(currents)):
            state = self.init(current) if index == 0 else state
            spikes, state = self.step(current, state)
            if index >= self.latency:
                yield spikes

    def _then_silence(self, currents: Iterable[Tensor]) -> Iterator[Tensor]:
        current = None
        for current in currents:
            yield current
        if current is not None:
            yield from itertools.repeat(torch.zeros_like(current), self.latency)


@runtime_checkable
class Approximator(Protocol):
    """Replaces nonlinear operations (`silu`, `gelu`, `softmax`, `rmsnorm`, ...). A frozen dataclass of options."""

    name: ClassVar[str]
    static: ClassVar[bool]
    """Whether what it builds is fitted to calibration data."""

    def build(self, op: str, original: torch.nn.Module, name: str) -> torch.nn.Module:
        """What is called in the place of `original`, a module of the network of that name, with its signature.

        What fires spikes or is fitted in it is a `spikeplug.coding.site.Coder`. `original` itself means: left exact.

        Raises:
            OptionError: there is no form of this operation.
        """


@runtime_checkable
class Pass(Protocol):
    """A rewrite before conversion that keeps the function of the network. A frozen dataclass of options.

    One that changes the function after all (it rounds weights, say) has an attribute `keeps_function = False`, so that
    the converted network is not compared with the dense one. One that can fail by its options may have `check(model)`,
    which raises then: it is called before any pass changes anything.
    """

    name: ClassVar[str]

    def apply(self, model: torch.nn.Module, batches: Sequence[Any] = ()) -> dict[str, Any]:
        """Rewrite a model in place; return what it found, as options that make the same again without the data.

        The model is a copy that shares the memory of its tensors with the user's: give modules new parameters, and
        write into none.

        Args:
            batches: calibration data; only a pass that looks for something in it reads them.
        """

    def skeleton(self, model: torch.nn.Module) -> None:
        """What `apply` adds to a network besides weights, for a model whose weights are read from a file."""


@runtime_checkable
class Trainer(Protocol):
    """Fine-tunes a converted model. A frozen dataclass of options."""

    name: ClassVar[str]

    def train(
        self, model: torch.nn.Module, batches: Sequence[Any], *, checkpoint: Any = None, watch: Any = ...
    ) -> list[float]:
        """Train in place and return the loss of every step.

        Args:
            batches: as `Architecture.loss` takes them.
            checkpoint: folder to keep the state in, and to go on from where it exists.
            watch: a `spikeplug.conversion.architecture.Watch`.
        """


@runtime_checkable
class Exporter(Protocol):
    """Writes a converted model in another tool's format. A frozen dataclass of options."""

    name: ClassVar[str]

    def export(
        self, model: torch.nn.Module, path: Any, samples: Sequence[Any] = (), *, watch: Any = ...
    ) -> dict[str, Any]:
        """Write a file, whole or not at all, and return a report that JSON can hold.

        Args:
            samples: batches of inputs, or pairs of inputs and labels: what ranges and accuracy are measured on.
            watch: a `spikeplug.conversion.architecture.Watch`.

        Raises:
            ConversionError: a part of the model has no form in that format; the message names it.
            BundleError: the file cannot be written.
        """


@runtime_checkable
class Framework(Protocol):
    """Another spiking framework."""

    name: ClassVar[str]

    def wrap(self, neuron: Neuron) -> torch.nn.Module:
        """The neuron as a layer of that framework."""

    def network(self, model: torch.nn.Module) -> torch.nn.Module:
        """A converted model of a streaming code as a `spikeplug.graph.timestepped.SteppedNetwork` of that framework.

        Raises:
            ConversionError: its trains do not stream.
        """


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named preset: the parts that a conversion binds, and their options unless the user says otherwise."""

    name: str
    summary: str
    encoder: str
    neuron: str | None = None
    encoder_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Pattern of names, kinds or subsystems -> encoder options that differ there."""
    neuron_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Neuron option -> the encoder option that it takes its value from."""
    passes: tuple[str, ...] = ()
    approximators: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Nonlinear operation, or `*` for all -> approximator; what is not named stays exact."""
    approximator_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Approximator -> its options."""
    approximator_follows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Approximator option -> the encoder option that it takes its value from."""
    targets: frozenset[str] = frozenset({"module", "lm"})
    """Kinds of network it is meant for: `module` (plain PyTorch), `lm` (language model)."""


class _StraightThrough(torch.autograd.Function):
    """The value in the forward pass, the identity in the backward pass (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        return value(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def impulse(x: Tensor, steps: int) -> Iterator[Tensor]:
    """`x` at t = 0 and silence afterwards: the drive of a neuron that is given its whole input at once."""
    yield x
    if steps > 1:
        yield from itertools.repeat(torch.zeros_like(x), steps - 1)


def straight_through(x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """`value(x)` with the identity as its gradient (LASER, section 3.3)."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _StraightThrough.apply(x, value)  # type: ignore[no-untyped-call]
        return result
    return value(x.detach())
