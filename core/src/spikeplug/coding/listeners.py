"""Who hears what happens in a converted network: counting, calibration, diagnosis, exporters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .padding import without_padding
from .statistics import Observer

if TYPE_CHECKING:
    from .site import Coder


class Listener:
    """Hears what happens in coders that it listens to: the events of which a subclass has the method."""

    def hears(self, event: str) -> bool:
        """Whether it has a method for events of this name; what nobody hears is not computed."""
        return getattr(type(self), event) is not getattr(Listener, event)

    def activation(self, coder: Coder, x: Tensor) -> None:
        """An activation that came to a coder in the mode `dense`."""

    def fired(self, coder: Coder, fired: Tensor, neurons: int, largest: int) -> None:
        """Spikes of an activation, padding left out: at most `largest` in each element, fired by so many neurons.

        A window that comes step by step gives its number of neurons once, and 0 with its other steps.
        """

    def window(self, coder: Any, x: Tensor, spikes: Tensor) -> None:
        """A whole window of spikes `[T, *S]`, and what it is of: an activation, or the currents of every step."""


class SpikeCount(Listener):
    """Spikes fired at one site while they were counted.

    Attributes:
        neurons: activations coded, each by one neuron for one window.
        places: of a site that a convolution reads, the spikes of every place `[H, W]`; None where there are none, or
            activations of several sizes.
    """

    def __init__(self) -> None:
        self.neurons = 0
        self.places: Tensor | None = None
        self._spikes: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def spikes(self) -> int:
        """Spikes fired; one of -1 counts as one."""
        return 0 if self._spikes is None else int(self._spikes)

    def fired(self, coder: Coder, fired: Tensor, neurons: int, largest: int) -> None:
        spatial = coder.spatial
        # Sums in int32 where they fit take a third of the time of int64 ones on a CPU. The sum stays on its device,
        # so that counting does not wait for it at every site.
        fired = fired.detach()
        narrow = torch.int32 if fired.numel() * largest < 2**31 else torch.int64
        places = None
        if spatial:
            fired = fired.sum(dim=tuple(range(fired.ndim - spatial)), dtype=narrow) if fired.ndim > spatial else fired
            places = fired = fired.to(torch.int64)
        total = fired.sum(dtype=narrow).to(torch.int64)
        with self._lock:
            if places is not None and self._spikes is None:
                self.places = places.clone()
            elif places is not None and self.places is not None:
                same = self.places.shape == places.shape
                self.places = self.places.to(places.device) + places if same else None
            self._spikes = total if self._spikes is None else self._spikes.to(total.device) + total
            self.neurons += neurons


class Observation(Listener):
    """Gathers statistics of the activations that come to one coder, padding left out."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def activation(self, coder: Coder, x: Tensor) -> None:
        self.observer.update(without_padding(x, coder.sequence))


def recomputing() -> bool:
    """Whether this is activation checkpointing, which runs a part of the forward pass anew within the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


_CHANGE = threading.Lock()
"""Held while the listeners of coders are changed."""


@contextlib.contextmanager
def listening(listeners: Mapping[Any, Listener]) -> Iterator[None]:
    """Inside, every coder has its listener. Contexts may be nested."""
    with _CHANGE:
        for coder, listener in listeners.items():
            coder.listeners = (*coder.listeners, listener)
    try:
        yield
    finally:
        with _CHANGE:
            for coder, listener in listeners.items():
                left = list(coder.listeners)
                left.remove(listener)
                coder.listeners = tuple(left)
