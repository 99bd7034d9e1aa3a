"""Accumulates beside those that NeuroBench and syops count, where they can count them."""

from __future__ import annotations

import importlib
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import spikeplug
from spikeplug.graph.streaming import StreamingLayer

X = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(150, 5),
    ).eval()  # fmt: skip


def _received(snn: nn.Module) -> dict[str, torch.Tensor]:
    """The spikes `[T * B, ...]` that every layer gets for X."""
    seen: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in snn.named_modules() if isinstance(layer, StreamingLayer)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        for name, layer in layers.items()
    ]
    snn(X)
    for hook in hooks:
        hook.remove()
    return seen


def test_neurobench_counts_the_same_accumulates():
    """Signed spikes, padding, strides and groups: every layer's figure is equal."""
    layers = pytest.importorskip("neurobench.metrics.utils.layers")
    plain = _net()
    snn = spikeplug.convert(_net(), "css", calibration=[X])
    counted = {op.name: op.acs for op in spikeplug.energy(snn, X).ops if op.role == "spiking"}
    received = _received(snn)
    assert set(counted) == set(received) == {"0", "2", "5"}
    for name, spikes in received.items():
        effective, spiking = layers.single_layer_MACs(spikes, plain.get_submodule(name))
        assert spiking
        assert counted[name] == pytest.approx(effective / len(X), rel=1e-12)


@pytest.fixture
def syops_ops(monkeypatch):
    """syops 0.0.5 looks for neurons where SpikingJelly had them before 2.0; it needs their names alone."""
    if find_spec("syops") is None:
        pytest.skip("pip install --no-deps syops progress")
    names = [
        "MultiStepIFNode",
        "MultiStepLIFNode",
        "IFNode",
        "LIFNode",
        "MultiStepParametricLIFNode",
        "ParametricLIFNode",
    ]
    neuron = types.ModuleType("spikingjelly.clock_driven.neuron")
    for name in names:
        setattr(neuron, name, type(name, (nn.Module,), {}))
    monkeypatch.setitem(sys.modules, "spikingjelly.clock_driven", types.ModuleType("spikingjelly.clock_driven"))
    monkeypatch.setitem(sys.modules, "spikingjelly.clock_driven.neuron", neuron)
    return importlib.import_module("syops.ops")


def test_syops_counts_the_same_accumulates_of_a_linear_layer(syops_ops):
    """It charges the share of inputs that fire, which is exact where every input has as many synapses."""
    layer = nn.Linear(12, 7, bias=False)
    x = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
    snn = spikeplug.convert(nn.Sequential(layer).eval(), "rate", calibration=[x], steps=8)
    counted = spikeplug.energy(snn, x).total("acs")
    site = snn.get_submodule("0").source
    counter = nn.Linear(12, 7, bias=False)
    counter.__syops__ = np.zeros(4)
    for spikes in site.encoder.encode(x, site.params(x)):
        syops_ops.linear_syops_counter_hook(counter, (spikes,), torch.zeros(4, 7))
    assert counter.__syops__[1] > 0
    assert counted == pytest.approx(counter.__syops__[1] / len(x), rel=1e-6)
