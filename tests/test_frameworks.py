"""One converted network in four executions: ours, SpikingJelly in both modes, snnTorch; also of a stranger's code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import snntorch.utils
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import nn

import spikeplug
from spikeplug.coding.listeners import Listener, listening
from spikeplug.coding.site import in_mode
from spikeplug.graph.timestepped import TimeStepped
from spikeplug_snntorch import SnnTorch
from spikeplug_spikingjelly import SpikingJelly


class Residual(nn.Module):
    """Two blocks with skips, one of them strided, and pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 16, 3, 2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.pool(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(short + self.d(F.relu(self.c(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def convert(recipe, dtype, **options):
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16).to(dtype)
    return spikeplug.convert(Residual().eval().to(dtype), recipe, calibration=[images], **options), images


def streamed(network, images):
    """Result, and the spikes of every neuron of a clocked network in its window, by its place in order."""
    seen = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(getattr(module, "neuron", None), TimeStepped):
            keep = seen.setdefault(name, [])
            handles.append(
                module.register_forward_hook(lambda module, args, out, keep=keep: keep.append((module, out)))
            )
    result = network.run(images)
    for handle in handles:
        handle.remove()
    trains = []
    for steps in seen.values():
        neuron = steps[0][0].neuron
        begin = neuron.start + neuron.neuron.latency
        train = torch.stack([out for _, out in steps])
        trains.append(train[begin : begin + neuron.steps] if len(steps) > 1 else None)
    return result, trains


class Trains(Listener):
    """Keeps the spikes of all neurons, in the order in which they come."""

    def __init__(self):
        self.found = []

    def window(self, coder, x, spikes):
        if coder.kind != "image":
            self.found.append(spikes.clone())


def compare(spiking, images):
    ours = Trains()
    with torch.no_grad(), listening(dict.fromkeys(spiking.stream.sites, ours)):
        expected = spiking(images)
    ours = ours.found
    jelly, torched = SpikingJelly().network(spiking), SnnTorch().network(spiking)
    with torch.no_grad():
        functional.set_step_mode(jelly, "m")
        assert torch.equal(jelly.run(images), expected)
        functional.set_step_mode(jelly, "s")
        functional.reset_net(jelly)
        snntorch.utils.reset(torched)
        for network in (jelly, torched):
            result, trains = streamed(network, images)
            assert torch.equal(result, expected)
            spikes = [train for train in trains if train is not None and set(train.unique().tolist()) <= {-1, 0, 1}]
            assert len(spikes) == len(ours)
            assert all(torch.equal(theirs, mine) for theirs, mine in zip(spikes, ours, strict=True))
    return expected


@pytest.mark.parametrize(
    ("recipe", "options"), [("css", {}), ("css-q", {}), ("css", {"silent": 3}), ("css", {"silent": 0, "beta": 1.3})]
)
def test_four_executions_fire_the_same_spikes(recipe, options):
    spiking, images = convert(recipe, torch.float64, **options)
    result = compare(spiking, images)
    with torch.no_grad(), in_mode(spiking, "dense"):
        assert not torch.equal(result, spiking(images))


@torch.no_grad()
def test_in_float32_results_are_near():
    spiking, images = convert("css", torch.float32)
    network = SnnTorch().network(spiking)
    snntorch.utils.reset(network)
    expected = spiking(images)
    assert (network.run(images) - expected).norm() < 0.02 * expected.norm()


PLUGIN = '''
"""Spike counts that stream, with a neuron that waits: a stranger's scheme in one module."""

import dataclasses
from typing import ClassVar

import torch
from spikeplug import CodeParams, Encoder, Neuron, Recipe, hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_encoders():
    return {"counts": "spike_plugin_counts:Counts"}


@hookimpl
def spikeplug_neurons():
    return {"waiting-if": "spike_plugin_counts:WaitingIF"}


@hookimpl
def spikeplug_recipes():
    return {"counts": "spike_plugin_counts:RECIPE"}


@dataclasses.dataclass(frozen=True)
class Counts(Encoder):
    steps: int = 64

    name: ClassVar[str] = "counts"
    signed: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def weights(self, p):
        return torch.ones(self.steps, dtype=torch.float64)

    def fit(self, stats):
        largest = torch.maximum(stats.low.abs().max(), stats.high.abs().max())
        return CodeParams((largest / self.steps).float(), torch.zeros(()))

    def encode(self, x, p):
        n = (x / p.scale.to(x.dtype)).round().clamp(-self.steps, self.steps)
        t = torch.arange(self.steps + 1, dtype=x.dtype).reshape(-1, *[1] * x.ndim)
        return torch.floor(t * n.abs() / self.steps).diff(dim=0) * n.sign()

    def span(self, p):
        return -self.steps * p.scale, self.steps * p.scale

    def error_bound(self, p):
        return p.scale / 2


@dataclasses.dataclass(frozen=True)
class WaitingIF(Neuron):
    silent: int = 2
    rectify: bool = False

    name: ClassVar[str] = "waiting-if"

    @property
    def latency(self):
        return self.silent

    def activated(self, op, top=float("inf"), steps=0):
        return dataclasses.replace(self, rectify=op == "relu")

    def init(self, x):
        return 0, torch.zeros_like(x), torch.zeros_like(x)

    def step(self, x, state):
        t, h, g = state
        h = h + x
        if t < self.silent:
            return torch.zeros_like(h), (t + 1, h, g)
        o = (h.clamp(min=0) if self.rectify else h) - g
        s = (o >= 0.5).to(h.dtype) - (o <= -0.5).to(h.dtype)
        return s, (t + 1, h, g + s)


RECIPE = Recipe("counts", "spike counts", encoder="counts", neuron="waiting-if", targets=frozenset({"module"}))
'''


def test_a_two_file_plugin_runs_in_all_four(tmp_path):
    (tmp_path / "spike_plugin_counts.py").write_text(PLUGIN)
    info = tmp_path / "spike_plugin_counts-0.1.0.dist-info"  # what pip would write for its pyproject.toml
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spike-plugin-counts\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[spikeplug]\ncounts = spike_plugin_counts\n")
    code = (
        "import torch\n"
        "from spikeplug.coding.site import in_mode\n"
        "from test_frameworks import Residual, compare, convert\n"
        "spiking, images = convert('counts', torch.float64)\n"
        "dense = Residual().eval()\n"
        "result = compare(spiking, images)\n"
        "with torch.no_grad(), in_mode(spiking, 'dense'):\n"
        "    dense = spiking(images)\n"
        "assert 0 < (result - dense).norm() < 0.1 * dense.norm()\n"
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), here])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
