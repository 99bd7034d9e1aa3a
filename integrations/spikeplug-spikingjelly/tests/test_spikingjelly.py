"""Neurons and networks in SpikingJelly: its step modes, resets, copies, monitors, counters, and the same spikes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import base, functional, monitor, op_counter
from spikingjelly.activation_based.ann2snn import ModuleConverter
from torch import nn

import spikeplug
from spikeplug import plugins
from spikeplug.errors import ConversionError
from spikeplug.plugins import get_class
from spikeplug_spikingjelly import SJNetwork, SJNeuron, SpikeplugRecipe, SpikingJelly, signed_rules

OPTIONS = {"asnc-if": {"steps": 8}}
"""Options without which a neuron cannot be built."""


def build(name):
    return spikeplug.get_neuron(name, **OPTIONS.get(name, {}))


@pytest.fixture
def xs():
    return torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))


def streams(neuron, xs):
    try:
        return torch.stack(list(neuron.stream(xs)))
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", plugins.registry().names("neuron"))
def test_every_registered_neuron_works_in_both_modes(name, xs):
    neuron = build(name)
    expected = streams(neuron, xs)
    layer = SJNeuron(neuron, step_mode="m")
    assert torch.equal(layer(xs), expected)
    layer.step_mode = "s"
    layer.reset()
    silence = torch.zeros_like(xs[0])
    fired = torch.stack([layer(x) for x in [*xs, *[silence] * neuron.latency]])
    assert torch.equal(fired[neuron.latency :], expected)
    functional.reset_net(layer)
    assert torch.equal(layer(xs[0]), fired[0])


@pytest.fixture
def layer():
    return SJNeuron(spikeplug.get_neuron("tsa-relu", beta=1.5), step_mode="m")


def test_sequential_step_modes_and_resets(xs):
    net = nn.Sequential(nn.Linear(5, 4), SpikingJelly().wrap(spikeplug.get_neuron("tsa")), nn.Linear(4, 2))
    functional.set_step_mode(net, "m")
    first = net(xs)
    assert first.shape == (8, 3, 2)
    functional.reset_net(net)
    assert torch.equal(net(xs), first)


def test_state_dict_copies_pickles_and_detaches(layer, xs):
    expected = layer(xs)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(xs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(xs), expected)
    assert layer.state_dict() == {}
    layer.step_mode = "s"
    layer.reset()
    layer(xs[0].requires_grad_())
    layer.detach()
    assert not any(each.requires_grad for each in layer.state if isinstance(each, torch.Tensor))


def test_batch_of_another_size_starts_anew(layer, xs):
    layer.step_mode = "s"
    layer(xs[0])
    assert layer(torch.randn(7, 5)).shape == (7, 5)


def test_monitors_and_functional_forward(layer, xs):
    net = nn.Sequential(layer)
    with monitor.OutputMonitor(net, SJNeuron) as seen:
        expected = net(xs)
        assert torch.equal(seen["0"][0], expected)
    layer.step_mode = "s"
    layer.reset()
    state = (torch.zeros(3, 5), None)
    spikes = []
    for x in xs:
        (s,), state = layer.functional_forward((x,), state)
        spikes.append(s)
    single = torch.stack([layer(x) for x in xs])
    assert torch.equal(torch.stack(spikes), single)
    functional_net = base.to_functional_forward(layer)
    assert callable(functional_net)
    layer.reset()
    layer(xs[0])
    assert layer.v.shape == (3, 5)


def network_and_images():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    return net.eval().double(), torch.randn(6, 3, 8, 8, dtype=torch.float64)


@torch.no_grad()
def test_network_gives_the_same_numbers_in_both_modes():
    net, images = network_and_images()
    spiking = spikeplug.convert(net, "css", calibration=[images])
    expected = spiking(images)
    built = SpikingJelly().network(spiking)
    assert torch.equal(built.run(images), expected)
    functional.reset_net(built)
    functional.set_step_mode(built, "m")
    assert torch.equal(built.run(images), expected)
    assert built(built.encode(images)).shape == (12, 6, 5)


@torch.no_grad()
def test_recipe_for_their_converter():
    net, images = network_and_images()
    built = ModuleConverter(SpikeplugRecipe("css", [images], steps=10)).convert(net)
    assert isinstance(built, SJNetwork)
    assert built.steps == 10


@torch.no_grad()
def test_signed_spikes_are_accumulates():
    layer = nn.Linear(64, 32, bias=False)
    s = torch.randint(-1, 2, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    theirs, ours = (
        op_counter.SynOpCounter(),
        op_counter.SynOpCounter(extra_rules=signed_rules(op_counter.SynOpCounter())),
    )
    macs = op_counter.MACCounter()
    signed = op_counter.MACCounter(extra_rules=signed_rules(op_counter.MACCounter()))
    with op_counter.DispatchCounterMode([theirs, ours, macs, signed]):
        layer(s)
    assert theirs.get_total() == 0
    assert ours.get_total() == int(s.abs().sum()) * 32
    assert macs.get_total() == 8 * 64 * 32
    assert signed.get_total() == 0


def test_what_does_not_flow_is_refused():
    net, images = network_and_images()
    with pytest.raises(ConversionError, match="only networks of streaming codes"):
        SpikingJelly().network(spikeplug.convert(net, "rate", calibration=[images]))
    assert get_class("framework", "spikingjelly") is SpikingJelly
