"""What a lowered network consists of: populations of neurons, and the edges and sums in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spikeplug import CodeParams, Encoder, Neuron
from spikeplug.errors import ConversionError
from spikeplug.graph.operations import Kind
from spikeplug_lava_runtime.format import CODES


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
        encoder, params: its code; of streaming codes the amplitude is in `params.scale`.
        neuron: of streaming codes, its dynamics.
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
        bias: broadcasts against the shape; of streaming codes the share of one step.
        raw: whether it is the network's input itself.
        activation: pending, with the path of its node; and operations behind it, and the factor of averages in them.
    """

    edges: tuple[Edge, ...] = ()
    bias: Tensor | None = None
    raw: bool = False
    activation: tuple[Kind, str] | None = None
    tail: tuple[dict[str, Any], ...] = ()
    factor: float = 1.0


def check_alike(populations: list[Population]) -> None:
    """Refuse sites with options of their own: a network has one code and number of steps. Raises ConversionError."""
    first, neurons = populations[0].encoder, [each.neuron for each in populations if each.neuron is not None]
    assert first is not None
    for population in populations[1:]:
        encoder, neuron = population.encoder, population.neuron
        if encoder is not None and (encoder.name, encoder.steps) != (first.name, first.steps):
            raise ConversionError(
                f"'{population.name}' is coded by {encoder.name} in {encoder.steps} steps, the input by {first.name} "
                f"in {first.steps}: one code and number of steps can be exported, leave such overrides out"
            )
        for option in ("beta", "silent"):
            mine, others = getattr(neuron, option, None), getattr(neurons[0], option, None) if neurons else None
            if neuron is not None and mine != others:
                raise ConversionError(
                    f"'{population.name}' has {option}={mine}, another has {others}: one can be exported"
                )


def check_code(population: Population) -> None:
    """Refuse, by name, a code or neuron without an integer form. Raises ConversionError."""
    encoder, neuron, name = population.encoder, population.neuron, population.name
    if encoder is None:
        return
    if encoder.name not in CODES:
        raise ConversionError(f"'{name}': code '{encoder.name}' has no integer form: one of {', '.join(CODES)} has")
    for option in ("spikes", "mask"):
        if getattr(encoder, option, 0):
            raise ConversionError(f"'{name}': {option}={getattr(encoder, option)} has no integer form, {option}=0 has")
    if neuron is not None and neuron.name not in ("tsa", "tsa-relu"):
        raise ConversionError(f"'{name}': neuron '{neuron.name}' has no integer form: tsa and tsa-relu have")


def bits(magnitude: float) -> int:
    """Bits of a signed whole number of that magnitude."""
    return int(magnitude).bit_length() + 1
