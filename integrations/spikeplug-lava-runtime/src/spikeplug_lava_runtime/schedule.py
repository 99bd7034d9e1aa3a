"""When what happens: the clock of a network on a chip or a simulator, where a spike takes one step to arrive."""

from __future__ import annotations

from typing import Any

import numpy as np

from spikeplug_lava_runtime.format import Bundle

Array = Any


class Schedule:
    """Steps, counted from 0, of the first sample.

    A ternary population emits L steps after its first current; one that takes windows in emits from the step of the
    last current of a window on. Samples follow each other: without a gap where windows are taken in, else with L silent
    steps between them.

    Attributes:
        starts: of every population the step of its first current. Spikes of a shorter path wait until then.
        emits: of every population the step of its first spike.
        period: steps from one sample to the next.
    """

    def __init__(self, bundle: Bundle) -> None:
        ternary = bundle.code == "css"
        self.steps = bundle.steps
        latency = int(bundle.graph["silent"]) if ternary else bundle.steps - 1
        self.period = bundle.steps + latency if ternary else bundle.steps
        self.starts: dict[str, int] = {}
        self.emits: dict[str, int] = {}
        for population in bundle.populations:
            name = population["name"]
            self.starts[name] = max((self.emits[edge["from"]] + 1 for edge in population["edges"]), default=0)
            self.emits[name] = self.starts[name] + (latency if population["edges"] else 0)
        self.last = self.starts[bundle.populations[-1]["name"]] + bundle.steps

    def length(self, samples: int) -> int:
        """Steps until the last of so many samples is read out."""
        return self.last + (samples - 1) * self.period

    def laid_out(self, spikes: Array, payload: list[int] | None, length: int) -> Array:
        """Spikes `[T, B, ...]` of the input in time steps, with their payload, int32 `[length, N]`."""
        steps, samples = spikes.shape[:2]
        flat = spikes.reshape(steps, samples, -1).astype(np.int32)
        if payload is not None:
            flat = flat * np.array(payload, np.int32).reshape(-1, 1, 1)
        out = np.zeros((length, flat.shape[2]), np.int32)
        for sample in range(samples):
            at = sample * self.period
            out[at : at + steps] = flat[:, sample]
        return out

    def trains(self, fired: Array, name: str, length: int) -> Array:
        """When each neuron of a population that fired `[T, B, ...]` spikes in time steps, bool `[length, N]`."""
        steps, samples = fired.shape[:2]
        flat = fired.reshape(steps, samples, -1) != 0
        out = np.zeros((length, flat.shape[2]), bool)
        for sample in range(samples):
            part = out[self.emits[name] + sample * self.period :][:steps]
            part[:] = flat[: len(part), sample]
        return out

    def windows(self, recorded: Array, emits: int, samples: int) -> Array:
        """What a population sent, `[length, N]`, as windows `[T, B, N]`; what it did not send in time is 0."""
        out = np.zeros((self.steps, samples, recorded.shape[1]), recorded.dtype)
        for sample in range(samples):
            part = recorded[emits + sample * self.period :][: self.steps]
            out[: len(part), sample] = part
        return out
