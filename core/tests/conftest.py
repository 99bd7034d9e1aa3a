from __future__ import annotations

import pytest
import torch
from torch import nn

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
