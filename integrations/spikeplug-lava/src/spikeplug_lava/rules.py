"""What a neuron's unit of state is, and its parameters in that unit: of ternary neurons and of coded windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikeplug_lava_runtime.format import STATE_LIMIT

from .integer import emission
from .populations import Population

if TYPE_CHECKING:
    from .quantize import Quantizer

MARGIN = 2.0
"""How many times the states seen on samples fit: one bit is spare."""

FEW = 0.1
"""Share of a population's channels whose weights may have fewer bits rather than all states fewer fraction bits."""

MOST_FRACTION = 8


class TernaryRules:
    """TSA and TSA-ReLU."""

    def __init__(self, quantizer: Quantizer, population: Population) -> None:
        self.q, self.population = quantizer, population
        self.beta = 2.0 if quantizer.graph["beta"] == "2" else 1.5
        self.readout = population.kind == "readout"
        self.title = population.neuron.name if population.neuron is not None else "readout"
        self.rectify = self.title == "tsa-relu"
        self.negative = getattr(population.neuron, "negative", True)
        self.fraction = MOST_FRACTION if quantizer.wanted is None else quantizer.wanted
        # A readout only adds up: its rounding is never compared with a threshold.
        fewest = 0 if self.readout else 4 if self.beta == 1.5 else 1
        self.fewest = fewest if quantizer.wanted is None else self.fraction
        self.unit = torch.ones(())

    def _shaped(self, each: Tensor) -> Tensor:
        return each.reshape(-1, *[1] * (len(self.population.shape) - 1))

    def parameters(self, unit: Tensor) -> dict[str, Any]:
        """Store the parameters for a unit of the weights `[C]`."""
        amplitude = self.beta ** self.q.graph["silent"]
        # What all of its spikes together are worth must fit, whatever comes in; a readout fires none.
        total = 0.0 if self.readout else amplitude * sum(self.beta**t for t in range(self.q.steps))
        bias = _channels(self.population, self.population.value.bias)
        needed = bias.clamp(min=total)
        self._lower(needed / unit * 2.0**self.fraction)
        unit = torch.maximum(unit, needed * 2.0**self.fraction * MARGIN / STATE_LIMIT)
        found: dict[str, Any] = {"fraction": self.fraction, "bias": None}
        one = 2.0**self.fraction
        if self.readout:
            self.unit = unit
            found["scale"] = f"{self.population.name}.scale"
            self.q.tensors[found["scale"]] = self._shaped(unit / one).to(torch.float32)
        else:
            # Half of an amplitude is a whole number of states, so that no threshold is rounded.
            half = torch.floor(amplitude * one / 2 / unit).clamp(min=1)
            self.unit = amplitude * one / 2 / half
            found["threshold"] = self.q.put(self.population, "threshold", self._shaped(half))
            found |= {"rectify": self.rectify, "negative": self.negative, "ceiling": None}
            top = getattr(self.population.neuron, "top", float("inf"))
            if top < float("inf"):
                after = torch.arange(self.q.steps, dtype=torch.float64) + self.q.graph["silent"] + 1 - self.q.steps
                growth = (self.beta**after).reshape(-1, *[1] * len(self.population.shape))
                limits = top * growth * one / self._shaped(self.unit)
                # No state is larger than the limit, so a ceiling beyond it is none.
                found["ceiling"] = self.q.put(self.population, "ceiling", limits.clamp(max=STATE_LIMIT))
        if self.population.value.bias is not None:
            bias = self.population.value.bias.double() * one / self._shaped(self.unit)
            found["bias"] = self.q.put(self.population, "bias", bias)
        return found

    def widened(self, peak: Tensor) -> Tensor | None:
        """The unit with which states of that size fit; fraction bits are given up first. None: they fit."""
        over = peak.double() * MARGIN / STATE_LIMIT
        if bool((over <= 1).all()):
            return None
        over = over * 2.0 ** -self._lower(peak.double())
        wider: Tensor = self.unit * over.clamp(min=1)
        return wider

    def _lower(self, states: Tensor) -> int:
        """Give up fraction bits while states `[C]` do not fit in more than a few channels; how many were."""
        lowered = 0
        while self.fraction > self.fewest and float((states * MARGIN > STATE_LIMIT).double().mean()) > FEW:
            self.fraction, states, lowered = self.fraction - 1, states / 2, lowered + 1
        return lowered


