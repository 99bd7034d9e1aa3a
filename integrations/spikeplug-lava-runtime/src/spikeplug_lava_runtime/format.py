"""An integer network in memory, and what its format says of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "spikeplug-integer-network"
SPEC = 1
"""Version of the format that this release reads and writes."""

CODES = ("css", "bse", "phase", "ttfs", "rate")
WEIGHT_LIMIT = 127
STATE_BITS = 24
STATE_LIMIT = 2 ** (STATE_BITS - 1) - 1
"""Largest magnitude of a state, a bias or a threshold."""

PAYLOAD_LIMIT = 2**15
MOST = 2**24
"""Values that a population, or what is on the way to one, has at the most."""


class FormatError(ValueError):
    """A file is no integer network of a version that this release reads, or it was changed; the message says which."""


@dataclass
class Bundle:
    """An integer network.

    Attributes:
        graph: see "Integer networks" in the documentation.
        tensors: what the graph names: int8 weights, int32 biases, thresholds, tables and indices, float32 scales of
            the readout; and `golden.NAME`, int8 spikes `[T, samples, ...]` of every population, and what the readout
            holds, int32.
    """

    graph: dict[str, Any]
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """T, steps of a window."""
        return int(self.graph["steps"])

    @property
    def code(self) -> str:
        """The code of all populations, one of `CODES`."""
        return str(self.graph["code"])

    @property
    def populations(self) -> list[dict[str, Any]]:
        """Populations in order: every one comes after those whose spikes it receives."""
        found: list[dict[str, Any]] = self.graph["populations"]
        return found

    def payload(self, population: str) -> list[int] | None:
        """What spikes of every step of a population carry; None: they are 1 or -1."""
        found: list[int] | None = next(each for each in self.populations if each["name"] == population).get("payload")
        return found

    def tensor(self, name: str | None) -> NDArray[Any]:
        """A tensor by name; 0 where there is none."""
        return np.zeros((), np.int32) if name is None else self.tensors[name]

    def golden(self, population: str) -> NDArray[Any]:
        """Spikes `[T, samples, ...]` that were recorded of a population; of the readout, its states."""
        return self.tensors[f"golden.{population}"]

    @property
    def samples(self) -> int:
        """Samples with golden spikes."""
        return int(self.golden(self.populations[0]["name"]).shape[1])
