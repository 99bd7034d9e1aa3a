from __future__ import annotations

import dataclasses
import sys
import types
from typing import ClassVar

import pytest
import torch
from torch import nn

import spikeplug
from spikeplug import plugins
from spikeplug.coding.rate import IF, Rate
from spikeplug.coding.types import Recipe
from spikeplug.plugins import registry


@pytest.fixture
def fresh_registry():
    """A registry that looks for plugins anew, before and after the test."""
    registry.cache_clear()
    yield registry
    registry.cache_clear()


@pytest.fixture
def network():
    """Builds a small convolutional network, the same one each time."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        ).eval()

    return build


@pytest.fixture
def images():
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def spiking(network, images):
    return spikeplug.convert(network(), "rate", calibration=[images], steps=64)


# A third party's package: a code and a neuron, nothing of core touched.
@dataclasses.dataclass(frozen=True)
class Streaming(Rate):
    """Spike counts that stream: d(t) = 1."""

    name: ClassVar[str] = "streaming"
    streams: ClassVar[bool] = True

    def fit(self, stats):
        p = super().fit(stats)
        return dataclasses.replace(p, scale=p.scale.reshape(()), offset=p.offset.reshape(()))


@dataclasses.dataclass(frozen=True)
class LateIF(IF):
    """IF that adds up for some silent steps and rectifies in the end, by spikes of -1."""

    silent: int = 2
    rectify: bool = False

    name: ClassVar[str] = "late-if"

    @property
    def latency(self):
        return self.silent

    def activated(self, op, top=float("inf"), steps=0):
        return (
            dataclasses.replace(self, rectify=op != "identity") if op in ("identity", "relu") else super().activated(op)
        )

    def init(self, x):
        return (0, torch.zeros_like(x), torch.zeros_like(x))

    def step(self, x, state):
        t, h, g = state
        h = h + x
        if t < self.silent:
            return torch.zeros_like(h), (t + 1, h, g)
        o = (h.clamp(min=0) if self.rectify else h) - g
        s = (o >= 0.5).to(h.dtype) - (o <= -0.5).to(h.dtype)
        return s, (t + 1, h, g + s)

    def residual(self, state):
        return (state[1].clamp(min=0) if self.rectify else state[1]) - state[2]


@pytest.fixture
def third_party(monkeypatch):
    """The package of a third party, installed: its module."""
    package = types.ModuleType("third_party")
    package.Streaming, package.LateIF = Streaming, LateIF
    package.RECIPE = Recipe(
        "streaming", "a third party's", encoder="streaming", neuron="late-if", encoder_options={"steps": 64},
        targets=frozenset({"module"}),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "third_party", package)
    for kind, name, what in (
        ("encoder", "streaming", "Streaming"), ("neuron", "late-if", "LateIF"), ("recipe", "streaming", "RECIPE"),
    ):  # fmt: skip
        part = plugins.Part(kind, name, f"third_party:{what}", "theirs")
        monkeypatch.setitem(plugins.registry().parts, (kind, name), [part])
    return package
