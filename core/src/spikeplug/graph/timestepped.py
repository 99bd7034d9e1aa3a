"""A converted network time-stepped, step by step, and as a network of another framework.

Inside `SpikingGraph` every window is aligned: T steps in, T steps out, silent steps drained inside. Time-stepped, the
window of a layer begins when the silent steps of all layers before it are over, and a train that goes past layers
waits in a delay line.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from spikeplug.coding.types import Neuron, State
from spikeplug.errors import ConversionError

from .network import SpikingGraph
from .streaming import STREAMING, PooledInput, Readout, Rescale, StreamingLayer, StreamingMaxPool, StreamingSite


@dataclasses.dataclass(frozen=True)
class TimeStepped(Neuron):
    """A neuron in the network's time: it is still until step `start`, then takes `steps` steps of input and no more.

    A bias gives current at all times; what comes outside of the window is not for this neuron. `window` is aligned,
    as it is of the neuron itself.
    """

    neuron: Neuron
    start: int
    steps: int

    name: ClassVar[str] = "time-stepped"

    @property
    def latency(self) -> int:  # type: ignore[override]
        return self.start + self.neuron.latency

    def init(self, x: Tensor) -> State:
        return (0, self.neuron.init(x))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        t, inner = state
        if t < self.start:
            return self._silence(x), (t + 1, inner)
        spikes, inner = self.neuron.step(x if t < self.start + self.steps else torch.zeros_like(x), inner)
        return spikes, (t + 1, inner)

    def _silence(self, x: Tensor) -> Tensor:
        # Of the shape that comes out, which pooling changes.
        return torch.zeros_like(self.neuron.pool(x) if isinstance(self.neuron, PooledInput) else x)

    def window(self, xs: Tensor) -> Tensor:
        return self.neuron.window(xs)

    def residual(self, state: State) -> Tensor:
        return self.neuron.residual(state[1])


@dataclasses.dataclass(frozen=True)
class Delay(Neuron):
    """A delay line of so many steps. Aligned windows need none, so `window` gives back what comes in."""

    steps: int

    name: ClassVar[str] = "delay"

    def init(self, x: Tensor) -> State:
        return (torch.zeros_like(x),) * self.steps

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return state[0], (*state[1:], x)

    def window(self, xs: Tensor) -> Tensor:
        return xs


def tensors_of(state: State) -> Iterator[Tensor]:
    """Every tensor of a neuron's state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for each in state:
            yield from tensors_of(each)


class Stepped(nn.Module):
    """A neuron as a plain PyTorch module that keeps its state: one step `[B, ...]` in, one step out."""

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self.neuron, self.state = neuron, None

    def forward(self, x: Tensor) -> Tensor:
        state = self.neuron.init(x) if self.state is None else self.state
        spikes, self.state = self.neuron.step(x, state)
        return spikes

    def reset(self) -> None:
        """Forget the state."""
        self.state = None


