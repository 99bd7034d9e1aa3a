"""From a converted network to populations of neurons: what fires, and through which linear maps its spikes go on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikeplug import ActivationStats, CodeParams, Encoder, Neuron
from spikeplug.conversion.record import conversion_of
from spikeplug.errors import ConversionError
from spikeplug.graph.builder import affine
from spikeplug.graph.capture import operands
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.operations import Kind
from spikeplug.graph.streaming import FlowAffine, FlowLayer, FlowSite, Readout, Rescale
from spikeplug.layers import SpikingLayer
from spikeplug.site import Site, in_mode

from .integer import unweighted

RESERVED = ("image", "readout", "golden", "input", "output")
"""Names that mean something in the format, or in NIR's graphs."""

AVERAGES = ("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d")
ADAPTIVE = ("aten.adaptive_avg_pool", "aten._adaptive_avg_pool")
MEAN = "aten.mean.dim"


def fed(node: fx.Node) -> fx.Node:
    """The node that gives a node its first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


@dataclasses.dataclass(frozen=True)
class Edge:
    """Spikes of a population, through linear operations and weights, to neurons.

    Attributes:
        source: the population.
        ops: what happens ahead of the weights; as in the format, and `index` of a gather as a tensor.
        op: the weighted operation, without its weight: `conv`, `linear` or `scale`.
        weight: its weights in real units; of a `scale`, one or one per channel.
        behind: operations behind the weights, on the way to the neurons.
        factor: of averages ahead of the weights.
    """

    source: Population
    ops: tuple[dict[str, Any], ...] = ()
    op: Mapping[str, Any] | None = None
    weight: Tensor | None = None
    behind: tuple[dict[str, Any], ...] = ()
    factor: float = 1.0

    def then(self, *ops: dict[str, Any], factor: float = 1.0) -> Edge:
        """The same with more operations."""
        if self.weight is None:
            return dataclasses.replace(self, ops=(*self.ops, *ops), factor=self.factor * factor)
        return dataclasses.replace(self, behind=(*self.behind, *ops), weight=self.weight * factor)


@dataclasses.dataclass(eq=False)
class Population:
    """Neurons, before they are made integers.

    Attributes:
        kind: `input`, `neurons` or `readout`.
        shape: without the batch.
        value: what it receives.
        encoder, params: its code; of codes that flow the amplitude is in `params.scale`.
        neuron: of codes that flow, its dynamics.
        activation: what the dense network has there.
        refitted: whether its code was fitted here, since the converted network decodes in that place.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    value: Value
    encoder: Encoder | None = None
    params: CodeParams | None = None
    neuron: Neuron | None = None
    activation: Kind | None = None
    refitted: bool = False


@dataclasses.dataclass(frozen=True)
class Value:
    """What a node of the graph stands for: a sum over edges and a bias; and, on the way to its code, what follows.

    Attributes:
        bias: broadcasts against the shape; of codes that flow the share of one step.
        raw: whether it is the network's input itself.
        activation: pending, with the path of its node; and operations behind it, and the factor of averages in them.
    """

    edges: tuple[Edge, ...] = ()
    bias: Tensor | None = None
    raw: bool = False
    activation: tuple[Kind, str] | None = None
    tail: tuple[dict[str, Any], ...] = ()
    factor: float = 1.0


def lower(model: nn.Module, samples: Tensor) -> list[Population]:
    """Populations in order, the readout last.

    Args:
        samples: a batch of inputs, for shapes, and for ranges of codes at places where the network decodes.

    Raises:
        ConversionError: an operation cannot be exported; the message names it.
    """
    if not isinstance(model, SpikingGraph):
        raise ConversionError(f"{type(model).__name__} was not captured as a graph: only such networks are exported")
    return _Lowering(model, samples).run()


class _Recorder(fx.Interpreter):
    """Runs the dense network and keeps what every node gives."""

    def __init__(self, model: SpikingGraph) -> None:
        super().__init__(model.program)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = result = super().run_node(n)
        return result