class WindowRules:
    """BSE, phase, TTFS and rate: a window is taken in, then another is emitted."""

    def __init__(self, quantizer: Quantizer, population: Population) -> None:
        self.q, self.population = quantizer, population
        self.readout = population.kind == "readout"
        names = {"bse": "BSE (Horner)", "phase": "phase", "ttfs": "TTFS", "rate": "rate IF"}
        self.title = "readout" if self.readout else names[quantizer.code]
        self.unit = torch.ones(())

    def _shaped(self, each: Tensor) -> Tensor:
        return each.reshape(-1, *[1] * (len(self.population.shape) - 1))

    def parameters(self, unit: Tensor) -> dict[str, Any]:
        """Store the parameters for a unit of the weights `[C]`."""
        population, code, steps = self.population, self.q.code, self.q.steps
        found: dict[str, Any] = {"bias": None}
        bias = torch.zeros(()) if population.value.bias is None else population.value.bias
        bias = bias.double()
        if self.readout:
            self.unit = unit = torch.maximum(unit, _channels(self.population, bias) * MARGIN / STATE_LIMIT)
            found["scale"] = f"{population.name}.scale"
            self.q.tensors[found["scale"]] = self._shaped(unit).to(torch.float32)
            half = torch.zeros(())
        else:
            assert population.params is not None
            scale, offset = float(population.params.scale), float(population.params.offset)
            # The emitting potential must fit as well, whatever comes in.
            most = emission(code, steps)[1]
            bias = bias - offset
            needed = _channels(self.population, bias).clamp(min=scale * most) * MARGIN
            unit = torch.maximum(unit, needed / STATE_LIMIT)
            theta = torch.floor(scale / unit).clamp(min=1)
            self.unit = scale / theta
            half = self._shaped(theta) / 2
            if code in ("phase", "rate") or getattr(population.encoder, "rounding", "nearest") == "floor":
                half = torch.zeros(())
            if code == "phase":
                found |= self._tables(theta)
            else:
                found["threshold"] = self.q.put(population, "threshold", self._shaped(theta))
            if code in ("phase", "rate"):
                found["rectify"] = population.activation is not None
        total = bias / self._shaped(self.unit) + half
        if bool((total != 0).any()):
            found["bias"] = self.q.put(population, "bias", total)
        return found

    def _tables(self, theta: Tensor) -> dict[str, str]:
        """Thresholds and resets of every step, `[T, C, ...]`, and what a potential is clipped to `[C, ...]`."""
        population: Any = self.population
        one = 2.0**population.encoder.fraction
        shaped = self._shaped(theta)
        tables = {"ceiling": self.q.put(population, "ceiling", shaped)}
        for key in ("threshold", "reset"):
            table = population.params.extra[key].double().cpu().reshape(-1, *[1] * shaped.ndim) / one * shaped
            tables[key] = self.q.put(population, key, table.clamp(min=1) if key == "threshold" else table)
        return tables

    def widened(self, peak: Tensor) -> Tensor | None:
        """The unit with which states of that size fit. None: they fit."""
        over = peak.double() * MARGIN / STATE_LIMIT
        return None if bool((over <= 1).all()) else self.unit * over.clamp(min=1)


def _channels(population: Population, bias: Tensor | None) -> Tensor:
    """Largest magnitude of a bias by channel `[C]`."""
    if bias is None:
        return torch.zeros(population.shape[0], dtype=torch.float64)
    return bias.double().abs().expand(population.shape).reshape(population.shape[0], -1).amax(1)
