"""Data that the runner makes itself: images of shapes, a network trained on them, and a text of Python's own help."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

NAMES = ("smoke", "encodings")
"""Suites that need no other data."""

VERSION = 1
SIZE = 16
CLASSES = ("square", "frame", "disc", "ring", "cross", "slash", "bars", "columns")
_TRAIN, _TEST = 160, 25
"""Images of a class."""


def prepare(root: Path | None = None) -> Path:
    """The folder of these data, made at the first call: `shapes/train`, `shapes/test`, `cnn.safetensors`, `text.txt`.

    Args:
        root: where it is kept; by default the user's cache (`XDG_CACHE_HOME`).
    """
    root = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikeplug"
    folder = root / f"embedded-{VERSION}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".embedded-", dir=root))
    try:
        _fill(draft)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def shapes_cnn() -> nn.Module:
    """A small network for these images, untrained; `cnn.safetensors` are its weights."""
    from torch import nn

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16 * (SIZE // 4) ** 2, len(CLASSES)),
    )  # fmt: skip
    net.spikeplug_preprocess = {"size": SIZE, "crop": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}  # type: ignore[assignment]
    return net


def _fill(folder: Path) -> None:
    from pydoc_data.topics import topics

    from PIL import Image

    (folder / "text.txt").write_text("\n".join(topics.values()), encoding="utf-8")
    for part, count, seed in (("train", _TRAIN, 0), ("test", _TEST, 1)):
        for label, images in enumerate(_draw(count, seed)):
            where = folder / "shapes" / part / str(label)
            where.mkdir(parents=True)
            for index, image in enumerate(images):
                Image.fromarray(image).save(where / f"{index:03}.png")
    _train(folder)


def _draw(count: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """For every class images `[count, SIZE, SIZE, 3]`, uint8: a shape somewhere, of some size and colour, in noise."""
    import numpy as np

    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    found = []
    for name in CLASSES:
        images = np.empty((count, SIZE, SIZE, 3), np.uint8)
        for index in range(count):
            cy, cx = random.uniform(5.5, SIZE - 6.5, 2)
            r = random.uniform(3.5, 5.5)
            dy, dx = np.abs(y - cy), np.abs(x - cx)
            inside = np.maximum(dy, dx) <= r
            mask = {
                "square": inside,
                "frame": inside & (np.maximum(dy, dx) > r - 1.5),
                "disc": dy**2 + dx**2 <= r**2,
                "ring": (dy**2 + dx**2 <= r**2) & (dy**2 + dx**2 > (r - 1.5) ** 2),
                "cross": inside & ((dy <= 1) | (dx <= 1)),
                "slash": inside & (np.abs((y - cy) + (x - cx)) <= 1.5),
                "bars": inside & (np.floor(y - cy) % 3 == 0),
                "columns": inside & (np.floor(x - cx) % 3 == 0),
            }[name]
            colour, ground = random.uniform(140, 255, 3), random.uniform(0, 90, 3)
            image = np.where(mask[..., None], colour, ground) + random.normal(0, 22, (SIZE, SIZE, 3))
            images[index] = image.clip(0, 255)
        found.append(images)
    return found


def _train(folder: Path) -> None:
    import numpy as np
    import safetensors.torch
    import torch
    import torch.nn.functional as F

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = shapes_cnn()
        drawn = _draw(_TRAIN, 0)
        x = torch.from_numpy(np.concatenate(drawn)).permute(0, 3, 1, 2).float() / 255
        x = (x - 0.5) / 0.25
        labels = torch.arange(len(CLASSES)).repeat_interleave(_TRAIN)
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(12):
            for rows in torch.split(torch.randperm(len(x)), 64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    safetensors.torch.save_file(net.state_dict(), folder / "cnn.safetensors")
