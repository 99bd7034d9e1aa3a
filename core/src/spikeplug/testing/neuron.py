"""What every neuron must do."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from spikeplug.coding.types import Neuron
from spikeplug.testing.guard import Guarded


class NeuronConformance(Guarded):
    """Checks of a Neuron. Give the fixture `neuron`; `currents` too where the default ones would not make it fire."""

    @pytest.fixture
    def neuron(self) -> Neuron:
        """The neuron under test."""
        pytest.fail("give the fixture `neuron`")

    @pytest.fixture
    def currents(self) -> Tensor:
        """Input currents `[T, *S]`, float64, with which it fires."""
        return torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2

    def test_is_a_frozen_dataclass(self, neuron: Neuron) -> None:
        assert hasattr(neuron, "__dataclass_fields__")
        assert type(neuron)(**dataclasses.asdict(cast(Any, neuron))) == neuron

    def test_window_equals_the_step_loop(self, neuron: Neuron, currents: Tensor) -> None:
        state = neuron.init(currents[0])
        silence = torch.zeros_like(currents[0])
        spikes = []
        for x in [*currents, *[silence] * neuron.latency]:
            s, state = neuron.step(x, state)
            spikes.append(s)
        assert torch.equal(neuron.window(currents), torch.stack(spikes[neuron.latency :]))

    def test_fires_spikes_of_the_shape_and_dtype_of_its_current(self, neuron: Neuron, currents: Tensor) -> None:
        for dtype in (torch.float64, torch.float32):
            s = neuron.window(currents.to(dtype))
            assert s.shape == currents.shape
            assert s.dtype == dtype
            assert set(s.flatten().tolist()) <= {-1.0, 0.0, 1.0}
            assert s.abs().sum() > 0

    def test_step_changes_neither_input_nor_state(self, neuron: Neuron, currents: Tensor) -> None:
        state = neuron.init(currents[0])
        for x in currents:
            kept, before = copy.deepcopy(state), x.clone()
            first, after = neuron.step(x, state)
            again, _ = neuron.step(x, state)
            fresh, _ = neuron.step(x, kept)
            assert torch.equal(first, again)
            assert torch.equal(first, fresh)
            assert torch.equal(x, before)
            state = after

    def test_is_causal_with_the_declared_latency(self, neuron: Neuron, currents: Tensor) -> None:
        reference = neuron.window(currents)
        for cut in range(1, currents.shape[0]):
            changed = currents.clone()
            changed[cut:] += 5
            same = max(0, cut - neuron.latency)
            assert torch.equal(neuron.window(changed)[:same], reference[:same])

    def test_neurons_are_independent(self, neuron: Neuron, currents: Tensor) -> None:
        assert torch.equal(neuron.window(currents[:, 1:2]), neuron.window(currents)[:, 1:2])

    def test_empty_window(self, neuron: Neuron, currents: Tensor) -> None:
        assert neuron.window(currents[:0]).shape == currents[:0].shape
