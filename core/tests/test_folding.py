"""Passes ahead of a conversion: norms folded into layers where that is the same function, and passes of plugins."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import spikeplug
from spikeplug import plugins
from spikeplug.errors import ConversionError
from spikeplug.graph.capture import capture
from spikeplug.graph.folding import fold


def _with_norms():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(144, 5),
        nn.BatchNorm1d(5),
    )
    for _ in range(3):
        net(torch.randn(16, 1, 8, 8))
    return net.eval()


def test_folding_keeps_the_function_and_is_reported(images):
    net = _with_norms()
    before = net(images)
    spiking = spikeplug.convert(net, "rate", calibration=[images], steps=256)
    roles = {op.name: op.role for op in spikeplug.report(spiking).ops}
    assert (roles["1"], roles["3"], roles["6"]) == ("folded", "neuron", "folded")
    assert (spiking(images) - before).abs().max() < 0.05 * before.abs().max()
    assert torch.equal(net(images), before)


def test_folding_leaves_a_norm_whose_layer_is_read_elsewhere(images):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    spiking = spikeplug.convert(Branch().eval(), "rate", calibration=[images])
    assert {op.name: op.role for op in spikeplug.report(spiking).ops}["norm"] == "neuron"


def test_passes_of_plugins_run_ahead_of_any_network(network, images, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Halve:
        name = "halve"

        def apply(self, model, batches=()):
            assert torch.equal(batches[0], images)
            model[3].weight = nn.Parameter(model[3].weight / 2)
            model[3].bias = nn.Parameter(model[3].bias / 2)
            model[5].weight = nn.Parameter(model[5].weight * 2)
            return {}

        def skeleton(self, model):
            pass

    part = plugins.Part("pass", "halve", "here:Halve", "test")
    monkeypatch.setitem(plugins.registry().parts, ("pass", "halve"), [part])
    load = plugins.Part.load
    monkeypatch.setattr("spikeplug.plugins.Part.load", lambda self: Halve if self is part else load(self))
    dense = network()
    before = dense(images)
    spiking = spikeplug.convert(dense, "rate", calibration=[images], passes=["halve"])
    torch.testing.assert_close(spiking.get_submodule("3").weight, dense[3].weight / 2)
    assert torch.equal(dense(images), before)
    dense[4] = nn.Sigmoid()  # behind it halving is another function
    with pytest.raises(ConversionError, match="with its codes left out the converted network is not Sequential"):
        spikeplug.convert(dense, "rate", calibration=[images], passes=["halve"])


@torch.no_grad()
def test_norm_ahead_of_a_layer_is_folded_where_that_is_the_same():
    torch.manual_seed(0)

    def trained(norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        return norm

    cases = {
        "grouped": (nn.Sequential(trained(nn.BatchNorm2d(8)), nn.Conv2d(8, 12, 3, groups=4)), (4, 8, 6, 6), 1),
        "padded": (nn.Sequential(trained(nn.BatchNorm2d(8)), nn.Conv2d(8, 12, 3, padding=1)), (4, 8, 6, 6), 0),
        "linear": (nn.Sequential(trained(nn.BatchNorm1d(8)), nn.Linear(8, 3, bias=False)), (4, 8), 1),
        # As many columns as channels: the linear layer reads columns.
        "columns": (nn.Sequential(trained(nn.BatchNorm2d(6)), nn.Linear(6, 3)), (4, 6, 6, 6), 0),
    }
    for name, (net, shape, folded) in cases.items():
        x = torch.randn(shape)
        expected = net.eval()(x)
        captured = capture(net, (x,), {})
        assert len(fold(captured)) == folded, name
        run = torch.fx.GraphModule(dict(captured.tensors), captured.graph)
        torch.testing.assert_close(run(x)[0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
