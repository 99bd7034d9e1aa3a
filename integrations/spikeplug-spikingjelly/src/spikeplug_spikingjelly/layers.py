"""SpikingJelly's side: a neuron on its explicit-state contract, a network, a recipe, and rules for its counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import base, neuron
from spikingjelly.activation_based.ann2snn.recipes.base import ModuleConversionRecipe
from spikingjelly.activation_based.op_counter import BaseCounter
from torch import Tensor, nn

import spikeplug
from spikeplug.coding.types import Neuron
from spikeplug.graph.timestepped import SteppedNetwork, network, tensors_of

aten = torch.ops.aten


class SJNeuron(neuron.BaseNode):
    """Any neuron of Spikeplug as a SpikingJelly neuron.

    Step mode `'s'` takes one step `[B, ...]`; silent steps come out as they are, L zeros first. Step mode `'m'` takes a
    window `[T, B, ...]` and drains the silent steps inside: T steps come out, aligned with those that came in.
    A window starts from rest whatever came before.

    Its memories are `v`, the potential left in amplitudes where the neuron tells it, and `state`.
    """

    def __init__(self, neuron: Neuron, step_mode: str = "s") -> None:
        super().__init__(v_threshold=1.0, v_reset=None, step_mode=step_mode)
        self.neuron = neuron
        self.register_memory("state", None)

    def extra_repr(self) -> str:
        return f"{self.neuron}, step_mode={self.step_mode}"

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        if step_mode == "m" or states[1] is None or _shape(states[1]) not in (None, (x.shape, x.dtype, x.device)):
            return (torch.zeros_like(x), self.neuron.init(x))
        return states

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **_: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        spikes, state = self.neuron.step(inputs[0], states[1])
        return (spikes,), (self._potential(state, spikes), state)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **_: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        return (self.neuron.window(inputs[0]),), states

    def _potential(self, state: Any, spikes: Tensor) -> Tensor:
        try:
            return self.neuron.residual(state)
        except NotImplementedError:
            return next(tensors_of(state), torch.zeros_like(spikes))

    def detach(self) -> None:
        """Cut the states from the graph that made them."""
        super().detach()
        self._memories["state"] = _mapped(self._memories["state"], lambda each: each.detach())

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> SJNeuron:
        super()._apply(fn)
        self._memories["state"] = _mapped(self._memories["state"], fn)
        return self


class FoldedNeuron(SJNeuron):
    """A neuron between layers that work on all steps at once: in `'m'` mode trains are `[T * B, ...]`."""

    def __init__(self, neuron: Neuron, steps: int, step_mode: str = "s") -> None:
        super().__init__(neuron, step_mode)
        self.steps = steps

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.step_mode == "s":
            single: Tensor = super().forward(x)
            return single
        window: Tensor = super().forward(x.reshape(self.steps, -1, *x.shape[1:]))
        return window.flatten(0, 1)


class SJNetwork(SteppedNetwork, base.StepModule):
    """A converted network of SpikingJelly neurons; `functional.set_step_mode` and `reset_net` work on it.

    In step mode `'s'` it takes one time step; in `'m'` a window `[T, B, ...]`, and gives the currents of the
    result `[T, B, ...]`, for `decode`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_mode = "s"

    def supported_step_mode(self) -> tuple[str, ...]:
        return ("s", "m")

    def forward(self, spikes: Tensor) -> Tensor:
        if self.step_mode == "s":
            return super().forward(spikes)
        currents = super().forward(spikes.flatten(0, 1))
        return currents.reshape(self.steps, -1, *currents.shape[1:])

    def run(self, x: Tensor) -> Tensor:
        """The result `[B, ...]` for a batch. In step mode `'s'`, `reset_net` must come before."""
        return super().run(x) if self.step_mode == "s" else self.decode(self(self.encode(x)))


@dataclasses.dataclass(frozen=True)
class SpikingJelly:
    """The framework."""

    name: ClassVar[str] = "spikingjelly"

    def wrap(self, neuron: Neuron) -> SJNeuron:
        """A neuron, for `nn.Sequential` and the like."""
        return SJNeuron(neuron)

    def network(self, model: nn.Module) -> SJNetwork:
        """A converted network, in step mode `'s'`. Raises as `spikeplug.graph.timestepped.network`."""
        steps = getattr(getattr(model, "stream", None), "steps", 1)
        built = network(model, lambda neuron: FoldedNeuron(neuron, steps), SJNetwork)
        assert isinstance(built, SJNetwork)
        return built


class SpikeplugRecipe(ModuleConversionRecipe):
    """A recipe of Spikeplug for SpikingJelly's `ModuleConverter(recipe).convert(ann)`, which then gives an SJNetwork.

    Args:
        recipe: name of one whose trains stream: `css`.
        calibration: batches of images.
        options: as of `spikeplug.convert`.
    """

    def __init__(self, recipe: str, calibration: Iterable[Tensor], **options: Any) -> None:
        self.recipe, self.calibration, self.options = recipe, calibration, options

    def convert_module(self, converter: Any, ann: nn.Module) -> nn.Module:
        """A new network, as `spikeplug.convert` makes it; the given one stays as it is."""
        return SpikingJelly().network(
            spikeplug.convert(ann.eval(), self.recipe, calibration=self.calibration, **self.options)
        )


def signed_rules(counter: BaseCounter) -> dict[Any, Callable[..., int]]:
    """Rules by which SpikingJelly's counters take spikes of -1, 0 and 1 for what they are: accumulates.

    Give them as `extra_rules` to another counter of the same class: `SynOpCounter(extra_rules=signed_rules(
    SynOpCounter()))`, and `MACCounter` alike. Without them, a train with one -1 is billed as dense multiplications.
    """
    places = {aten.mm.default: 0, aten.addmm.default: 1, aten.convolution.default: 0}
    return {op: _signed(counter.rules[op], place) for op, place in places.items() if op in counter.rules}


def _signed(rule: Callable[..., int], place: int) -> Callable[..., int]:
    def count(args: Any, kwargs: Any, out: Any) -> int:
        x = args[place]
        if bool(((x == 0) | (x.abs() == 1)).all()):
            args = (*args[:place], x.abs(), *args[place + 1 :])
        return rule(args, kwargs, out)

    return count


def _mapped(state: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, tuple):
        mapped = [_mapped(each, fn) for each in state]
        return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)
    return state


def _shape(state: Any) -> Any:
    first = next(tensors_of(state), None)
    return None if first is None else (first.shape, first.dtype, first.device)
