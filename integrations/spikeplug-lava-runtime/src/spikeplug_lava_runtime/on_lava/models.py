"""Fixed-point models of the Processes for Lava's CPU simulator: one step of all neurons of a population, int32.

Lava's protocol sends in the same step in which it receives; the step from one population to the next is the synapses'.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from spikeplug_lava_runtime.on_lava.processes import Bits, Delay, FirstSpikes, Phases, Rates, Recorder, Ternary

Array = Any
# Wider than the 24 bits that it may have, so that a state beyond them is seen and does not wrap.
State = LavaPyType(np.ndarray, np.int64, precision=24)


class PopulationModel(PyLoihiProcessModel):
    """What all populations share: their place in time, and the largest state."""

    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    bias: Array = State
    peak: Array = LavaPyType(np.ndarray, np.int64, precision=32)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.first, self.steps = proc_params["start"], proc_params["steps"]
        self.period, self.readout = proc_params["period"], proc_params["readout"]
        self.rectify = proc_params.get("rectify", False)

    def run_spk(self) -> None:
        """One time step."""
        z = self.a_in.recv().astype(np.int64)
        now = self.time_step - 1 - self.first
        self.s_out.send(self.silence() if now < 0 else self.advance(now, z).astype(np.int32))

    def silence(self) -> Array:
        """What is sent before the first sample comes."""
        return np.zeros(self.bias.shape, np.int32)

    def advance(self, now: int, z: Array) -> Array:
        """A step, counted from the first current of the first sample; what is sent."""
        raise NotImplementedError

    def keep(self, *states: Array) -> None:
        """Remember the largest magnitude of states."""
        for state in states:
            self.peak[0] = max(int(self.peak[0]), int(np.abs(state).max()))


@implements(proc=Ternary, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class TernaryModel(PopulationModel):
    """`h = β h + (z << F) + b; o = clip(h) - g; s = ±1 where |o| >= v; g = β g + 2 v s`."""

    threshold: Array = State
    ceiling: Array = State
    h: Array = State
    g: Array = State

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.beta, self.silent, self.fraction = (proc_params[key] for key in ("beta", "silent", "fraction"))
        self.negative, self.clipped = proc_params["negative"], proc_params["clipped"]

    def advance(self, now: int, z: Array) -> Array:
        n = now % self.period
        if n == 0:
            self.h[:], self.g[:] = 0, 0
        if self.readout and n >= self.steps:
            return self.h
        for state in (self.h, self.g):
            state += state if self.beta == "2" else state >> 1
        if n < self.steps:
            self.h += (z << self.fraction) + self.bias
        self.keep(self.h, self.g)
        if self.readout:
            return self.h
        if n < self.silent:
            return self.silence()
        o = np.maximum(self.h, 0) if self.rectify else self.h.copy()
        if self.clipped:
            o = np.minimum(o, self.ceiling[n - self.silent])
        o -= self.g
        low = self.threshold if self.negative else 2 * self.threshold
        s = (o >= low).astype(np.int32)
        if self.negative:
            s -= o <= -self.threshold
        taken = 2 * self.threshold * s
        if self.rectify:
            self.g += taken
        else:
            self.h -= taken
        self.keep(o, self.h, self.g)
        return s


class WindowModel(PopulationModel):
    """Takes a window in, and from the step of its last current on emits another, while the next one comes in."""

    a: Array = State

    def advance(self, now: int, z: Array) -> Array:
        n = now % self.steps
        if n == 0:
            self.clear()
        self.receive(n, z)
        if self.readout:
            return self.a + self.bias
        if n == self.steps - 1:
            self.begin(self.a + self.bias)
        if now < self.steps - 1:
            return self.silence()
        return self.emit((n + 1) % self.steps)

    def clear(self) -> None:
        """Forget the window that was taken in."""
        self.a[:] = 0

    def receive(self, n: int, z: Array) -> None:
        """Take the current of a step in."""
        self.a += z
        self.keep(self.a)

    def begin(self, total: Array) -> None:
        """Prepare the emission of a potential."""
        raise NotImplementedError

    def emit(self, n: int) -> Array:
        """Spikes of a step of emission."""
        raise NotImplementedError


@implements(proc=Bits, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class BitsModel(WindowModel):
    """`a = 2 a + z`; bits, most significant first."""

    threshold: Array = State
    a: Array = State
    v: Array = State

    def receive(self, n: int, z: Array) -> None:
        self.a += self.a + z
        self.keep(self.a)

    def begin(self, total: Array) -> None:
        self.v[:] = total
        self.keep(self.v)

    def emit(self, n: int) -> Array:
        least = self.threshold << (self.steps - 1 - n)
        s = self.v >= least
        self.v -= least * s
        return s


class SignedModel(WindowModel):
    """Sign and magnitude of the potential."""

    a: Array = State
    v: Array = State
    sign: Array = State

    def begin(self, total: Array) -> None:
        self.sign[:] = np.sign(np.maximum(total, 0) if self.rectify else total)
        self.v[:] = np.abs(total)
        self.keep(self.v)


@implements(proc=Phases, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PhasesModel(SignedModel):
    """`s = v >= θ(t); v -= h(t) s`; spikes carry the payload of their step."""

    threshold: Array = State
    reset: Array = State
    ceiling: Array = State
    payload: Array = State
    a: Array = State
    v: Array = State
    sign: Array = State

    def begin(self, total: Array) -> None:
        super().begin(total)
        self.v[:] = np.minimum(self.v, self.ceiling)

    def emit(self, n: int) -> Array:
        s = self.v >= self.threshold[n]
        self.v -= self.reset[n] * s
        return s * self.sign * self.payload[n]


@implements(proc=Rates, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class RatesModel(SignedModel):
    """A constant current into an integrate-and-fire neuron of threshold T θ."""

    threshold: Array = State
    a: Array = State
    v: Array = State
    current: Array = State
    sign: Array = State

    def begin(self, total: Array) -> None:
        super().begin(total)
        self.current[:] = np.minimum(self.v + (self.threshold >> 1), self.steps * self.threshold)
        self.v[:] = 0

    def emit(self, n: int) -> Array:
        self.v += self.current
        self.keep(self.v)
        s = self.v >= self.steps * self.threshold
        self.v -= self.steps * self.threshold * s
        return s * self.sign


@implements(proc=FirstSpikes, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class FirstSpikesModel(WindowModel):
    """`i += z; a += i`; then a ramp, and one spike where it meets `(T-1) θ`."""

    threshold: Array = State
    i: Array = State
    a: Array = State
    v: Array = State
    fired: Array = LavaPyType(np.ndarray, np.int32, precision=1)

    def clear(self) -> None:
        super().clear()
        self.i[:] = 0

    def receive(self, n: int, z: Array) -> None:
        if n < self.steps - 1:
            self.i += z
            self.a += self.i
            self.keep(self.i, self.a)

    def begin(self, total: Array) -> None:
        self.v[:], self.fired[:] = total, 0
        self.keep(self.v)

    def emit(self, n: int) -> Array:
        if n == self.steps - 1:
            return self.silence()
        top = (self.steps - 1) * self.threshold
        s = (self.v >= top) & (self.fired == 0)
        self.fired |= s
        self.v[:] = np.minimum(self.v + self.threshold, top)
        return s


@implements(proc=Delay, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class DelayModel(PyLoihiProcessModel):
    """A ring buffer."""

    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    line: Array = State

    def run_spk(self) -> None:
        """One time step."""
        place = (self.time_step - 1) % len(self.line)
        out = self.line[place].copy()
        self.line[place] = self.a_in.recv()
        self.s_out.send(out)


@implements(proc=Recorder, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class RecorderModel(PyLoihiProcessModel):
    """Keeps every step, and writes the file in the last."""

    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    seen: Array = LavaPyType(np.ndarray, np.int32, precision=32)

    def run_spk(self) -> None:
        """One time step."""
        self.seen[self.time_step - 1] = self.a_in.recv()
        if self.time_step == len(self.seen):
            np.save(self.proc_params["path"], self.seen)
