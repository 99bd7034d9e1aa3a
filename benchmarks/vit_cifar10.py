"""A small vision transformer for CIFAR-10: trained here, then converted under several recipes.

    python benchmarks/vit_cifar10.py train --data DATA --weights vit.safetensors [--epochs 16] [--threads 2]
    python benchmarks/vit_cifar10.py measure --data DATA --weights vit.safetensors [--count 1000]

DATA holds CIFAR-10 as cifar10/*.npz. Training keeps its state beside the weights after every epoch and goes on from
there. All rows of the table are measured in one process on the same images.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from cnn_tables import cifar, run
from torch import Tensor, nn

import spikeplug

RECIPES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bse", {"steps": 8}),
    ("bse", {"steps": 8, "granularity": "channel"}),
    ("bse", {"steps": 8, "granularity": "token"}),
    ("bse", {"steps": 9}),
    ("bse", {"steps": 10}),
    ("phase", {"steps": 8}),
    ("phase", {"steps": 7}),
    ("css", {}),
    ("ttfs", {}),
)
BATCH = 128
CALIBRATION = 256


class ViT(nn.Module):
    """Two strided convolutions make 64 tokens; pre-norm encoder layers; the mean of the tokens is classified.

    `[B, 3, 32, 32]` -> `[B, 10]`. Convolutions ahead of a transformer: Xiao et al., "Early convolutions help
    transformers see better", 2021.
    """

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.encoder(tokens)).mean(1))


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images `[B, 3, 32, 32]` shifted by up to 4 pixels, half of them mirrored."""
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, len(x)), generator=generator)
    rows, columns = (start[:, None] + torch.arange(32) for start in (top, left))
    samples = torch.arange(len(x))[:, None, None]
    cut = padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], cut.flip(3), cut)


def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((run(net, x)[0].argmax(1) == labels).float().mean())


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    files = sorted(each.name for each in (arguments.data / "cifar10").glob("train_*.npz"))
    parts = [cifar(arguments.data, file, None) for file in files]
    x, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    net = ViT()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    per_epoch = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=arguments.epochs * per_epoch)
    state = arguments.weights.with_suffix(".state")
    begin = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        begin = kept["epoch"]
        for name, part in (("net", net), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(kept[name])
    for epoch in range(begin, arguments.epochs):
        start, total = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(epoch)
        net.train()
        for batch in torch.randperm(len(x), generator=generator)[: per_epoch * BATCH].split(BATCH):
            loss = F.cross_entropy(net(augmented(x[batch], generator)), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        parts_kept = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({"epoch": epoch + 1, **parts_kept}, state)
        seconds = time.perf_counter() - start
        sys.stderr.write(f"epoch {epoch + 1} of {arguments.epochs}: loss {total / per_epoch:.3f}, {seconds:.0f} s\n")
    net.eval()
    safetensors.torch.save_file(net.state_dict(), arguments.weights)
    held_out = cifar(arguments.data, "test_public.npz", None)
    print(f"{len(x)} images, {arguments.epochs} epochs: top-1 {accuracy(net, *held_out):.2%} of {len(held_out[1])}")


def measure(arguments: argparse.Namespace) -> None:
    net = ViT()
    net.load_state_dict(safetensors.torch.load_file(arguments.weights))
    net.eval()
    x, labels = cifar(arguments.data, "test_public.npz", arguments.count)
    known, _ = cifar(arguments.data, "train_shard0of5.npz", CALIBRATION)
    dense, cost = run(net, x)
    print(
        f"dense: top-1 {float((dense.argmax(1) == labels).float().mean()):.2%} of {len(x)}, {cost:.1f} ms per image\n"
    )
    print("| recipe | options | top-1 | agreement | first 1,000 | error | spiking | decoded | dense | steps | ms |")
    print("| --- " * 11 + "|")
    for recipe, options in RECIPES:
        spiking = spikeplug.convert(net, recipe, calibration=list(known.split(64)), **options)
        found, cost = run(spiking, x)
        report = spikeplug.report(spiking)
        shares = " | ".join(f"{report.share(role):.1%}" for role in ("spiking", "decoded", "dense"))
        top = float((found.argmax(1) == labels).float().mean())
        same = (found.argmax(1) == dense.argmax(1)).float()
        agree = f"{same.mean():.2%} | {same[:1000].mean():.2%} | {(found - dense).norm() / dense.norm():.4f}"
        said = ", ".join(f"{key}={value}" for key, value in options.items()) or "default"
        print(f"| {recipe} | {said} | {top:.2%} | {agree} | {shares} | {report.delay:,} | {cost:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"train": train, "measure": measure}[arguments.what](arguments)


if __name__ == "__main__":
    main()
