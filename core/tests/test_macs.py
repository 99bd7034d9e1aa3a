"""Multiply-accumulates of the report, beside counts made by hand, network by network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spikeplug


class Owner(nn.Module):
    """A parent that owns a weight, and works on its image before a layer does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4 * 36))
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.linear(torch.relu(self.conv(x)).flatten(1), self.weight)


class Preprocessed(nn.Module):
    """Bytes in, scaled, normalized and enlarged by functions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("mean", torch.rand(3, 1, 1))

    def forward(self, x):
        x = F.interpolate((x.float() / 255 - self.mean) / 0.25, scale_factor=2)
        return self.conv(x).mean((2, 3))


class Attention(nn.Module):
    """Two heads of three features over the places of an image."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.mT / 3**0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


class Gate(nn.Module):
    """Squeeze and excitation: the gates come of the mean of the whole map."""

    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return (x * gate).mean((2, 3))


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))


IMAGE, BYTES = torch.randn(2, 3, 8, 8), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(2, 6), 6 * 5 + 5 * 4),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1)), IMAGE, 4 * 16 * 3 * 9),
    "groups and dilation": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, dilation=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        IMAGE, 6 * 16 * 1 * 9 + 2 * 16 * 6,
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2)), IMAGE, 3 * 64 * 4 * 4),
    "sequence of signals": (lambda: nn.Sequential(nn.Conv1d(3, 4, 5, padding=2)), torch.randn(2, 3, 16), 4 * 16 * 15),
    "owner": (Owner, IMAGE, 4 * 36 * 27 + 5 * 4 * 36),
    "preprocessed": (Preprocessed, BYTES, 4 * 256 * 27),
    "attention": (Attention, torch.randn(2, 10, 6), 10 * 6 * 18 + 2 * 10 * 10 * 3 * 2 + 10 * 6 * 2),
    "gate": (Gate, IMAGE, 8 * 36 * 27 + 8 * 2 * 2),
    "twice": (Twice, torch.randn(2, 6), 2 * 36 + 18),
    "normalized": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)),
        IMAGE, 4 * 36 * 27 + 8,
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
        torch.randint(0, 11, (2, 7)), 7 * (24 + 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["rate", "css"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_sum_is_the_count_by_hand(name, recipe):
    build, batch, by_hand = NETWORKS[name]
    torch.manual_seed(0)
    net = build().eval()
    plan = spikeplug.plan(net, recipe, batch)
    assert sum(op.macs for op in plan.report.ops) == by_hand
    # They are those of one sample, however many there are.
    converted = spikeplug.convert(net, recipe, calibration=[torch.cat([batch, batch[:1]])], verify=False)
    assert spikeplug.report(converted).ops == plan.report.ops
