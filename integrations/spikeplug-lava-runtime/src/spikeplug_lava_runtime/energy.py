"""An estimate of energy: recorded spikes replayed in SANA-FE on its model of Loihi 1. An estimate, and of another chip.

SANA-FE has no neurons of ours and no signed or graded spikes, so what is simulated is where spikes go and what their
events cost. Every neuron of ours is two of its own: one that takes the spikes in, is updated in every step and
never fires; and one that fires the recorded spikes, and is charged for them what Loihi charges.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from spikeplug_lava_runtime.format import Bundle, FormatError
from spikeplug_lava_runtime.interpreter import run
from spikeplug_lava_runtime.schedule import Schedule
from spikeplug_lava_runtime.synapses import matrix

ASSUMPTIONS = (
    "SANA-FE's model of Loihi 1 (constants of Davies et al., 2018), not Loihi 2; spikes replayed; a spike of -1 and a "
    "graded one cost as one of 1; each neuron one update of a leaky integrate-and-fire neuron a step, without the "
    "second state and the shifts of ours; no static power; nothing was measured on a chip"
)
OUT_OF_REACH = 1e9
"""Threshold that no sum of synapses reaches."""


def replay(bundle: Bundle, samples: int = 4) -> dict[str, Any]:
    """Energy, time and events per sample, of the golden samples of a file.

    Returns:
        `energy_j` by part, `time_s`, `events`: `spikes`, `synaptic`: those counted of our own spikes, which SANA-FE's
        are checked to equal; `assumptions`.

    Raises:
        FormatError: the file has no golden spikes.
        ValueError: the network does not fit SANA-FE's model of a chip.
        ImportError: SANA-FE is not installed.
    """
    sanafe = _sanafe()
    spikes = _golden(bundle, samples)
    fired, schedule = run(bundle, spikes).spikes, Schedule(bundle)
    count, length = spikes.shape[1], schedule.length(spikes.shape[1])
    arch, network, events = _architecture(sanafe), sanafe.Network(), 0
    cores = _Cores(arch)
    receiving: dict[str, Any] = {}
    emitting: dict[str, Any] = {}
    for population in bundle.populations:
        name, size = population["name"], math.prod(population["shape"])
        of_input = population["kind"] == "input"
        if not of_input:
            options = {"threshold": OUT_OF_REACH, "leak_decay": 1.0, "force_update": True}
            receiving[name] = network.create_neuron_group(
                f"{name}-in", size, options, default_synapse_hw_name="loihi_sparse_synapse", soma_hw_name="loihi_lif"
            )
        if population["kind"] != "readout":
            emitting[name] = network.create_neuron_group(f"{name}-out", size)
            trains = schedule.trains(fired[name], name, length)
            for neuron, train in enumerate(trains.T.tolist()):
                emitting[name][neuron].set_attributes(model_attributes={"spikes": train})
        cores.place(receiving.get(name), emitting.get(name), size, OUTSIDE if of_input else EMITTER)
        for edge in population["edges"]:
            weights = matrix(bundle, edge).tocoo()
            events += _connect(emitting[edge["from"]], receiving[name], weights, fired[edge["from"]])
    chip = sanafe.SpikingChip(arch)
    chip.load(network)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its progress; stdout is for results
        found = chip.sim(length)
    total = sum(int(np.abs(each.astype(np.int64)).sum()) for each in fired.values())
    return {
        "samples": count,
        "energy_j": {name: float(value) / count for name, value in found["energy"].items()},
        "time_s": float(found["sim_time"]) / count,
        "events": {"spikes": total / count, "synaptic": events / count},
        "simulated": {"spikes": int(found["neurons_fired"]) / count, "synaptic": int(found["spikes"]) / count},
        "assumptions": ASSUMPTIONS,
    }


def _connect(source: Any, target: Any, weights: Any, fired: np.ndarray) -> int:
    """Connect two groups by a sparse matrix; the synaptic events of the spikes `[T, B, ...]` of the source."""
    pairs = list(zip(weights.col.tolist(), weights.row.tolist(), strict=True))
    source.connect_neurons_sparse(target, {"weight": [1.0] * len(pairs)}, pairs)
    sent = np.abs(fired.astype(np.int64)).sum((0, 1)).reshape(-1)
    return int((sent * np.bincount(weights.col, minlength=len(sent))).sum())


def _golden(bundle: Bundle, samples: int) -> np.ndarray:
    """Golden spikes of the input `[T, B, ...]`, of so many samples at the most."""
    first = bundle.populations[0]["name"]
    if f"golden.{first}" not in bundle.tensors:
        raise FormatError("there are no golden spikes to replay: export with -s golden=4")
    return bundle.golden(first)[:, :samples]


OUTSIDE, EMITTER = "loihi_inputs", "emitters"
"""Units that fire recorded spikes: of the input, which come from outside and cost nothing; and of neurons."""


class _Cores:
    """Puts neurons on cores in order, receivers and emitters of a neuron together, as many as a core holds."""

    def __init__(self, arch: Any) -> None:
        self.cores = [core for tile in arch.tiles for core in tile.cores]
        self.at, self.used = 0, 0

    def place(self, receiving: Any, emitting: Any, size: int, unit: str) -> None:
        """Raises ValueError where the chip is full."""
        groups = [group for group in (receiving, emitting) if group is not None]
        for neuron in range(size):
            if self.used + len(groups) > PER_CORE:
                self.at, self.used = self.at + 1, 0
            if self.at >= len(self.cores):
                raise ValueError(
                    f"more than {len(self.cores)} cores of {PER_CORE} neurons are needed, SANA-FE's chip is full"
                )
            for group in groups:
                if group is emitting:
                    group[neuron].set_attributes(soma_hw_name=f"{unit}[{self.used}]")
                group[neuron].map_to_core(self.cores[self.at])
                self.used += 1


PER_CORE = 1024


def _sanafe() -> Any:
    try:
        import sanafe
    except ImportError as error:
        raise ImportError(f"SANA-FE is not installed ({error}): pip install 'spikeplug-lava-runtime[sanafe]'") from None
    return sanafe


def _architecture(sanafe: Any) -> Any:
    """SANA-FE's Loihi, with units that fire recorded spikes at the cost of its neurons' spikes."""
    text = (Path(sanafe.__file__).parent / "examples" / "loihi.yaml").read_text()
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if "name: loihi_inputs[" in line)
    end = next(index for index in range(start + 1, len(lines)) if lines[index].strip() == "dendrite:")
    neuron = next(index for index, line in enumerate(lines) if "name: loihi_lif" in line)
    costs = {
        key: next(line.partition(":")[2] for line in lines[neuron:] if f"{key}:" in line)
        for key in ("energy_spike_out", "latency_spike_out")
    }
    copied = [line.replace("loihi_inputs[", f"{EMITTER}[") for line in lines[start:end]]
    for index, line in enumerate(copied):
        key = line.strip().partition(":")[0]
        if key in costs:
            copied[index] = f"{line.partition(':')[0]}:{costs[key]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loihi.yaml"
        path.write_text("\n".join([*lines[:end], *copied, *lines[end:]]) + "\n")
        return sanafe.load_arch(str(path))
