"""The rate code and its neuron: hand-computed numbers first, then the conformance kit."""

from __future__ import annotations

import pytest
import torch

from spikeplug.coding.rate import IF, Rate
from spikeplug.coding.types import CodeParams
from spikeplug.errors import OptionError
from spikeplug.testing import EncoderConformance, NeuronConformance


class TestRateConformance(EncoderConformance):
    @pytest.fixture(params=[1, 7, 32], ids=lambda steps: f"T{steps}")
    def encoder(self, request):
        return Rate(steps=request.param)

    @pytest.fixture
    def neuron(self, encoder):
        return IF(threshold=encoder.steps)


class TestIFConformance(NeuronConformance):
    @pytest.fixture
    def neuron(self):
        return IF(threshold=1.5)


def test_rate_fires_as_computed_by_hand():
    # n = round(5 * x / 1) of T = 5; a threshold of 5 is crossed at t when the sum of n passes it.
    code, p = Rate(steps=5), CodeParams(torch.tensor(0.2), torch.tensor(0.0))
    x = torch.tensor([0.4, -0.6, 1.0, 0.0, 0.09])
    spikes = [[0, -0, 1, 0, 0], [0, -1, 1, 0, 0], [1, 0, 1, 0, 0], [0, -1, 1, 0, 0], [1, -1, 1, 0, 0]]
    assert torch.equal(code.encode(x, p), torch.tensor(spikes, dtype=torch.float32))
    assert torch.allclose(code.fused(x, p), torch.tensor([0.4, -0.6, 1.0, 0.0, 0.0]))


def test_if_trace_is_exact():
    xs = torch.tensor([0.5, 0.5, 1.25, -3.0, 0.0])
    # u: 0.5, 1.0 -> fires at exactly the threshold, 1.25 -> fires, rest 0.25 - 3 = -2.75 -> fires -1, -1.75 -> -1
    assert IF(threshold=1.0).window(xs).tolist() == [0, 1, 1, -1, -1]


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 4097}, {"steps": 2.5}, {"percentile": 50}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Rate(**options)


def test_threshold_must_be_positive():
    with pytest.raises(OptionError, match="threshold=0"):
        IF(threshold=0)