class Scale(nn.Module):
    """Multiplies by a constant."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


class SteppedNetwork(nn.Module):
    """A network of another framework's layers: called, it takes the spikes of one step and gives the result's currents.

    Attributes:
        steps: T. delay: time steps from the first spike in to the last current out, T and the silent steps.
    """

    def __init__(self, layers: fx.GraphModule, image: StreamingSite, readout: Readout, delay: int) -> None:
        super().__init__()
        # Its layers are children of the network itself: some frameworks look for neurons no deeper.
        for name, child in layers.named_children():
            self.add_module(name, child)
        self._layers, self._image, self._readout = (layers,), (image,), (readout,)
        self.steps, self.delay = image.stream.steps, delay

    @property
    def layers(self) -> fx.GraphModule:
        """What happens in a step: `layers.graph` and `layers.code`."""
        return self._layers[0]

    def encode(self, x: Tensor) -> Tensor:
        """Spikes `[T, B, ...]` of a batch."""
        site = self._image[0]
        return site.encoder.encode(x, site.params())

    def ticks(self, x: Tensor) -> Iterator[Tensor]:
        """What comes in at every time step: T steps of spikes, then silence until the result is complete."""
        spikes = self.encode(x)
        yield from spikes
        yield from itertools.repeat(torch.zeros_like(spikes[0]), self.delay - self.steps)

    def decode(self, currents: Tensor) -> Tensor:
        """Result `[B, ...]` of the currents of all time steps, or of a window `[T, B, ...]`."""
        result: Tensor = self._readout[0](currents[-self.steps :].flatten(0, 1))
        return result

    def forward(self, spikes: Tensor) -> Tensor:
        """One step `[B, ...]` of the clock."""
        currents: Tensor = self.layers(spikes)
        return currents

    def run(self, x: Tensor) -> Tensor:
        """The result for a batch, step by step. Neurons must be reset before."""
        return self.decode(torch.stack([self(tick) for tick in self.ticks(x)]))


def network(
    model: nn.Module,
    wrap: Callable[[Neuron], nn.Module] = Stepped,
    build: type[SteppedNetwork] = SteppedNetwork,
) -> SteppedNetwork:
    """A converted network of a streaming code, rebuilt of another framework's layers. Weights are copied.

    Args:
        wrap: a neuron as a layer of that framework.
        build: the class of what is returned.

    Raises:
        ConversionError: trains do not stream in this model.
        CalibrationError: it is not calibrated.
    """
    if not isinstance(model, SpikingGraph) or model.stream is None:
        raise ConversionError(
            "only networks of streaming codes (recipes css, css-q) can be handed out as networks of neurons: other "
            "codes wait for whole windows"
        )
    return _Rebuilding(model, wrap).run(build)


class _Rebuilding:
    """Rebuilds a network of another framework's layers, one operation after the other."""

    def __init__(self, model: SpikingGraph, wrap: Callable[[Neuron], nn.Module]) -> None:
        assert model.stream is not None
        self.model, self.wrap, self.steps = model, wrap, model.stream.steps
        self.graph, self.root = fx.Graph(), nn.Module()
        self.made: dict[fx.Node, fx.Node] = {}
        self.starts: dict[fx.Node, int] = {}
        self.image: StreamingSite | None = None
        self.readout: Readout | None = None

    def run(self, build: type[SteppedNetwork]) -> SteppedNetwork:
        """The rebuilt network. Raises ConversionError."""
        for node in self.model.program.graph.nodes:
            if node.op == "output":
                self.graph.output(self.made[self._result(node)])
            else:
                self._add(node)
        assert self.image is not None
        assert self.readout is not None
        delay = self.model.conversion.report.delay
        assert delay is not None
        return build(fx.GraphModule(self.root, self.graph, "Layers"), self.image, self.readout, delay)

    def _result(self, node: fx.Node) -> fx.Node:
        results: Any = node.args[0]
        if len(results) != 1 or self.readout is None:
            raise ConversionError("the network has several results: time-stepped there is one")
        found: fx.Node = results[0]
        return found

    def _add(self, node: fx.Node) -> None:
        trains = [each for each in node.all_input_nodes if each in self.starts]
        start = max((self.starts[each] for each in trains), default=0)
        module = self.model.program.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder":
            if any(each.op == "placeholder" for each in self.made):
                raise ConversionError("the network has several inputs: time-stepped there is one")
            self.made[node] = self.graph.placeholder("spikes")
        elif isinstance(module, StreamingSite) and module.encodes:
            self._code(node, module)
        elif isinstance(module, Readout):
            if any(user.op != "output" for user in node.users):
                raise ConversionError(
                    f"'{node.meta['path']}' decodes spike trains within the network, which waits for whole windows: "
                    "such a network cannot be time-stepped"
                )
            self.readout, self.made[node], self.starts[node] = module, self.made[trains[0]], start
        elif node.op == "get_attr" or trains or self._is_size(node):
            self._copy(node, module, trains, start)

    def _is_size(self, node: fx.Node) -> bool:
        return self.model.kinds[node.name].kind == "size"

    def _code(self, node: fx.Node, module: StreamingSite) -> None:
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "placeholder" or self.image is not None:
            raise ConversionError(
                "the network changes its input before it is coded: do that before the network instead"
            )
        self.image, self.made[node], self.starts[node] = module, self.made[before], 0

    def _copy(self, node: fx.Node, module: nn.Module | None, trains: list[fx.Node], start: int) -> None:
        inputs = {
            each: self._delayed(self.made[each], start - self.starts[each]) if each in self.starts else self.made[each]
            for each in node.all_input_nodes
        }
        if node.op == "get_attr":
            tensor: Any = self.model.program
            for name in str(node.target).split("."):
                tensor = getattr(tensor, name)
            self.root.register_buffer(node.name, tensor.detach().clone())
            self.made[node] = self.graph.get_attr(node.name)
        elif module is None:
            self.made[node] = self.graph.node_copy(node, inputs.__getitem__)
        else:
            self.root.add_module(node.name, _rebuilt(module, start, self.steps, self.wrap))
            self.made[node] = self.graph.call_module(node.name, tuple(inputs[each] for each in node.args))  # type: ignore[index]
        if trains:
            self.starts[node] = start + (module.latency if isinstance(module, StreamingSite) else 0)

    def _delayed(self, node: fx.Node, by: int) -> fx.Node:
        if not by:
            return node
        name = f"{node.name}_delay{by}"
        if not hasattr(self.root, name):
            self.root.add_module(name, self.wrap(Delay(by)))
        return self.graph.call_module(name, (node,))


def _rebuilt(
    module: nn.Module,
    start: int,
    steps: int,
    wrap: Callable[[Neuron], nn.Module],
) -> nn.Module:
    if isinstance(module, (StreamingSite, StreamingMaxPool)):
        return wrap(TimeStepped(module.neuron, start, steps))
    if isinstance(module, Rescale):
        return Scale(module.factor)
    if isinstance(module, StreamingLayer):
        return _plain(module)
    return copy.deepcopy(module)


def _plain(module: StreamingLayer) -> nn.Module:
    """The dense layer with the absorbed weights."""
    with torch.no_grad():
        weight, bias = module.absorbed()
    dense: Any = next(cls for cls, streaming in STREAMING.items() if streaming is type(module))
    plain = copy.copy(module)
    plain.__dict__ = {
        key: value
        for key, value in module.__dict__.items()
        if key not in ("stream", "sites", "source", "feeds", "pooled", "_kept")
    }
    plain._parameters = {
        "weight": nn.Parameter(weight.detach().clone()),
        "bias": None if bias is None else nn.Parameter(bias.detach().clone()),
    }
    plain.__class__ = dense
    return plain
