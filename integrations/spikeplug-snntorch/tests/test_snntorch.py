"""Neurons and networks in snnTorch: both calls, resets, copies, training through time, and the same spikes."""

from __future__ import annotations

import copy
import warnings

import pytest
import snntorch
import snntorch.utils
import torch
from torch import nn

import spikeplug
from spikeplug import plugins
from spikeplug.errors import ConversionError
from spikeplug_snntorch import SnnNeuron, SnnTorch

OPTIONS = {"asnc-if": {"steps": 8}}
"""Options without which a neuron cannot be built."""


@pytest.fixture
def xs():
    return torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", plugins.registry().names("neuron"))
def test_every_registered_neuron_works_in_both_modes(name, xs):
    neuron = spikeplug.get_neuron(name, **OPTIONS.get(name, {}))
    try:
        expected = torch.stack(list(neuron.stream(xs)))
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert torch.equal(SnnNeuron(neuron, window=True)(xs)[0], expected)
    layer, mem, fired = SnnNeuron(neuron), None, []
    for x in [*xs, *[torch.zeros_like(xs[0])] * neuron.latency]:
        spk, mem = layer(x, mem)
        fired.append(spk)
    assert torch.equal(torch.stack(fired)[neuron.latency :], expected)


def run(net, xs):
    return torch.stack([net(x) for x in xs])


def test_reset_reaches_the_neuron_and_its_copies(xs):
    net = nn.Sequential(nn.Linear(5, 4), SnnTorch().wrap(spikeplug.get_neuron("tsa")))
    first = run(net, xs)
    assert not torch.equal(run(net, xs), first)
    snntorch.utils.reset(net)
    assert torch.equal(run(net, xs), first)
    copied = copy.deepcopy(net)
    snntorch.utils.reset(copied)
    assert torch.equal(run(copied, xs), first)
    run(copied, xs)
    snntorch.utils.reset(copied)
    assert torch.equal(run(copied, xs), first)


def test_hidden_state_and_outputs(xs):
    layer = SnnNeuron(spikeplug.get_neuron("tsa"), init_hidden=True, output=True)
    spk, mem = layer(xs[0])
    assert spk.shape == (3, 5)
    assert mem.shape == (3, 5)
    with pytest.raises(TypeError, match="keeps its state"):
        layer(xs[0], mem)
    layer.reset_mem()
    assert layer.mem.numel() == 0


def test_training_through_time_lowers_the_loss(xs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from snntorch import backprop, functional
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 16), SnnNeuron(spikeplug.get_neuron("if"), init_hidden=True),
        nn.Linear(16, 4), SnnNeuron(spikeplug.get_neuron("tsa", silent=0), init_hidden=True, output=True),
    )  # fmt: skip
    data = [(torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4)]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = backprop.BPTT(
            net, data, num_steps=8, optimizer=optimizer, criterion=functional.ce_count_loss(), time_var=False
        )
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_network_streams_the_same_numbers():
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(512, 5)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.c(torch.relu(x + self.b(torch.relu(self.b(x)))).flatten(1))

    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    spiking = spikeplug.convert(Residual().eval().double(), "css", calibration=[images])
    network = SnnTorch().network(spiking)
    assert any("delay" in name for name, _ in network.named_children())
    snntorch.utils.reset(network)
    currents = torch.stack([network(step) for step in network.ticks(images)])
    assert len(currents) == spikeplug.report(spiking).delay == 12 + 3
    assert torch.equal(network.decode(currents), spiking(images))
    snntorch.utils.reset(network)
    assert torch.equal(network.run(images), spiking(images))


def test_what_does_not_flow_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(ConversionError, match="only networks of streaming codes"):
        SnnTorch().network(spikeplug.convert(net, "rate", calibration=[torch.randn(2, 3, 8, 8)]))
