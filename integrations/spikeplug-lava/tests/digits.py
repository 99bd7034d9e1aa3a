"""Two small networks for digits, trained in seconds, and their conversions: `digits.py FOLDER` exports them all."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import spikeplug
from spikeplug_lava.exporter import Lava

TRAINED = 1200
RECIPES = {
    "tsa": ("css", {"steps": 8}),
    "tsa-relu": ("css", {"steps": 10}),
    "tsa-relu-2": ("css-q", {}),
    "bse": ("bse", {"steps": 8}),
    "ttfs": ("ttfs", {"steps": 32}),
    "phase": ("base2-round", {"steps": 8}),
    "rate": ("rate", {"steps": 32}),
}
"""What is exported -> recipe and options. Those of `tsa` lack activations, so that neurons carry signed sums."""


class Residual(nn.Module):
    """A block with a skip, strides, groups, padding and average pooling."""

    def __init__(self, activation: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Linear(24 * 4, 10)
        self.act = nn.ReLU() if activation else nn.Identity()
        self.relu = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = self.act(self.norm(self.second(x)) + x)
        x = self.pool(self.relu(self.third(x)))
        return self.last(x.flatten(1))


def data() -> tuple[Tensor, Tensor]:
    """Images `[1797, 1, 8, 8]` from 0 to 1, and labels."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def trained(kind: str, activation: bool = True) -> nn.Module:
    """`mlp` or `cnn`, trained on the first 1,200 images."""
    torch.manual_seed(0)
    act = nn.ReLU if activation else nn.Identity
    net: nn.Module = Residual(activation)
    if kind == "mlp":
        layers = [nn.Linear(64, 64), act(), nn.Linear(64, 32), act(), nn.Linear(32, 10)]
        net = nn.Sequential(nn.Flatten(), *layers)
    x, y = data()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2)
    for _ in range(400):
        chosen = torch.randint(0, TRAINED, (128,))
        loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def converted(net: nn.Module, name: str) -> nn.Module:
    """A trained network under one of `RECIPES`."""
    recipe, options = RECIPES[name]
    x, _ = data()
    structure = {} if recipe.startswith("css") else {"structure": "graph"}
    return spikeplug.convert(copy.deepcopy(net), recipe, calibration=list(x[:512].split(128)), **options, **structure)


def held_out(count: int = 597) -> list[tuple[Tensor, Tensor]]:
    """Images that were not trained on, with their labels, in batches."""
    x, y = data()
    return list(zip(x[TRAINED : TRAINED + count].split(200), y[TRAINED : TRAINED + count].split(200), strict=True))


def main(folder: Path, golden: int = 100) -> None:
    """Export every network under every recipe, with golden spikes."""
    torch.set_num_threads(1)
    for kind in ("mlp", "cnn"):
        nets = {True: trained(kind), False: trained(kind, activation=False)}
        for name in RECIPES:
            model = converted(nets[name != "tsa"], name)
            report = Lava(golden=golden).export(model, folder / f"{kind}-{name}.safetensors", held_out())
            print(f"{kind} {name:<11}", {key: round(value, 4) for key, value in report["accuracy"].items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
