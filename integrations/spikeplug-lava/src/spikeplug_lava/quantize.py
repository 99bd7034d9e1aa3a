"""From populations to integers: weights, thresholds and fraction bits that fit a chip, and a report of what that took.

A neuron's state is counted in a unit of its own. It is the smallest in which its weights fit 8 bits, made larger where
its states, measured on samples, would not fit 24; and such that its threshold is a whole number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.errors import ConversionError
from spikeplug_lava_runtime.format import STATE_LIMIT, WEIGHT_LIMIT, Bundle

from .integer import IntegerNetwork
from .populations import Edge, Population, bits, check_alike, check_code
from .rules import TernaryRules, WindowRules

FEWEST = 16
"""Magnitude that the largest weight of a population has at the least; below it 24 bits of state are too few."""

NARROW = 64
"""Magnitude below which the largest weight of a channel counts as narrowed in the report."""

BETAS = {1.5: "3/2", 2.0: "2"}
PAYLOAD_BITS = 12


@dataclasses.dataclass(frozen=True)
class Layer:
    """What became of one population, for the report.

    Attributes:
        weight_bits: of the largest weight of a channel, with its sign; of the median channel, and of the edge with the
            fewest.
        state_bits: that the samples needed, of 24.
        fraction: bits of the state behind the weights' unit.
        narrowed: share of channels where an edge's largest weight has fewer bits than 7: so that their state fits, or
            beside a much larger edge.
        refitted: whether its code was fitted anew, since the converted network decodes in that place.
    """

    name: str
    neuron: str
    neurons: int
    weight_bits: int
    state_bits: int
    fraction: int
    narrowed: float
    refitted: bool = False


class Quantizer:
    """Makes a bundle of populations, one after the other, on the spikes of samples.

    Args:
        populations: in order.
        fraction: bits of TSA's state behind the weights' unit; None: as many as fit, up to 8.

    Raises:
        ConversionError: a code, a neuron or an option of theirs has no integer form; or a state does not fit.
    """

    def __init__(self, populations: list[Population], head: Mapping[str, Any], fraction: int | None = None) -> None:
        self.populations, self.wanted = populations, fraction
        first = populations[0]
        assert first.encoder is not None
        self.encoder = first.encoder
        self.code = self.encoder.name
        self.steps = self.encoder.steps
        for population in populations:
            check_code(population)
        check_alike(populations)
        self.graph: dict[str, Any] = {**head, "code": self.code, "steps": self.steps, "populations": []}
        self.tensors: dict[str, Tensor] = {}
        self.layers: list[Layer] = []
        if self.code == "css":
            neurons = [each.neuron for each in populations if each.neuron is not None]
            # Without neurons there is the input's code alone.
            beta = getattr(neurons[0] if neurons else self.encoder, "beta", None)
            if beta not in BETAS:
                raise ConversionError(f"beta={beta} is no shift and add: 1.5 and 2 are")
            self.graph |= {"beta": BETAS[beta], "silent": getattr(neurons[0], "silent", 0) if neurons else 0}
        self.payload = 2 ** min(PAYLOAD_BITS, self.steps)

    def run(self, samples: Tensor, watch: Watch = unwatched) -> Bundle:
        """The bundle, fitted to samples `[B, ...]`."""
        self._input()
        network = self._network()
        fired = {self.populations[0].name: network.encode(samples)}
        for index, population in enumerate(self.populations[1:], start=1):
            watch("integers", index, len(self.populations))
            try:
                spikes = self._add(population, fired)
            except ConversionError as error:
                raise ConversionError(f"'{population.name}': {error}") from None
            if spikes is not None:
                fired[population.name] = spikes
        return self._network().bundle

    def _head(self, population: Population) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": population.name, "kind": population.kind, "shape": list(population.shape), "edges": []
        }  # fmt: skip
        if self.code == "phase" and population.params is not None:
            weights = self.encoder.weights(population.params)
            found["payload"] = torch.round(weights * self.payload).to(torch.int64).tolist()
        return found

    def _network(self) -> IntegerNetwork:
        return IntegerNetwork(Bundle(self.graph, {name: each.numpy() for name, each in self.tensors.items()}))

    def _input(self) -> None:
        first = self.populations[0]
        assert first.params is not None
        options = {field.name: getattr(self.encoder, field.name) for field in dataclasses.fields(self.encoder)}  # type: ignore[arg-type]
        params = first.params.tensors()
        self.graph["input"] = {"encoder": self.code, "options": options, "params": sorted(params)}
        self.tensors |= {f"input.{name}": each.detach().cpu() for name, each in params.items()}
        self.graph["populations"].append(self._head(first))

    def _add(self, population: Population, fired: Mapping[str, Tensor]) -> Tensor | None:
        """Quantize one population, and give its spikes; None of the readout."""
        described = self._head(population)
        weights = [self._real(edge) for edge in population.value.edges]
        if not weights:
            raise ConversionError("it receives no spikes")
        channels = population.shape[0]
        # What only passes spikes on may count for many synapses, so that it does not press real weights down.
        largest = torch.stack(
            [
                _by_channel(each, channels) / (1 if edge.op else WEIGHT_LIMIT)
                for each, edge in zip(weights, population.value.edges, strict=True)
            ]
        ).amax(0)
        # What is behind the weights may mix channels: they then share a unit.
        shared = any(edge.behind for edge in population.value.edges)
        largest = largest.max().expand(channels) if shared else largest
        # A neuron that nothing reaches has a unit all the same: that of its neighbours.
        unit = torch.where(largest > 0, largest, largest.max().clamp(min=1e-30)) / WEIGHT_LIMIT
        rules: Any = TernaryRules(self, population) if self.code == "css" else WindowRules(self, population)
        wider: Tensor | None = unit
        while wider is not None:  # once more, with a larger unit, where a state does not fit
            described |= rules.parameters(wider.max().expand(channels) if shared else wider)
            described["edges"] = self._edges(population, weights, rules.unit)
            spikes, peaks = self._network().step_in(described, fired, watched=True)
            # Of few neurons the samples say little: they count as an ordinary one, those of a readout as the largest.
            ordinary = peaks.max() if population.kind == "readout" else peaks.median()
            wider = rules.widened(torch.maximum(peaks, ordinary)) if wider is unit else None
        peak = int(peaks.max())
        kept = self._kept(described, channels)
        self._require(weights, kept, peak)
        self.graph["populations"].append(described)
        self.layers.append(
            Layer(
                population.name,
                rules.title,
                int(torch.tensor(population.shape).prod()),
                min(bits(float(each.double().median())) for each in kept),
                bits(peak),
                int(described.get("fraction", 0)),
                float((torch.stack(kept).amin(0) < NARROW).double().mean()),
                population.refitted,
            )
        )
        return None if population.kind == "readout" else spikes

    def _kept(self, described: Mapping[str, Any], channels: int) -> list[Tensor]:
        """Largest whole weight of every channel `[C]`, by edge."""
        found = []
        for edge in described["edges"]:
            weights = [self.tensors[op["weight"]].to(torch.int64) for op in edge["ops"] if "weight" in op]
            found.append(torch.stack([_by_channel(each, channels) for each in weights]).amax(0))
        return found

    def _require(self, weights: list[Tensor], kept: list[Tensor], peak: int) -> None:
        """Refuse what did not fit."""
        remedy = "convert it with fewer steps" + (
            ", beta=1.5, or export it with a smaller fraction" if self.code == "css" else ""
        )
        if peak > STATE_LIMIT:
            raise ConversionError(f"its state needs {bits(peak)} bits, 24 are there: {remedy}")
        fewest = max(int(each.max()) for each in kept)
        if fewest < FEWEST:
            raise ConversionError(
                f"with 24 bits of state its weights keep {bits(fewest)} bits, {bits(FEWEST)} are needed: {remedy}"
            )
        for real, whole in zip(weights, kept, strict=True):
            if int(whole.max()) == 0 and float(real.abs().max()) > 0:
                raise ConversionError(
                    f"an edge of it has weights of {float(real.abs().max()):.3g} beside others of "
                    f"{max(float(each.abs().max()) for each in weights):.3g}: they are all 0 in 8 bits"
                )

    def _real(self, edge: Edge) -> Tensor:
        """Weights of an edge in the units of what it feeds, for a source that fires whole numbers."""
        weight = edge.weight if edge.weight is not None else torch.full((1,), edge.factor, dtype=torch.float64)
        weight = weight.double().cpu()
        if self.code == "css":
            return weight
        assert edge.source.params is not None
        scale = float(edge.source.params.scale)
        return weight * (scale / self.payload if self.code == "phase" else scale)

    def _edges(self, population: Population, weights: list[Tensor], unit: Tensor) -> list[dict[str, Any]]:
        edges = []
        for index, (edge, weight) in enumerate(zip(population.value.edges, weights, strict=True)):
            name = f"{population.name}.{index}"
            shared = unit[:1] if edge.behind else unit
            scaled = weight / shared.reshape(-1, *[1] * (weight.ndim - 1))
            if edge.op is None:
                weighted = self._passed_on(name, scaled)
            else:
                self.tensors[f"{name}.weight"] = _int8(scaled)
                weighted = [{**edge.op, "weight": f"{name}.weight"}]
            ops = [*edge.ops, *weighted, *edge.behind]
            for place, op in enumerate(ops):
                if op["op"] == "gather":
                    self.tensors[f"{name}.index{place}"] = op["index"]
                    ops[place] = {**op, "index": f"{name}.index{place}"}
            edges.append({"from": edge.source.name, "ops": ops})
        return edges

    def _passed_on(self, name: str, scaled: Tensor) -> list[dict[str, Any]]:
        """Operations that multiply by weights beyond 127: two in a row."""
        times = torch.ceil(scaled.abs() / WEIGHT_LIMIT).clamp(1, WEIGHT_LIMIT)
        self.tensors[f"{name}.weight"] = _int8(scaled / times)
        if bool((times == 1).all()):
            return [{"op": "scale", "weight": f"{name}.weight"}]
        self.tensors[f"{name}.times"] = _int8(times)
        return [{"op": "scale", "weight": f"{name}.weight"}, {"op": "scale", "weight": f"{name}.times"}]

    def put(self, population: Population, key: str, value: Tensor) -> str:
        """Store whole numbers of a population, and give their name; per channel ones broadcast against its shape."""
        name = f"{population.name}.{key}"
        if float(value.abs().max()) > STATE_LIMIT:
            raise ConversionError(f"its {key} needs {bits(float(value.abs().max()))} bits, 24 are there")
        self.tensors[name] = value.round().to(torch.int32).contiguous()
        return name


def _int8(weight: Tensor) -> Tensor:
    return weight.round().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT).to(torch.int8)


def _by_channel(weight: Tensor, channels: int) -> Tensor:
    """Largest magnitude of the weights of every channel `[C]`; of other than C channels, of all."""
    found = weight.abs().flatten(1).amax(1) if weight.ndim > 1 else weight.abs()
    return found if len(found) == channels else found.max().expand(channels)
