"""Lava Processes of neurons, one for each code: the ports and variables that an implementation on a chip would have."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var

Array = Any


class Population(AbstractProcess):
    """Neurons that receive currents and send spikes; a readout sends its states instead.

    Args:
        size: neurons.
        start: step, counted from 0, in which the first current of the first sample comes.
        steps: T.
        period: steps from one sample to the next.
        readout: whether they send their states.
        bias: `[N]`.
        options: what differs by code.
    """

    def __init__(
        self, *, size: int, start: int, steps: int, period: int, readout: bool, bias: Array, **options: Any
    ) -> None:
        shape = (size,)
        super().__init__(
            shape=shape, start=start, steps=steps, period=period, readout=readout,
            **{key: value for key, value in options.items() if not isinstance(value, np.ndarray)},
        )  # fmt: skip
        self.a_in = InPort(shape=shape)
        self.s_out = OutPort(shape=shape)
        self.bias = Var(shape=shape, init=bias)
        self.peak = Var(shape=(1,), init=0)


class Ternary(Population):
    """TSA and TSA-ReLU. Options: `beta`, `silent`, `fraction`, `rectify`, `negative`.

    Args:
        threshold: v `[N]`.
        ceiling: `[T, N]`, where values are clipped.
    """

    def __init__(self, *, threshold: Array, ceiling: Array, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = Var(shape=threshold.shape, init=threshold)
        self.ceiling = Var(shape=ceiling.shape, init=ceiling)
        self.h = Var(shape=threshold.shape, init=0)
        self.g = Var(shape=threshold.shape, init=0)


class Bits(Population):
    """BSE. Args: threshold `[N]`."""

    def __init__(self, *, threshold: Array, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = Var(shape=threshold.shape, init=threshold)
        self.a = Var(shape=threshold.shape, init=0)
        self.v = Var(shape=threshold.shape, init=0)


class Phases(Population):
    """Phase. Args: threshold, reset `[T, N]`, ceiling `[N]`, payload `[T]`. Option: `rectify`."""

    def __init__(self, *, threshold: Array, reset: Array, ceiling: Array, payload: Array, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = Var(shape=threshold.shape, init=threshold)
        self.reset = Var(shape=reset.shape, init=reset)
        self.ceiling = Var(shape=ceiling.shape, init=ceiling)
        self.payload = Var(shape=payload.shape, init=payload)
        self.a = Var(shape=ceiling.shape, init=0)
        self.v = Var(shape=ceiling.shape, init=0)
        self.sign = Var(shape=ceiling.shape, init=0)


class Rates(Population):
    """Rate. Args: threshold `[N]`. Option: `rectify`."""

    def __init__(self, *, threshold: Array, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = Var(shape=threshold.shape, init=threshold)
        self.a = Var(shape=threshold.shape, init=0)
        self.v = Var(shape=threshold.shape, init=0)
        self.current = Var(shape=threshold.shape, init=0)
        self.sign = Var(shape=threshold.shape, init=0)


class FirstSpikes(Population):
    """TTFS. Args: threshold `[N]`."""

    def __init__(self, *, threshold: Array, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = Var(shape=threshold.shape, init=threshold)
        self.i = Var(shape=threshold.shape, init=0)
        self.a = Var(shape=threshold.shape, init=0)
        self.v = Var(shape=threshold.shape, init=0)
        self.fired = Var(shape=threshold.shape, init=0)


class Delay(AbstractProcess):
    """A delay line: what comes in goes out so many steps later."""

    def __init__(self, *, size: int, steps: int) -> None:
        super().__init__(shape=(size,), steps=steps)
        self.a_in = InPort(shape=(size,))
        self.s_out = OutPort(shape=(size,))
        self.line = Var(shape=(steps, size), init=0)


class Recorder(AbstractProcess):
    """Keeps what comes in, and writes it to a file, int32 `[steps, N]`, in the last step.

    Reading it as a variable would take some 35 microseconds a value.
    """

    def __init__(self, *, size: int, steps: int, path: str) -> None:
        super().__init__(shape=(size,), steps=steps, path=path)
        self.a_in = InPort(shape=(size,))
        self.seen = Var(shape=(steps, size), init=0)


PROCESSES: dict[str, type[Population]] = {
    "css": Ternary,
    "bse": Bits,
    "phase": Phases,
    "rate": Rates,
    "ttfs": FirstSpikes,
}
