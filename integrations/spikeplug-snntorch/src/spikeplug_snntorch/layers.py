"""snnTorch's side: a neuron as `spk, mem = n(x, mem)`, and a network for its loop over time."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import snntorch
import torch
from snntorch._neurons.neurons import SpikingNeuron
from torch import Tensor, nn

from spikeplug.coding.types import Neuron
from spikeplug.graph.timestepped import SteppedNetwork, network, tensors_of


class SnnNeuron(snntorch.Leaky):
    """Any neuron of Spikeplug as an snnTorch neuron.

    `spk, mem = n(x, mem)` takes one step `[B, ...]`; `mem` is the neuron's whole state, None or `n.init_leaky()` before
    the first step. `init_hidden=True` keeps it inside, and `n(x)` gives `spk`, or `(spk, potential)` with
    `output=True`. With `window=True` it takes `[T, B, ...]` and drains the silent steps inside; a window starts from
    rest.

    It is a `Leaky` for `isinstance` alone, by which snnTorch 1.0 finds what to reset and to detach.
    """

    def __init__(self, neuron: Neuron, window: bool = False, init_hidden: bool = False, output: bool = False) -> None:
        SpikingNeuron.__init__(self, init_hidden=init_hidden, output=output)
        self.neuron, self.window, self._state = neuron, window, None

    def extra_repr(self) -> str:
        return f"{self.neuron}, window={self.window}"

    @property
    def mem(self) -> Any:
        """The potential that snnTorch's reset and detach look for; what is set drops the whole state."""
        first = next(tensors_of(self._state), None)
        return torch.zeros(0) if first is None else first

    @mem.setter
    def mem(self, value: Any) -> None:
        self._state = None

    def init_leaky(self) -> None:
        """No state yet: the first input gives it its shape."""
        return

    def reset_mem(self) -> None:
        """Forget the state."""
        self._state = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        SpikingNeuron.instances.append(self)  # or `utils.reset` would pass the copy over

    def __deepcopy__(self, memo: dict[int, Any]) -> SnnNeuron:
        twin = type(self)(self.neuron, self.window, self.init_hidden, self.output)
        memo[id(self)] = twin
        twin.train(self.training)
        return twin

    def forward(self, x: Tensor, mem: Any = None) -> Any:
        """Spikes, and the state, as the class says."""
        if self.init_hidden and mem is not None:
            raise TypeError("with init_hidden=True the neuron keeps its state: call it with the input alone")
        state = self._state if self.init_hidden else mem
        if self.window:
            spikes = self.neuron.window(x)
        else:
            state = self.neuron.init(x) if state is None else state
            spikes, state = self.neuron.step(x, state)
        if not self.init_hidden:
            return spikes, state
        self._state = state
        return (spikes, self.mem) if self.output else spikes


class SnnNetwork(SteppedNetwork):
    """A converted network of snnTorch neurons for the loop over time; skip connections have delay lines.

    `snntorch.utils.reset(net)` before each batch, then `net(step)` for every step of `net.ticks(images)`, and
    `net.decode` of what came out; or `net.run(images)`, which is that loop.
    """


@dataclasses.dataclass(frozen=True)
class SnnTorch:
    """The framework."""

    name: ClassVar[str] = "snntorch"

    def wrap(self, neuron: Neuron) -> SnnNeuron:
        """A neuron that keeps its state."""
        return SnnNeuron(neuron, init_hidden=True)

    def network(self, model: nn.Module) -> SnnNetwork:
        """A converted network. Raises as `spikeplug.graph.timestepped.network`."""
        built = network(model, self.wrap, SnnNetwork)
        assert isinstance(built, SnnNetwork)
        return built