class _Lowering:
    def __init__(self, model: SpikingGraph, samples: Tensor) -> None:
        self.model, self.populations = model, list[Population]()
        nodes = list(model.program.graph.nodes)
        self.paths = {node: str(node.meta["path"]) for node in nodes}
        self.kinds = {node: model.kinds[node.name] for node in nodes}
        inputs = [node for node in nodes if node.op == "placeholder"]
        results = next(node for node in nodes if node.op == "output").args[0]
        if len(inputs) != 1 or len(results) != 1:
            raise ConversionError(f"{model.captured.name} has several inputs or results: one of each can be exported")
        recorder = _Recorder(model)
        with torch.no_grad(), in_mode(model, "dense"):
            recorder.run(samples)
        self.found = recorder.found
        self.names: set[str] = set()
        self.of_site: dict[int, Population] = {}
        self.of_activation: dict[str, Population] = {}

    def run(self) -> list[Population]:
        values: dict[fx.Node, Value] = {}
        for node in self.model.program.graph.nodes:
            if self.kinds[node].kind == "size":
                continue
            if node.op == "output":
                result = node.args[0][0]
                self._read_out(values[result], result)
                return self.populations
            values[node] = self._value(node, values)
        raise AssertionError("a graph has an output")

    def refuse(self, node: fx.Node, why: str) -> ConversionError:
        return ConversionError(f"'{self.paths[node]}' ({self.kinds[node].type}) cannot be exported: {why}")

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        if not isinstance(self.found[node], Tensor):
            raise self.refuse(node, "it gives several tensors")
        return tuple(self.found[node].shape[1:])

    def name(self, path: str) -> str:
        """A name for a population, that of the dense network's operation where nothing else has it."""
        name = path
        while name in self.names or (name in RESERVED and name == path):
            name += "_"
        self.names.add(name)
        return name

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.program.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _value(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        kind, module = self.kinds[node].kind, self._module(node)
        inputs = [values[each] for each in node.all_input_nodes if each in values]
        if kind == "input":
            return Value(raw=True)
        if isinstance(module, (FlowSite, FlowLayer, SpikingLayer, Site, Rescale, Readout)):
            return self._of_ours(node, module, inputs[0])
        if node.target is affine and not inputs[0].raw:
            scale, shift = (self.found[each].detach() for each in node.args[1:3])  # type: ignore[index]
            return self._weighted(
                node, None, self.linear(node, inputs[0]), self._by_channel(node, scale), self._by_channel(node, shift)
            )
        if kind == "activation":
            value = self.linear(node, inputs[0])
            return dataclasses.replace(value, activation=(self.kinds[node], self.paths[node]))
        if kind == "add":
            terms = [self.linear(node, each) for each in inputs]
            if len(terms) == 1:
                terms = terms * 2  # x + x
            return self._added([self._scaled(each, by) for each, by in zip(terms, _signs(node), strict=True)])
        if kind == "cat":
            return self._concatenated(node, [self.linear(node, each) for each in inputs])
        if kind == "linear":
            return self._linear(node, module, inputs[0])
        reasons = {
            "affine": "the network changes its input before it is coded, do that before the network",
            "product": "products of activations have no form in the format",
            "weighted": "it was left dense",
            "maxpool": "max pooling acts on accumulated values, which no neuron here holds; use average pooling",
            "nonlinear": "it has no integer form",
        }
        raise self.refuse(node, reasons.get(kind, "there is no integer form of it"))

    def _of_ours(self, node: fx.Node, module: nn.Module, value: Value) -> Value:
        """What a module that a conversion put in makes of a value."""
        if isinstance(module, FlowSite):
            return self._flow_site(node, module, value)
        if isinstance(module, FlowLayer):
            weight, bias = (None if each is None else each.detach() for each in module.absorbed())
            assert weight is not None
            if isinstance(module, FlowAffine):
                weight, bias = self._by_channel(node, weight), None if bias is None else self._by_channel(node, bias)
            return self._weighted(node, module, value, weight, bias)
        if isinstance(module, SpikingLayer):
            return self._window_layer(node, module, value)
        if isinstance(module, Site):
            return self._decoded(node, self._site(node, module, value), value)
        if isinstance(module, Rescale):
            return self._scaled(value, float(module.factor))
        if isinstance(module, Readout) and self.kinds[next(iter(node.users))].kind != "output":
            raise self.refuse(node, "spike trains are decoded there, and nothing in the format works on values")
        if isinstance(module, Readout):
            unit = module.source[0]
            return value if unit is None else self._scaled(value, float(unit.amplitude))
        raise AssertionError(type(module).__name__)

    def _by_channel(self, node: fx.Node, tensor: Tensor) -> Tensor:
        """A constant that differs by channel only, as `[C]`."""
        shape = self.shape(node)
        plain = (
            tensor.expand(shape[:1] + (1,) * (len(shape) - 1))
            if tensor.ndim < len(shape) or tensor.ndim == 0
            else tensor
        )
        if any(size != 1 for size in plain.shape[1:]):
            raise self.refuse(node, "its constants differ by more than the channel")
        return plain.reshape(-1)

    def _flow_site(self, node: fx.Node, site: FlowSite, value: Value) -> Value:
        shape = self.shape(node)
        if site.kind == "image":
            population = Population("image", "input", shape, value, site.encoder, site.params())
        else:
            name = self.name(self.paths[node])
            population = Population(
                name, "neurons", shape, value, site.encoder, site.params(), site.neuron, site.activation
            )
        self.populations.append(population)
        return Value((Edge(population),))

    def _window_layer(self, node: fx.Node, module: SpikingLayer, value: Value) -> Value:
        population = self._site(node, module.source, value)
        assert population.params is not None
        ahead = Value(tuple(self._carried(population, value)))
        bias = None if module.bias is None else module.bias.detach()
        found = self._weighted(node, module, ahead, module.weight.detach(), bias)
        plane = self._offset(population, value)
        if plane is not None:
            # What a window without spikes stands for, through the layer: at padded borders less of it.
            constant = module.synapse(plane.unsqueeze(0), module.weight.detach().double(), None)[0]
            found = self._added([found, Value(bias=constant)])
        return found

    def _offset(self, population: Population, value: Value) -> Tensor | None:
        """What silent windows of the population that codes a value stand for, past what lies behind; None: zero."""
        assert population.params is not None
        offset = population.params.offset.detach().double()
        if not bool((offset != 0).any()):
            return None
        plane = torch.zeros(1, *population.shape, dtype=torch.float64) + offset
        for op in value.tail if value.activation is not None or value.raw else ():
            plane = unweighted(op, plane, op.get("index"))
        return plane[0] * value.factor

    def _carried(self, population: Population, value: Value) -> list[Edge]:
        """The spikes of the population that codes a value, past what lies between its activation and its layer."""
        ahead = value.activation is not None or value.raw
        return [Edge(population).then(*value.tail, factor=value.factor) if ahead else Edge(population)]

    def _site(self, node: fx.Node, site: Site, value: Value) -> Population:
        """The population that codes what a site codes."""
        if id(site) not in self.of_site:
            source = fed(node)
            if value.raw:
                if any(each.kind == "input" for each in self.populations):
                    raise self.refuse(node, "the input is coded a second time, by another site")
                given = next(each for each, kind in self.kinds.items() if kind.kind == "input")
                at_input = self._params(site, source)
                found = Population("image", "input", self.shape(given), value, site.encoder, at_input)
                self.populations.append(found)
            elif value.activation is not None:
                # A site behind an average or a slice saw other values than the neurons at the activation fire.
                whole = all(op["op"] == "reshape" for op in value.tail) and value.factor == 1
                params = self._params(site, source) if whole else None
                found = self._at_activation(value, site.encoder, params)
            else:
                name, params = self.name(site.name), self._params(site, source)
                found = Population(name, "neurons", self.shape(source), value, site.encoder, params)
                self.populations.append(found)
            self.of_site[id(site)] = found
        return self.of_site[id(site)]

    def _params(self, site: Site, source: fx.Node) -> CodeParams:
        """Parameters of a site's code. Raises ConversionError where it has several scales."""
        params = site.params(self.found[source])
        if not site.static or params.scale.numel() != 1:
            raise ConversionError(
                f"'{site.name}': {site.encoder} has several scales in one site: convert it with granularity='tensor'"
            )
        return params

    def _at_activation(
        self, value: Value, encoder: Encoder | None = None, params: CodeParams | None = None
    ) -> Population:
        """The population at a pending activation.

        Its code is that of the site behind it, unless what is averaged in between gives other values than are fired.
        """
        assert value.activation is not None
        kind, path = value.activation
        if path not in self.of_activation:
            node = next(each for each, known in self.paths.items() if known == path)
            encoder = encoder or conversion_of(self.model).config.build()[0]
            refitted = params is None
            params = params or encoder.fit(ActivationStats.of(self.found[node]))
            received = Value(value.edges, value.bias)
            found = Population(
                self.name(path), "neurons", self.shape(node), received, encoder, params, None, kind, refitted
            )
            self.populations.append(found)
            self.of_activation[path] = found
        return self.of_activation[path]

    def linear(self, node: fx.Node, value: Value) -> Value:
        """A value that is linear in spikes: of a pending activation the spikes of a population put there."""
        if value.raw:
            raise self.refuse(node, "it reads the network's input uncoded")
        if value.activation is None:
            return value
        return self._decoded(node, self._at_activation(value), value)

    def _decoded(self, node: fx.Node, population: Population, value: Value) -> Value:
        """What the spikes of the population that codes a value stand for."""
        return Value(tuple(self._carried(population, value)), self._offset(population, value))

    def _concatenated(self, node: fx.Node, values: Sequence[Value]) -> Value:
        edges = []
        trains = [each for each in node.all_input_nodes if self.kinds[each].kind != "size"]
        for value, train in zip(values, trains, strict=True):
            if value.bias is not None or any(edge.op is not None for edge in value.edges):
                raise self.refuse(node, "it follows a layer without neurons in between")
            numbers = torch.arange(1, math.prod(self.shape(train)) + 1).reshape(1, *self.shape(train))
            planes = [
                numbers if each is train else torch.zeros(1, *self.shape(each), dtype=torch.int64) for each in trains
            ]
            given = dict(zip(trains, planes, strict=True))
            args, kwargs = (
                fx.node.map_arg(node.args, given.__getitem__),
                fx.node.map_arg(node.kwargs, given.__getitem__),
            )
            index = node.target(*args, **kwargs)[0].to(torch.int32)  # type: ignore[operator]
            gather = {"op": "gather", "index": index, "shape": list(self.shape(node))}
            edges += [edge.then(gather) for edge in value.edges]
        return Value(tuple(edges))

    def _added(self, values: Sequence[Value]) -> Value:
        biases = [each.bias for each in values if each.bias is not None]
        bias: Tensor | None = None
        for each in biases:
            # Each is per channel, [C, 1, ...], or of the whole shape.
            bias = each.double() if bias is None else bias + each.double()
        return Value(tuple(edge for each in values for edge in each.edges), bias)

    def _scaled(self, value: Value, factor: float) -> Value:
        bias = None if value.bias is None else value.bias * factor
        return Value(tuple(edge.then(factor=factor) for edge in value.edges), bias)

    def _weighted(self, node: fx.Node, module: Any, value: Value, weight: Tensor, bias: Tensor | None) -> Value:
        if weight.ndim == 1:
            op: dict[str, Any] = {"op": "scale"}
        elif weight.ndim == 2:
            op = {"op": "linear"}
            shape = self.shape(fed(node))
            if len(shape) != 1:
                raise self.refuse(node, f"it acts on the last of {list(shape)} dimensions: flatten ahead of it")
        else:
            op = {
                "op": "conv",
                "stride": list(module.stride),
                "padding": _padding(module, weight),
                "dilation": list(module.dilation),
                "groups": module.groups,
            }
        edges = []
        for edge in value.edges:
            if edge.op is not None:
                raise self.refuse(node, "it follows another layer without neurons in between")
            edges.append(dataclasses.replace(edge, op=op, weight=weight.double() * edge.factor, factor=1.0))
        if value.bias is not None:
            raise self.refuse(node, "its input has a constant part")
        shaped = None if bias is None else bias.double().reshape(-1, *[1] * (len(self.shape(node)) - 1))
        return Value(tuple(edges), shaped)

    def _linear(self, node: fx.Node, module: nn.Module | None, value: Value) -> Value:
        ops, factor = self._ops(node, module)
        if value.raw and (factor != 1 or any(op["op"] == "sum_pool" for op in ops)):
            raise self.refuse(node, "it changes the network's input before it is coded, do that before the network")
        if value.activation is not None or value.raw:
            return dataclasses.replace(value, tail=(*value.tail, *ops), factor=value.factor * factor)
        bias = value.bias
        if bias is not None:
            whole = bias.double().expand(1, *self.shape(fed(node)))
            bias = self._apply(node, whole)[0]
        return Value(tuple(edge.then(*ops, factor=factor) for edge in value.edges), bias)

    def _ops(self, node: fx.Node, module: nn.Module | None) -> tuple[list[dict[str, Any]], float]:
        """A linear operation in the format's words, and what its result is to be multiplied by."""
        given, shape = self.shape(fed(node)), self.shape(node)
        pooled = self._pooling(node, module, given, shape)
        if pooled is not None:
            kernel, stride, padding = pooled
            ops = [{"op": "sum_pool", "kernel": kernel, "stride": stride, "padding": padding}]
            reduced = tuple(
                (size + 2 * p - k) // s + 1 for size, k, s, p in zip(given[1:], kernel, stride, padding, strict=True)
            )
            if (given[0], *reduced) != shape:
                ops.append({"op": "reshape", "shape": list(shape)})
            return ops, 1 / math.prod(kernel)
        if self.kinds[node].pools:
            raise self.refuse(node, "of poolings only averages with equal windows can be")
        return self._selection(node, given, shape)

    def _pooling(
        self, node: fx.Node, module: nn.Module | None, given: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[list[int], list[int], list[int]] | None:
        dims, name = len(given) - 1, str(node.target)
        if name.startswith(AVERAGES):
            _, size, stride_, padding_, ceil, include, *rest = operands(node)
            kernel = _tuple(size, dims)
            stride, padding = _tuple(stride_ or size, dims), _tuple(padding_, dims)
            plain = include or not any(padding)
            if ceil or any(rest) or not plain:
                raise self.refuse(node, "its windows are not all divided by the same number")
            return kernel, stride, padding
        if name.startswith(ADAPTIVE):
            sizes = shape[1:]
            if any(size % to for size, to in zip(given[1:], sizes, strict=True)):
                raise self.refuse(node, "its windows are not all of one size")
            kernel = [size // to for size, to in zip(given[1:], sizes, strict=True)]
            return kernel, kernel, [0] * dims
        if name == MEAN:
            over = sorted(dim % (dims + 2) for dim in _tuple(node.args[1] or [], 1))
            if over != list(range(2, dims + 2)):
                raise self.refuse(node, f"a mean over dimensions {over} has no form in the format")
            return list(given[1:]), list(given[1:]), [0] * dims
        return None

    def _selection(
        self, node: fx.Node, given: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[list[dict[str, Any]], float]:
        """What a linear operation does to a numbered plane: where it only moves values, their numbers say how."""
        numbers = torch.arange(1, math.prod(given) + 1, dtype=torch.float64).reshape(1, *given)
        moved, ones = self._apply(node, numbers)[0], self._apply(node, torch.ones_like(numbers))[0]
        factor = float(ones.flatten()[ones.abs().argmax()])
        index = (moved / factor if factor else moved).round().clamp(0, numbers.numel())
        # Averages of numbers may be numbers too: only what holds of any values is a move.
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(numbers.shape, dtype=torch.float64, generator=generator)
        wanted = torch.cat([values.new_zeros(1), values.flatten()])[index.long()] * factor
        if not torch.allclose(self._apply(node, values)[0], wanted, rtol=1e-9, atol=1e-12):
            raise self.refuse(node, "it mixes values in a way that has no form in the format")
        if index.numel() == numbers.numel() and bool((index.flatten() == numbers.flatten()).all()):
            return ([] if given == shape else [{"op": "reshape", "shape": list(shape)}]), factor
        return [{"op": "gather", "index": index.to(torch.int32), "shape": list(shape)}], factor

    def _apply(self, node: fx.Node, x: Tensor) -> Tensor:
        """A node's operation on another tensor of one sample."""
        size = len(self.found[fed(node)])

        def value(argument: fx.Node) -> Any:
            if argument is fed(node):
                return x.expand(size, *x.shape[1:])
            return self.found[argument]

        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node.op == "call_module":
            result = self.model.program.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(result, Tensor):
            raise self.refuse(node, "it gives several tensors")
        return result[:1]

    def _read_out(self, value: Value, node: fx.Node) -> None:
        value = self.linear(node, value)
        self.populations.append(Population("readout", "readout", self.shape(node), value))


def _tuple(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(each) for each in (values * dims if len(values) == 1 else values)]


def _padding(module: Any, weight: Tensor) -> list[int]:
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return [0] * (weight.ndim - 2)
        wide = [dilation * (size - 1) for size, dilation in zip(weight.shape[2:], module.dilation, strict=True)]
        if any(each % 2 for each in wide):
            raise ConversionError(
                f"padding='same' of a kernel of {list(weight.shape[2:])} is not even: pad ahead of it"
            )
        return [each // 2 for each in wide]
    return list(module.padding)


def _signs(node: fx.Node) -> tuple[float, float]:
    """What an addition or a difference multiplies its two terms by."""
    name, args = str(node.target), operands(node)
    alpha = float(args[2]) if len(args) > 2 else 1.0
    if name.startswith("aten.rsub"):
        return -alpha, 1.0
    return (1.0, -alpha) if name.startswith("aten.sub") else (1.0, alpha)
