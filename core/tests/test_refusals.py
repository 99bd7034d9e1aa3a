"""What is not understood, or has no form: named, all at once, with its line and a remedy."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import spikeplug
from spikeplug.errors import ConversionError, OptionError
from spikeplug.graph.timestepped import network

pytestmark = pytest.mark.usefixtures("third_party")


@pytest.fixture
def images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    return Branching().eval()


def _normed():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) * torch.sigmoid(self.gate(x))


@pytest.mark.parametrize("recipe", ["rate", "streaming"])
def test_what_is_not_understood_is_named(recipe, images):
    def convert(net, batch=images, **options):
        return spikeplug.convert(net, recipe, calibration=[batch], **options)

    with pytest.raises(
        ConversionError, match=r"Branching cannot be captured: its forward branches on values.*test_refusals"
    ):
        convert(_branching())
    with pytest.raises(ConversionError, match=r"BN '1' uses statistics of the batch: call model\.eval"):
        convert(_normed())
    with pytest.raises(OptionError, match=r"Sequential does not take a batch of shape \[2, 5, 8, 8\]"):
        convert(_normed().eval(), torch.randn(2, 5, 8, 8))
    with pytest.raises(ConversionError, match="no operation that can receive spikes"):
        convert(nn.Sequential(nn.ReLU()).eval())
    with pytest.raises(ConversionError, match="is a converted model already"):
        convert(convert(_normed().eval()))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.special.i0(torch.special.i0(self.conv(x) / 4))


def test_all_problems_are_said_at_once_and_a_plan_is_made_all_the_same(images):
    net = Unknown().eval()
    before = net(images)
    plan = spikeplug.plan(net, "rate", images)
    assert [each.operation for each in plan.problems] == ["special_i0", "special_i0_1"]
    assert all(each.line.startswith("test_refusals.py:") for each in plan.problems)
    with pytest.raises(
        ConversionError, match=r"2 problems:\n.*special_i0'.*\n.*special_i0_1'.*exclude=\['special_i0_1'\]"
    ):
        plan.apply()
    assert "problem: operation 'special_i0'" in str(plan)
    assert json.loads(json.dumps(plan.summary()))["problems"][0]["type"] == "special_i0"
    spiking = spikeplug.convert(net, "rate", calibration=[images], exclude=["special_i0*"], steps=512)
    assert {op.name for op in spikeplug.report(spiking).ops if op.role == "dense"} == {"special_i0", "special_i0_1"}
    assert (spiking(images) - before).norm() < 0.05 * before.norm()
    assert torch.equal(net(images), before)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rate", "streaming"])
def test_a_gate_is_a_decoded_product_and_may_stay_dense(recipe, images):
    net = Gated().eval()
    dense = net(images)
    spiking = spikeplug.convert(net, recipe, calibration=[images], steps=512)
    roles = {op.name: op.role for op in spikeplug.report(spiking).ops}
    assert (roles["sigmoid"], roles["mul"], roles["conv"]) == ("dense", "decoded", "spiking")
    assert 0 < (spiking(images) - dense).norm() < 0.05 * dense.norm()
    spiking = spikeplug.convert(net, recipe, calibration=[images], exclude=["mul"], steps=512)
    roles = {op.name: op.role for op in spikeplug.report(spiking).ops}
    assert (roles["mul"], roles["conv"]) == ("dense", "spiking")
    assert 0 < (spiking(images) - dense).norm() < 0.05 * dense.norm()


def test_a_network_that_cannot_be_handed_out_says_why(images):
    with pytest.raises(ConversionError, match="only networks of streaming codes"):
        network(spikeplug.convert(_normed().eval(), "rate", calibration=[images]))


def test_clip_without_a_form_is_named(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(
        ConversionError, match=r"'1' \(ReLU6\): neuron 'late-if' has no form with the activation 'clip'"
    ):
        spikeplug.convert(net, "streaming", calibration=[images])


def test_preprocessing_stays_ahead_of_the_code(images):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv((x - self.mean) / 0.25)

    torch.manual_seed(0)
    net = Scaled().eval()
    with torch.no_grad():
        dense = net(images)
        spiking = spikeplug.convert(net, "streaming", calibration=[images], steps=256)
        assert (spiking(images) - dense).norm() < 0.05 * dense.norm()
    assert [op.name for op in spikeplug.report(spiking).ops][:3] == ["sub", "div", "image"]
    with pytest.raises(ConversionError, match="changes its input before it is coded"):
        network(spiking)


def test_what_cannot_be_captured_is_converted_layer_by_layer_where_that_is_asked_for(images):
    dense = _branching()
    net = spikeplug.convert(dense, "rate", calibration=[images], structure="layers", steps=256)
    assert type(net) is type(dense)
    assert type(dense.conv) is nn.Conv2d
    rows = {op.name: op for op in spikeplug.report(net).ops}
    assert rows["conv"].role == "spiking"
    assert "is not known" in rows["(between layers)"].note
    with pytest.raises(OptionError, match="stream through captured networks only"):
        spikeplug.convert(dense, "streaming", calibration=[images], structure="layers")
