"""The conformance kit on parts of this project, one of each kind."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

import spikeplug
from spike_plugin_bse.ste import STE
from spikeplug.errors import OptionError
from spikeplug.testing import (
    ApproximatorConformance,
    ExporterConformance,
    OperationConformance,
    PassConformance,
    TrainerConformance,
)


class TestASNC(ApproximatorConformance):
    @pytest.fixture
    def approximator(self):
        return spikeplug.get_approximator("asnc", steps=12)

    @pytest.fixture
    def operations(self):
        return {"silu": nn.SiLU(), "softmax": nn.Softmax(-1), "layernorm": nn.LayerNorm(16)}


class TestKernels(ApproximatorConformance):
    @pytest.fixture
    def approximator(self):
        return spikeplug.get_approximator("ttfs-kernels", steps=512)

    @pytest.fixture
    def operations(self):
        return {"gelu": nn.GELU(), "rmsnorm": nn.RMSNorm(16)}


class TestGroupNorm(OperationConformance):
    role: ClassVar[str] = "dense"

    @pytest.fixture
    def operation(self):
        return "1"

    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 3)).eval()

    @pytest.fixture
    def example(self):
        return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class TestPixelShuffle(TestGroupNorm):
    role: ClassVar[str] = "neuron"

    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3)).eval()


@pytest.fixture
def batches():
    return [torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


class _OfLanguageModels(PassConformance):
    @pytest.fixture
    def model(self, build):
        return build().eval()

    @pytest.fixture
    def batches(self, batches):
        return batches


class TestRotate(_OfLanguageModels):
    @pytest.fixture
    def transform(self):
        return spikeplug.get_pass("rotate")


class TestPrefix(_OfLanguageModels):
    @pytest.fixture
    def transform(self):
        return spikeplug.get_pass("prefix", tokens=(5, 1))


class TestDeferSoftmax(_OfLanguageModels):
    @pytest.fixture
    def transform(self):
        return spikeplug.get_pass("defer-softmax")


class TestSTE(TrainerConformance):
    @pytest.fixture
    def trainer(self):
        return STE(steps=3, lr=1e-2)

    @pytest.fixture
    def converted(self):
        def convert():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
            return net, spikeplug.convert(net, "bse", calibration=[torch.rand(32, 8)], steps=4)

        return convert

    @pytest.fixture
    def batches(self):
        generator = torch.Generator().manual_seed(0)
        return [
            (torch.rand(8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(4)
        ]


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    return spikeplug.convert(net, "bse", calibration=[torch.rand(32, 1, 8, 8)], steps=6)


class TestLava(ExporterConformance):
    @pytest.fixture
    def exporter(self):
        return spikeplug.get_exporter("lava")

    @pytest.fixture
    def converted(self, small):
        return small

    @pytest.fixture
    def samples(self):
        return [torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))]


def test_a_part_that_breaks_the_rules_is_found():
    class Writes:
        """A pass that writes into shared parameters."""

        def apply(self, model, batches=()):
            with torch.no_grad():
                model[0].weight.mul_(1)
                model[0].weight.add_(1)
            return {}

    net, batch = nn.Sequential(nn.Linear(4, 4)).eval(), torch.rand(3, 4)
    check = PassConformance.test_a_copy_that_shares_memory_is_changed_and_the_original_is_not
    with pytest.raises(AssertionError):
        check(PassConformance(), Writes(), net, [batch])

    class Anything:
        def build(self, op, original, name):
            return original

    with pytest.raises(pytest.fail.Exception):
        ApproximatorConformance().test_an_operation_without_a_form_is_refused(Anything())
    assert issubclass(OptionError, spikeplug.SpikeplugError)
