"""The rules of an integer network in numpy, step by step: the meaning of the format, in the plainest code.

Every number is a whole one. Sums of synapses are computed in float64, in which whole numbers below 2^53 are exact;
what neurons do is int64, whose right shift rounds down, as a chip's does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from spikeplug_lava_runtime.check import shape_after
from spikeplug_lava_runtime.format import STATE_LIMIT, Bundle

Array = Any
"""A numpy array."""

CHUNK = 2**24
"""Values of unfolded windows that a convolution makes at a time."""


@dataclass
class Result:
    """What a network did with a batch.

    Attributes:
        readout: states of the readout, int64 `[B, ...]`.
        logits: the same in the units of the dense network, float64.
        spikes: of every population, int8 `[T, B, ...]`.
        peaks: of every population but the input, the largest magnitude of a state.
    """

    readout: Array
    logits: Array
    spikes: dict[str, Array]
    peaks: dict[str, int]

    @property
    def overflowing(self) -> list[str]:
        """Populations whose states did not fit 24 bits."""
        return [name for name, peak in self.peaks.items() if peak > STATE_LIMIT]


def run(bundle: Bundle, spikes: Array) -> Result:
    """Run a network on the spikes of its input.

    Args:
        spikes: int8 `[T, B, ...]`, -1, 0 or 1.

    Raises:
        ValueError: they are not of the input's shape.
    """
    shape = tuple(bundle.populations[0]["shape"])
    if spikes.shape[:1] != (bundle.steps,) or spikes.shape[2:] != shape:
        raise ValueError(
            f"spikes of shape {list(spikes.shape)}: [{bundle.steps}, samples, {str(list(shape))[1:]} wanted"
        )
    fired: dict[str, Array] = {}
    peaks: dict[str, int] = {}
    for population in bundle.populations:
        name = population["name"]
        if population["kind"] == "input":
            fired[name] = spikes.astype(np.int8)
            continue
        neuron = neuron_of(bundle, population, (spikes.shape[1], *population["shape"]))
        out = np.zeros((bundle.steps, *neuron.shape), np.int8)
        for step, s in enumerate(
            neuron.steps(currents(bundle, population, fired, step) for step in range(bundle.steps))
        ):
            out[step] = s
        peaks[name] = neuron.peak
        fired[name] = out
    readout = neuron.result()
    fired.pop(name)
    return Result(readout, readout * bundle.tensor(population["scale"]).astype(np.float64), fired, peaks)


def currents(bundle: Bundle, population: Mapping[str, Any], fired: Mapping[str, Array], step: int) -> Array:
    """What the synapses of a population add up to in a step, int64 `[B, ...]`: spikes times payload times weights."""
    total: Array | int = 0
    for edge in population["edges"]:
        x = fired[edge["from"]][step].astype(np.float64)
        payload = bundle.payload(edge["from"])
        if payload is not None:
            x *= payload[step]
        for op in edge["ops"]:
            x = linear(op, x, bundle.tensors)
        total = total + x.astype(np.int64)
    assert isinstance(total, np.ndarray)
    return total


def linear(op: Mapping[str, Any], x: Array, tensors: Mapping[str, Array]) -> Array:
    """One linear operation on a batch `[B, ...]` of whole numbers in float64."""
    kind, batch = op["op"], len(x)
    shape = (batch, *shape_after(op, x.shape[1:], tensors))
    if kind == "linear":
        return x @ tensors[op["weight"]].astype(np.float64).T
    if kind == "scale":
        return x * tensors[op["weight"]].reshape(-1, *[1] * (x.ndim - 2))
    if kind == "reshape":
        return x.reshape(shape)
    if kind == "gather":
        # Index 0 is a zero; 1 is the first value.
        flat = np.concatenate([np.zeros((batch, 1)), x.reshape(batch, -1)], axis=1)
        return flat[:, tensors[op["index"]].reshape(-1)].reshape(shape)
    if kind == "sum_pool":
        return _windows(x, op["kernel"], op["stride"], op["padding"], [1] * len(op["kernel"])).sum(
            axis=tuple(range(-len(op["kernel"]), 0))
        )
    weight = tensors[op["weight"]].astype(np.float64)
    part = max(1, CHUNK // max(1, math.prod(shape[2:]) * math.prod(weight.shape[1:]) * op["groups"]))
    return np.concatenate([_conv(op, x[at : at + part], weight) for at in range(0, batch, part)])


def _conv(op: Mapping[str, Any], x: Array, weight: Array) -> Array:
    windows = _windows(x, weight.shape[2:], op["stride"], op["padding"], op["dilation"])
    groups, dims = op["groups"], weight.ndim - 2
    out = []
    for x_part, w_part in zip(np.split(windows, groups, axis=1), np.split(weight, groups), strict=True):
        axes = [1, *range(2 + dims, 2 + 2 * dims)]
        found = np.tensordot(x_part, w_part, (axes, list(range(1, 2 + dims))))  # [B, places..., out]
        out.append(np.moveaxis(found, -1, 1))
    return np.concatenate(out, axis=1)


def _windows(x: Array, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Array:
    """`[B, C, places..., kernel...]`, a view of the padded input."""
    x = np.pad(x, [(0, 0), (0, 0), *((pad, pad) for pad in padding)])
    dims = len(kernel)
    wide = tuple((size - 1) * by + 1 for size, by in zip(kernel, dilation, strict=True))
    view = sliding_window_view(x, wide, axis=tuple(range(2, 2 + dims)))
    steps = (slice(None), slice(None), *(slice(None, None, each) for each in (*stride, *dilation)))
    return view[steps]


class Neurons:
    """Neurons of one population, for a batch. A subclass says what one step does.

    Attributes:
        silent: steps from the first current in to the first spike out.
        peak: largest magnitude that a state had.
    """

    silent = 0

    def __init__(self, bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self.shape, self.length = shape, bundle.steps
        self.bias = bundle.tensor(population.get("bias")).astype(np.int64)
        self.readout = population["kind"] == "readout"
        self.peak = 0

    def table(self, bundle: Bundle, population: Mapping[str, Any], key: str) -> Array:
        """A parameter of neurons that fire, int64; of the readout, 0."""
        name = population.get(key)
        return np.zeros((), np.int64) if name is None else bundle.tensor(name).astype(np.int64)

    def receive(self, step: int, z: Array) -> None:
        """Take the current of a step in."""
        raise NotImplementedError

    def emit(self, step: int) -> Array:
        """Spikes of a step; those of a window are asked for in order."""
        raise NotImplementedError

    def result(self) -> Array:
        """What a readout holds after its window."""
        raise NotImplementedError

    def steps(self, currents: Iterator[Array]) -> Iterator[Array]:
        """Spikes of a window of currents, step by step; of a readout none."""
        for step, z in enumerate(currents):
            self.receive(step, z)
        if not self.readout:
            for step in range(self.length):
                yield self.emit(step)

    def keep(self, *states: Array) -> None:
        """Remember the largest magnitude of states."""
        for state in states:
            self.peak = max(self.peak, int(np.abs(state).max(initial=0)))


def amplified(m: Array, beta: str) -> Array:
    """`β m`, rounded down: `m + (m >> 1)`, or `m << 1`."""
    return m << 1 if beta == "2" else m + (m >> 1)


class Ternary(Neurons):
    """TSA and, where it is rectified, TSA-ReLU: `o = clip(h) - g`, spikes of ±1 where `|o| >= v`, then `g += 2 v s`.

    Unrectified it keeps one state `h - g`. Without negative spikes it fires from 2 v on.
    """

    def __init__(self, bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__(bundle, population, shape)
        self.beta, self.silent, self.fraction = bundle.graph["beta"], bundle.graph["silent"], population["fraction"]
        self.rectify, self.negative = population.get("rectify", False), population.get("negative", True)
        self.v = self.table(bundle, population, "threshold")
        ceiling = population.get("ceiling")
        self.ceiling = None if ceiling is None else bundle.tensor(ceiling).astype(np.int64)
        self.h = np.zeros(shape, np.int64)
        self.g = np.zeros(shape, np.int64)

    def receive(self, step: int, z: Array) -> None:
        self.h = amplified(self.h, self.beta) + (z << self.fraction) + self.bias
        self.keep(self.h)

    def steps(self, currents: Iterator[Array]) -> Iterator[Array]:
        for step in range(self.length + (0 if self.readout else self.silent)):
            self.g = amplified(self.g, self.beta)
            self.keep(self.g)
            if step < self.length:
                self.receive(step, next(currents))
            else:
                self.h = amplified(self.h, self.beta)
            if step >= self.silent and not self.readout:
                yield self.emit(step)

    def emit(self, step: int) -> Array:
        o = np.maximum(self.h, 0) if self.rectify else self.h
        if self.ceiling is not None:
            o = np.minimum(o, self.ceiling[step - self.silent])
        o = o - self.g
        s = (o >= self.v).astype(np.int8) - (o <= -self.v) if self.negative else (o >= 2 * self.v).astype(np.int8)
        if self.rectify:
            self.g = self.g + 2 * self.v * s
        else:
            self.h = self.h - 2 * self.v * s
        self.keep(self.h, self.g, o)
        return s.astype(np.int8)

    def result(self) -> Array:
        return self.h


class Accumulating(Neurons):
    """Neurons that take a whole window in, and then emit another: state a, and what `start` makes of it."""

    def __init__(self, bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__(bundle, population, shape)
        self.threshold = self.table(bundle, population, "threshold")
        self.a = np.zeros(shape, np.int64)
        self.v = np.zeros(shape, np.int64)

    def emit(self, step: int) -> Array:
        if step == 0:
            self.v = self.a + self.bias
            self.keep(self.v)
            self.start()
        s = self.fire(step)
        self.keep(self.v)
        return s.astype(np.int8)

    def start(self) -> None:
        """Prepare the potential v for emission."""

    def fire(self, step: int) -> Array:
        """Spikes of a step of emission."""
        raise NotImplementedError

    def result(self) -> Array:
        total = self.a + self.bias
        self.keep(total)
        return total


class Bits(Accumulating):
    """BSE: `a = 2 a + z`; then bits, most significant first: fire where `v >= θ 2^(T-1-t)`, and subtract that."""

    def receive(self, step: int, z: Array) -> None:
        self.a = (self.a << 1) + z
        self.keep(self.a)

    def fire(self, step: int) -> Array:
        threshold = self.threshold << (self.length - 1 - step)
        s = self.v >= threshold
        self.v = self.v - threshold * s
        return s


class _Signed(Accumulating):
    def __init__(self, bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__(bundle, population, shape)
        self.rectify = population.get("rectify", False)
        self.sign = np.zeros(shape, np.int64)

    def receive(self, step: int, z: Array) -> None:
        self.a = self.a + z
        self.keep(self.a)

    def start(self) -> None:
        self.sign = np.sign(np.maximum(self.v, 0) if self.rectify else self.v)
        self.v = np.abs(self.v)


class Phases(_Signed):
    """Phase: `a += z`, where spikes carry the payload of their step; then sign and magnitude by tables of θ and h."""

    def __init__(self, bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__(bundle, population, shape)
        self.reset = self.table(bundle, population, "reset")
        self.ceiling = self.table(bundle, population, "ceiling")

    def start(self) -> None:
        super().start()
        self.v = np.minimum(self.v, self.ceiling)

    def fire(self, step: int) -> Array:
        s = self.v >= self.threshold[step]
        self.v = self.v - self.reset[step] * s
        return s * self.sign


class Rates(_Signed):
    """Rate: `a += z`; then a constant current `min(|a| + θ/2, T θ)` into a neuron of threshold `T θ`."""

    def start(self) -> None:
        super().start()
        full = self.length * self.threshold
        self.current, self.v = np.minimum(self.v + (self.threshold >> 1), full), np.zeros_like(self.v)

    def fire(self, step: int) -> Array:
        full = self.length * self.threshold
        self.v = self.v + self.current
        self.keep(self.v)
        s = self.v >= full
        self.v = self.v - full * s
        return s * self.sign


class FirstSpikes(Accumulating):
    """TTFS: `i += z; a += i`, so that a spike counts once for every step left; then a ramp of θ up to `(T-1) θ`."""

    def __init__(self, bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__(bundle, population, shape)
        self.i = np.zeros(shape, np.int64)
        self.fired = np.zeros(shape, bool)

    def receive(self, step: int, z: Array) -> None:
        if step < self.length - 1:
            self.i = self.i + z
            self.a = self.a + self.i
            self.keep(self.i, self.a)

    def fire(self, step: int) -> Array:
        last = self.length - 1
        s = (self.v >= last * self.threshold) & ~self.fired & (step < last)
        self.fired = self.fired | s
        # What has fired does nothing more; what has not is held at the threshold, which bounds the ramp.
        self.v = np.minimum(self.v + self.threshold, last * self.threshold)
        return s


NEURONS: dict[str, type[Neurons]] = {
    "css": Ternary,
    "bse": Bits,
    "phase": Phases,
    "ttfs": FirstSpikes,
    "rate": Rates,
}


def neuron_of(bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> Neurons:
    """Neurons of a population in the state before a window, for a batch of that shape."""
    return NEURONS[bundle.code](bundle, population, shape)
