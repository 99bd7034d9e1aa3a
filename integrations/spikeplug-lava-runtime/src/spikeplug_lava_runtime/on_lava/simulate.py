"""Builds an integer network of Lava Processes and runs it on the CPU simulator."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spikeplug_lava_runtime.format import WEIGHT_LIMIT, Bundle
from spikeplug_lava_runtime.interpreter import Result
from spikeplug_lava_runtime.schedule import Schedule
from spikeplug_lava_runtime.synapses import matrix

Array = Any

MESSAGE_BITS = {"css": 8, "rate": 8, "phase": 16, "bse": 0, "ttfs": 0}
"""Bits of a message; 0: a spike is a spike, whatever it carries."""


def run_on_lava(bundle: Bundle, spikes: Array, *, message_bits: int | None = None, shift: int = 0) -> Result:
    """Run a network on the spikes `[T, B, ...]` of its input, samples one after the other time-stepped.

    Args:
        message_bits, shift: to see that a wrong one is found: other bits of messages than the code needs, and steps
            that neurons start late.

    Raises:
        ImportError: Lava is not installed; it needs Python 3.10.
    """
    try:
        from lava.magma.core.run_conditions import RunSteps
        from lava.magma.core.run_configs import Loihi2SimCfg
    except ImportError as error:
        raise ImportError(
            f"Lava is not installed ({error}): in Python 3.10, pip install 'spikeplug-lava-runtime[lava]'"
        ) from None
    schedule = Schedule(bundle)
    samples = spikes.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        built = _build(bundle, schedule, spikes, Path(folder), message_bits, shift)
        last = built[bundle.populations[-1]["name"]]
        try:
            last.run(
                condition=RunSteps(num_steps=schedule.length(samples)), run_cfg=Loihi2SimCfg(select_tag="fixed_pt")
            )
            peaks = {each["name"]: int(built[each["name"]].peak.get()[0]) for each in bundle.populations[1:]}
        finally:
            last.stop()
        recorded = {
            each["name"]: np.load(Path(folder) / f"{index}.npy")
            for index, each in enumerate(bundle.populations)
            if index
        }
    fired = {bundle.populations[0]["name"]: spikes.astype(np.int8)}
    for population in bundle.populations[1:-1]:
        name, shape = population["name"], population["shape"]
        sent = schedule.windows(recorded[name], schedule.emits[name], samples).reshape(bundle.steps, samples, *shape)
        payload = bundle.payload(name)
        fired[name] = (np.sign(sent) if payload is not None else sent).astype(np.int8)
    population = bundle.populations[-1]
    name = population["name"]
    ends = [schedule.starts[name] + sample * schedule.period + bundle.steps - 1 for sample in range(samples)]
    readout = recorded[name][ends].astype(np.int64).reshape(samples, *population["shape"])
    return Result(readout, readout * bundle.tensor(population["scale"]).astype(np.float64), fired, peaks)


def _build(
    bundle: Bundle, schedule: Schedule, spikes: Array, folder: Path, message_bits: int | None, shift: int
) -> dict[str, Any]:
    """Processes by population, connected."""
    from lava.proc.io.source import RingBuffer
    from lava.proc.sparse.process import Sparse

    from spikeplug_lava_runtime.on_lava.processes import PROCESSES, Delay, Recorder

    bits = MESSAGE_BITS[bundle.code] if message_bits is None else message_bits
    length = schedule.length(spikes.shape[1])
    built: dict[str, Any] = {}
    for index, population in enumerate(bundle.populations):
        name, size = population["name"], math.prod(population["shape"])
        if index == 0:
            built[name] = RingBuffer(data=schedule.laid_out(spikes, bundle.payload(name), length).T)
            continue
        options = _options(bundle, population, size)
        built[name] = PROCESSES[bundle.code](
            size=size, start=schedule.starts[name] + shift, steps=bundle.steps, period=schedule.period, **options
        )
        for edge in population["edges"]:
            source = built[edge["from"]]
            wait = schedule.starts[name] - schedule.emits[edge["from"]] - 1
            if wait:
                delay = Delay(size=source.s_out.shape[0], steps=wait)
                source.s_out.connect(delay.a_in)
                source = delay
            weights = matrix(bundle, edge)
            while weights.nnz:
                # What several paths add up to may be more than one synapse holds.
                part = weights.copy()
                part.data = np.clip(part.data, -WEIGHT_LIMIT, WEIGHT_LIMIT)
                # Lava clears the lowest bit of weights of mixed sign: twice the weights, and half of their sum.
                synapses = Sparse(weights=2 * part, weight_exp=-1, num_message_bits=bits)
                source.s_out.connect(synapses.s_in)
                synapses.a_out.connect(built[name].a_in)
                weights = weights - part
                weights.eliminate_zeros()
        recorder = Recorder(size=size, steps=length, path=str(folder / f"{index}.npy"))
        built[name].s_out.connect(recorder.a_in)
    return built


def _options(bundle: Bundle, population: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Arguments of a population's Process."""
    shape, code, steps = tuple(population["shape"]), bundle.code, bundle.steps

    def spread(key: str, *ahead: int) -> Array:
        array = bundle.tensor(population.get(key))
        return np.broadcast_to(array, (*ahead, *shape)).reshape(*ahead, size).astype(np.int32)

    found: dict[str, Any] = {"readout": population["kind"] == "readout", "bias": spread("bias")}
    if code == "css":
        silent = bundle.graph["silent"]
        found |= {"beta": bundle.graph["beta"], "silent": silent, "fraction": population["fraction"]}
        found |= {"rectify": population.get("rectify", False), "negative": population.get("negative", True)}
        clipped = population.get("ceiling") is not None
        found |= {"clipped": clipped, "threshold": spread("threshold")}
        found["ceiling"] = spread("ceiling", steps) if clipped else np.zeros((1, size), np.int32)
    elif code == "phase":
        found |= {"rectify": population.get("rectify", False), "ceiling": spread("ceiling")}
        found |= {"threshold": spread("threshold", steps), "reset": spread("reset", steps)}
        found["payload"] = np.array(population.get("payload") or [1] * steps, np.int32)
    else:
        found["threshold"] = spread("threshold")
        if code == "rate":
            found["rectify"] = population.get("rectify", False)
    return found
