"""Random networks of in-place, functional and aliasing forms: none is another function once it is converted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import spikeplug
from spikeplug.coding.site import in_mode
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.trials import difference

WIDTH = 4


def _add(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    value += other
    return value


def _scale(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    value *= 0.5
    return value


def _set(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    value[:, 1] = other[:, 0]
    return value


def _first_half(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    value[:, :2].add_(other[:, 2:])  # through a view
    return value


def _forgotten(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    F.relu_(value)
    return value


def _of_view(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    flat = value.view(len(value), -1)
    flat.clamp_(-1, 1)
    return value


STEPS = {
    # What works on its argument in place, whoever else reads it.
    "add_": lambda net, a, b: a.add_(b),
    "+=": lambda net, a, b: _add(a, b),
    "*=": lambda net, a, b: _scale(a, b),
    "relu_": lambda net, a, b: F.relu_(a),
    "relu_ forgotten": lambda net, a, b: _forgotten(a, b),
    "nn.ReLU(inplace)": lambda net, a, b: net.relu(a),
    "hardtanh_": lambda net, a, b: F.hardtanh_(a, 0, 2),
    "setitem": lambda net, a, b: _set(a, b),
    "view.add_": lambda net, a, b: _first_half(a, b),
    "view.clamp_": lambda net, a, b: _of_view(a, b),
    "mul_": lambda net, a, b: a.mul_(torch.sigmoid(b)),
    "sub_ of itself": lambda net, a, b: a.sub_(a.mean((2, 3), keepdim=True)),
    "zero_ of a copy": lambda net, a, b: a + a.clone().zero_(),
    "copy_": lambda net, a, b: a.clone().copy_(b),
    # Layers and functions.
    "conv": lambda net, a, b: net.conv(a),
    "shared conv": lambda net, a, b: net.shared(a),
    "bn": lambda net, a, b: net.norm(a),
    "conv bn": lambda net, a, b: net.norm(net.conv(a)),
    "relu": lambda net, a, b: torch.relu(a),
    "cat": lambda net, a, b: net.wide(torch.cat([a, b], 1)),
    "product": lambda net, a, b: a * b,
    "gelu": lambda net, a, b: F.gelu(a),
    "minus": lambda net, a, b: b - a,
    "twice": lambda net, a, b: a + a,
    "parameter": lambda net, a, b: a * net.gamma + net.beta,
    "pool": lambda net, a, b: F.avg_pool2d(F.pad(a, (0, 1, 0, 1)), 2, 1),
    "matmul": lambda net, a, b: torch.softmax(a @ b.mT, -1) @ b,
    "permute": lambda net, a, b: a.permute(0, 1, 3, 2).contiguous(),
    "alias": lambda net, a, b: a,
}


class Program(nn.Module):
    """A network of steps on two of the activations that it has; later ones may read what earlier ones changed."""

    def __init__(self, program: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.program = program
        self.conv, self.shared = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.wide, self.norm = nn.Conv2d(2 * WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.gamma, self.beta = nn.Parameter(torch.randn(WIDTH, 1, 1)), nn.Parameter(torch.randn(WIDTH, 1, 1))
        self.head = nn.Linear(WIDTH, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.3, 3)

    def forward(self, x):
        values = [self.conv(x), self.shared(x), x.clone()]
        for name, first, second in self.program:
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(STEPS[name](self, a, b))
        total = values[0]
        for value in values[1:]:
            total = total + value
        return self.head(total.mean((2, 3))), values[-1]


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=6
)
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@torch.no_grad()
def check(program: list[tuple[str, int, int]], recipe: str, seed: int = 0) -> None:
    """Codes left out, the network is the dense one on other inputs than those of its capture; saved, it is itself."""
    torch.manual_seed(seed)
    net = Program(program).double().eval()
    x, other = torch.randn(4, WIDTH, 5, 5).double(), torch.randn(3, WIDTH, 6, 6).double()
    state = copy.deepcopy(net.state_dict())
    want = [net(x.clone()), net(other.clone())]
    spiking = spikeplug.convert(net, recipe, calibration=[x.clone()])
    assert isinstance(spiking, SpikingGraph)
    with in_mode(spiking, "dense"):
        for given, wanted in zip((x, other), want, strict=True):
            kept = given.clone()
            for one, found in zip(wanted, spiking(given), strict=True):
                assert difference(one, found) < 1e-9, program
            assert torch.equal(given, kept), program
    for one, found in zip(want[0], net(x.clone()), strict=True):
        assert torch.equal(one, found), program
    assert all(torch.equal(state[name], each) for name, each in net.state_dict().items()), program
    assert any(not torch.equal(one, found) for one, found in zip(want[0], spiking(x), strict=True)), program


@settings(max_examples=20, **SETTINGS)
@given(program=PROGRAMS)
def test_no_network_differs_from_its_dense_counterpart_when_codes_are_left_out(program):
    check(program, "rate")


@pytest.mark.slow
@settings(max_examples=500, **SETTINGS)
@given(program=PROGRAMS, seed=st.integers(0, 3))
def test_five_hundred_networks(program, seed):
    check(program, "rate", seed)


@pytest.mark.parametrize("name", STEPS)
def test_every_step_alone(name):
    check([(name, 0, 1), ("conv", 0, 0), (name, 3, 3)], "rate")
