"""An integer network in PyTorch: the same numbers as the interpreter's, whole windows at a time and on any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeplug import CodeParams, get_encoder
from spikeplug.errors import ConversionError, OptionError
from spikeplug_lava_runtime import Bundle, FormatError, load

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class IntegerNetwork(nn.Module):
    """What an exported file computes, before it is exported or from the file: images in, logits out.

    Sums are computed in float32 where none can reach 2^24, else in float64, so all of them are exact. Codes whose
    windows are taken in whole have closed forms; ternary neurons step.

    Args:
        bundle: the network.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.bundle = bundle
        for name, array in bundle.tensors.items():
            if not name.startswith("golden."):
                self.register_buffer(_key(name), torch.from_numpy(array.copy()), persistent=False)
        self._wide: dict[str, bool] = {}

    @classmethod
    def load(cls, path: Any) -> IntegerNetwork:
        """Read a file. Raises ConversionError where it is none."""
        try:
            return cls(load(path))
        except (FormatError, OSError) as error:
            raise ConversionError(str(error)) from error

    def encode(self, x: Tensor) -> Tensor:
        """Spikes `[T, B, ...]`, int8, of a batch, by the code of the network's input."""
        described = self.bundle.graph["input"]
        p = CodeParams.from_tensors({name: self.tensor(f"input.{name}") for name in described["params"]})
        spikes: Tensor = get_encoder(described["encoder"], **described["options"]).encode(x, p)
        return spikes.to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, ...]`, float64, in the dense network's units, of a batch `[B, ...]`."""
        return self.logits(self.fire(self.encode(x))[1])

    def logits(self, readout: Tensor) -> Tensor:
        """States of the readout in the dense network's units."""
        return readout * self.tensor(self.bundle.populations[-1]["scale"]).double()

    def fire(self, spikes: Tensor, peaks: dict[str, int] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Spikes int8 `[T, B, ...]` of every population, and states of the readout int64 `[B, ...]`, for input spikes.

        Args:
            peaks: gets the largest magnitude of a state of every population, where that is larger than what it has;
                states are then computed step by step, which takes longer.

        Raises:
            OptionError: spikes are not of the input's shape.
        """
        populations = self.bundle.populations
        shape = tuple(populations[0]["shape"])
        if spikes.shape[:1] != (self.bundle.steps,) or tuple(spikes.shape[2:]) != shape:
            wanted = f"T = {self.bundle.steps} steps of {list(shape)}"
            raise OptionError(f"spikes of shape {list(spikes.shape)}: {wanted} are needed")
        fired = {populations[0]["name"]: spikes}
        for population in populations[1:]:
            found, peak = self.step_in(population, fired, watched=peaks is not None)
            name = population["name"]
            if peaks is not None:
                peaks[name] = max(peaks.get(name, 0), int(peak.max()))
            if population["kind"] == "readout":
                return fired, found
            fired[name] = found
        raise AssertionError("a network without a readout is no bundle")

    def step_in(
        self, population: Mapping[str, Any], fired: Mapping[str, Tensor], watched: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Spikes of one population, or the states of the readout; and the largest magnitude of its states by channel.

        The second is 0 unless watched.
        """
        readout = population["kind"] == "readout"
        if self.bundle.code == "css":
            z = self.currents(population, fired)
            scan = TernaryScan(self, population, z[0])
            spikes = list(scan.run(z, watched, readout))
            return (scan.h if readout else torch.stack(spikes)), scan.peak
        v, peak = self._taken_in(population, fired, watched)
        return (v if readout else self.emitted(population, v)), peak

    def _taken_in(
        self, population: Mapping[str, Any], fired: Mapping[str, Tensor], watched: bool
    ) -> tuple[Tensor, Tensor]:
        """Potential after a window `[B, ...]`, and the largest magnitude of a state by channel."""
        bias = self.parameter(population, "bias")
        if not watched:
            return self.received(population, fired) + bias, torch.zeros(1)
        z, code, steps = self.currents(population, fired), self.bundle.code, self.bundle.steps
        a, i, peak = torch.zeros_like(z[0]), torch.zeros_like(z[0]), torch.zeros_like(z[0])
        for current in z[: steps - 1] if code == "ttfs" else z:
            if code == "ttfs":
                i = i + current
                a = a + i
                peak = torch.maximum(peak, i.abs())
            else:
                a = (a << 1) + current if code == "bse" else a + current
            peak = torch.maximum(peak, a.abs())
        v = a + bias
        largest = by_channel(torch.maximum(peak, v.abs()))
        if population["kind"] != "readout":
            # What the emitting potential is compared with, or grows to, whatever comes in.
            key, times = emission(code, steps)
            least = (self.parameter(population, key) * times).expand(v.shape[1:]).unsqueeze(0)
            largest = torch.maximum(largest, by_channel(least))
        return v, largest

    def currents(self, population: Mapping[str, Any], fired: Mapping[str, Tensor]) -> Tensor:
        """Currents of every step `[T, B, ...]`, int64."""
        steps = self.bundle.steps
        total: Any = 0
        for edge in population["edges"]:
            s, payload = fired[edge["from"]], self.bundle.payload(edge["from"])
            if payload is not None:
                s = s * torch.tensor(payload, device=s.device).reshape(-1, *[1] * (s.ndim - 1))
            out = self._through(edge, s.flatten(0, 1), max(payload or [1]))
            total = total + out.reshape(steps, -1, *out.shape[1:])
        result: Tensor = total
        return result

    def received(self, population: Mapping[str, Any], fired: Mapping[str, Tensor]) -> Tensor:
        """State after a window of input, without the bias, int64 `[B, ...]`: the code's value of the spikes, once."""
        total: Any = 0
        for edge in population["edges"]:
            s, worth = fired[edge["from"]], worths(self.bundle, edge["from"])
            d = torch.tensor(worth, dtype=torch.float64, device=s.device)
            total = total + self._through(edge, torch.tensordot(d, s.double(), dims=1), sum(worth))
        result: Tensor = total
        return result

    def _through(self, edge: Mapping[str, Any], x: Tensor, largest: int) -> Tensor:
        """A batch through the operations of an edge, int64."""
        # Elsewhere than on a CPU a float32 convolution may go by faster, inexact ways.
        dtype = torch.float64 if x.device.type != "cpu" or self._is_wide(edge, largest) else torch.float32
        x = x.to(dtype)
        for op in edge["ops"]:
            x = self._linear(op, x)
        return x.to(torch.int64)

    def _is_wide(self, edge: Mapping[str, Any], largest: int) -> bool:
        """Whether a partial sum may reach 2^24, for values up to `largest`."""
        key = f"{edge}{largest}"
        if key not in self._wide:
            bound = largest
            for op in edge["ops"]:
                if op["op"] == "sum_pool":
                    bound *= int(torch.tensor(op["kernel"]).prod())
                elif "weight" in op:
                    w = self.tensor(op["weight"])
                    bound *= int(w.abs().to(torch.int64).flatten(1).sum(1).max()) if w.ndim > 1 else int(w.abs().max())
            self._wide[key] = bound >= 2**24
        return self._wide[key]

    def _linear(self, op: Mapping[str, Any], x: Tensor) -> Tensor:
        if "weight" not in op:
            return unweighted(op, x, self.tensor(op["index"]) if "index" in op else None)
        weight = self.tensor(op["weight"]).to(x.dtype)
        if op["op"] == "scale":
            return x * weight.reshape(-1, *[1] * (x.ndim - 2))
        if op["op"] == "linear":
            return F.linear(x, weight)
        conv: Tensor = CONVOLUTIONS[weight.ndim - 2](
            x, weight, None, op["stride"], op["padding"], op["dilation"], op["groups"]
        )
        return conv

    def emitted(self, population: Mapping[str, Any], v: Tensor) -> Tensor:
        """Spikes `[T, B, ...]` of potentials after a window of input."""
        theta, steps, code = self.parameter(population, "threshold"), self.bundle.steps, self.bundle.code
        t = torch.arange(steps, device=v.device).reshape(-1, *[1] * v.ndim)
        if code == "bse":
            q = torch.div(v, theta, rounding_mode="floor").clamp(0, 2**steps - 1)
            return ((q >> (steps - 1 - t)) & 1).to(torch.int8)
        if code == "ttfs":
            q = torch.div(v, theta, rounding_mode="floor").clamp(0, steps - 1)
            return ((q == steps - 1 - t) & (q > 0)).to(torch.int8)
        sign = torch.sign(v.clamp(min=0) if population.get("rectify", False) else v)
        if code == "rate":
            current = torch.minimum(v.abs() + (theta >> 1), steps * theta)
            after = torch.arange(steps + 1, device=v.device).reshape(-1, *t.shape[1:])
            fired = torch.div(after * current, steps * theta, rounding_mode="floor")
            return (fired.diff(dim=0) * sign).to(torch.int8)
        v = torch.minimum(v.abs(), self.parameter(population, "ceiling"))
        reset, spikes = self.parameter(population, "reset"), []
        for step in range(steps):
            s = v >= theta[step]
            v = v - reset[step] * s
            spikes.append((s * sign).to(torch.int8))
        return torch.stack(spikes)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the bundle."""
        found: Tensor = self.get_buffer(_key(name))
        return found

    def parameter(self, population: Mapping[str, Any], key: str) -> Tensor:
        """A parameter of neurons, int64; 0 where there is none."""
        name = population.get(key)
        return torch.zeros((), dtype=torch.int64) if name is None else self.tensor(name).to(torch.int64)


def unweighted(op: Mapping[str, Any], x: Tensor, index: Tensor | None) -> Tensor:
    """An operation without weights on a batch `[B, ...]`.

    Args:
        index: of a gather.
    """
    if op["op"] == "reshape":
        return x.reshape(len(x), *op["shape"])
    if op["op"] == "gather":
        assert index is not None
        return F.pad(x.flatten(1), (1, 0))[:, index.flatten()].reshape(len(x), *op["shape"])
    # An average times the size of its window is rounded; a sum by convolution is not.
    ones = torch.ones(x.shape[1], 1, *op["kernel"], dtype=x.dtype, device=x.device)
    pooled: Tensor = CONVOLUTIONS[len(op["kernel"])](x, ones, None, op["stride"], op["padding"], 1, x.shape[1])
    return pooled


class TernaryScan:
    """State of ternary neurons, int64 `[B, ...]`: see `spikeplug_lava_runtime.interpreter.Ternary`.

    Attributes:
        peak: largest magnitude of a state by channel `[C]`, where it is watched.
    """

    def __init__(self, network: IntegerNetwork, population: Mapping[str, Any], like: Tensor) -> None:
        self.beta, self.silent = network.bundle.graph["beta"], network.bundle.graph["silent"]
        self.fraction = population["fraction"]
        self.rectify, self.negative = population.get("rectify", False), population.get("negative", True)
        self.bias, self.v = network.parameter(population, "bias"), network.parameter(population, "threshold")
        self.ceiling = None if population.get("ceiling") is None else network.parameter(population, "ceiling")
        self.h, self.g = torch.zeros_like(like), torch.zeros_like(like)
        self.peak = torch.zeros(1, dtype=torch.int64, device=like.device)

    def amplified(self, m: Tensor) -> Tensor:
        """`β m`, rounded down."""
        return m << 1 if self.beta == "2" else m + (m >> 1)

    def run(self, z: Tensor, watched: bool, readout: bool) -> Iterator[Tensor]:
        """Spikes int8 `[B, ...]` of the T steps of a window of currents; a readout has none."""
        for step in range(len(z) + (0 if readout else self.silent)):
            self.h, self.g = self.amplified(self.h), self.amplified(self.g)
            if step < len(z):
                self.h = self.h + (z[step] << self.fraction) + self.bias
            if watched:
                self.keep(self.h, self.g)
            if step >= self.silent and not readout:
                yield self._fire(step, watched)

    def _fire(self, step: int, watched: bool) -> Tensor:
        o = self.h.clamp(min=0) if self.rectify else self.h
        o = o if self.ceiling is None else torch.minimum(o, self.ceiling[step - self.silent])
        o = o - self.g
        s = (o >= self.v).long() - (o <= -self.v).long() if self.negative else (o >= 2 * self.v).long()
        if self.rectify:
            self.g = self.g + 2 * self.v * s
        else:
            self.h = self.h - 2 * self.v * s
        if watched:
            self.keep(self.h, self.g, o)
        return s.to(torch.int8)

    def keep(self, *states: Tensor) -> None:
        """Remember the largest magnitudes of states."""
        for state in states:
            self.peak = torch.maximum(self.peak, by_channel(state.abs()))


def by_channel(x: Tensor) -> Tensor:
    """The largest value of every channel `[C]` of `[B, C, ...]`."""
    return x.transpose(0, 1).flatten(1).amax(1)


def emission(code: str, steps: int) -> tuple[str, int]:
    """Of a code that takes windows in: the parameter by which its emitting potential is bounded, and how many times."""
    return {
        "bse": ("threshold", 2 ** (steps - 1)),
        "ttfs": ("threshold", steps - 1),
        "rate": ("threshold", 2 * steps),
        "phase": ("ceiling", 1),
    }[code]


def worths(bundle: Bundle, source: str) -> list[int]:
    """What a population's spike of every step adds to a state that takes a window in."""
    steps = bundle.steps
    if bundle.code == "bse":
        return [2 ** (steps - 1 - t) for t in range(steps)]
    if bundle.code == "ttfs":
        return [steps - 1 - t for t in range(steps)]
    return bundle.payload(source) or [1] * steps


def _key(name: str) -> str:
    return name.replace(".", "/")
