"""From a converted network to populations of neurons: what fires, and through which linear maps its spikes go on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikeplug import ActivationStats, CodeParams, Encoder
from spikeplug.coding.layers import SpikingLayer
from spikeplug.coding.site import Site
from spikeplug.conversion.record import conversion_of
from spikeplug.errors import ConversionError
from spikeplug.graph.builder import affine
from spikeplug.graph.capture import operands
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.streaming import Readout, Rescale, StreamingAffine, StreamingLayer, StreamingSite

from .integer import unweighted
from .populations import Edge, Population, Value
from .trace import Trace, fed

RESERVED = ("image", "readout", "golden", "input", "output")
"""Names that mean something in the format, or in NIR's graphs."""


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


class _Lowering(Trace):
    def __init__(self, model: SpikingGraph, samples: Tensor) -> None:
        super().__init__(model, samples)
        self.populations: list[Population] = []
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

    def name(self, path: str) -> str:
        """A name for a population, that of the dense network's operation where nothing else has it."""
        name = path
        while name in self.names or (name in RESERVED and name == path):
            name += "_"
        self.names.add(name)
        return name

    def _value(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        kind, module = self.kinds[node].kind, self.module(node)
        inputs = [values[each] for each in node.all_input_nodes if each in values]
        if kind == "input":
            return Value(raw=True)
        if isinstance(module, (StreamingSite, StreamingLayer, SpikingLayer, Site, Rescale, Readout)):
            return self._of_ours(node, module, inputs[0])
        if node.target is affine and not inputs[0].raw:
            scale, shift = (self.found[each].detach() for each in node.args[1:3])  # type: ignore[index]
            return self._weighted(
                node, None, self.linear(node, inputs[0]), self.by_channel(node, scale), self.by_channel(node, shift)
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
        if isinstance(module, StreamingSite):
            return self._flow_site(node, module, value)
        if isinstance(module, StreamingLayer):
            weight, bias = (None if each is None else each.detach() for each in module.absorbed())
            assert weight is not None
            if isinstance(module, StreamingAffine):
                weight, bias = self.by_channel(node, weight), None if bias is None else self.by_channel(node, bias)
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

    def _flow_site(self, node: fx.Node, site: StreamingSite, value: Value) -> Value:
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
        ops, factor = self.linear_form(node, module)
        if value.raw and (factor != 1 or any(op["op"] == "sum_pool" for op in ops)):
            raise self.refuse(node, "it changes the network's input before it is coded, do that before the network")
        if value.activation is not None or value.raw:
            return dataclasses.replace(value, tail=(*value.tail, *ops), factor=value.factor * factor)
        bias = value.bias
        if bias is not None:
            whole = bias.double().expand(1, *self.shape(fed(node)))
            bias = self._apply(node, whole)[0]
        return Value(tuple(edge.then(*ops, factor=factor) for edge in value.edges), bias)

    def _read_out(self, value: Value, node: fx.Node) -> None:
        value = self.linear(node, value)
        self.populations.append(Population("readout", "readout", self.shape(node), value))


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
