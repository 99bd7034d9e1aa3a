"""Image networks by name, images from folders and roots."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import spikeplug
from spikeplug.coding.site import in_mode
from spikeplug.errors import OptionError
from spikeplug_vision.images import Images
from spikeplug_vision.models import CIFAR, CifarResNet, open_model


@pytest.fixture
def folder(tmp_path):
    """Two images in each of ten class folders."""
    for label in range(10):
        (tmp_path / "images" / f"{label}").mkdir(parents=True)
        for index in range(2):
            pixels = np.random.default_rng(10 * index + label).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{label}" / f"{index}.png")
    return tmp_path / "images"


def test_flat_folder_has_no_labels_and_a_broken_image_is_named(folder):
    images = Images(folder / "3", CIFAR)
    assert (len(images), images.labels) == (2, None)
    (folder / "3" / "a.png").write_bytes(b"no image")
    with pytest.raises(OptionError, match=r"cannot read the image .*a\.png"):
        list(Images(folder / "3", CIFAR).batches())
    with pytest.raises(OptionError, match="holds no images"):
        Images(_empty(folder), CIFAR)


def _empty(folder):
    (folder.parent / "empty").mkdir()
    return folder.parent / "empty"


def test_classes_are_in_the_order_of_their_numbers_or_names(folder):
    assert Images(folder, CIFAR).labels == [label for label in range(10) for _ in range(2)]
    (folder / "10").mkdir()
    (folder / "0" / "0.png").rename(folder / "10" / "0.png")
    assert Images(folder, CIFAR).labels[-1] == 10


def test_cifar_root(tmp_path):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 3]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(index) for index in range(10)]}))
    with pytest.raises(OptionError, match="Dataset not found or corrupted"):
        Images(tmp_path, CIFAR)  # torchvision checks the files' sums


def test_imagenet_root_uses_val_and_prepares_images(tmp_path):
    for part, value in (("train", 0), ("val", 255)):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (300, 400), (value,) * 3).save(tmp_path / part / name / "0.jpeg")
    preprocess = {"size": 256, "crop": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    images = Images(tmp_path, preprocess)
    (batch,) = images.batches()
    assert (batch.shape, images.labels) == ((2, 3, 224, 224), [0, 1])
    assert float(batch.min()) == pytest.approx(1, abs=0.01)
    assert float(next(Images(tmp_path, preprocess, train=True).batches()).max()) == pytest.approx(-1, abs=0.01)


def test_pickled_code_in_weights_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(OptionError, match="cannot read weights"):
        open_model("cifar_resnet8", tmp_path / "evil.pth")
    torch.save({"state_dict": CifarResNet(8).state_dict()}, tmp_path / "good.pth")
    open_model("cifar_resnet8", tmp_path / "good.pth")


@torch.no_grad()
@pytest.mark.parametrize("size", [65])
def test_layers_of_timm_convert(size):
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    x = torch.randn(2, 3, size, size)
    dense = net(x)
    spiking = spikeplug.convert(net, "bse", calibration=[x])
    assert (spiking(x) - dense).norm() < 0.02 * dense.norm()
    assert {op.role for op in spikeplug.report(spiking).ops} <= {"spiking", "neuron", "folded"}
    assert torch.equal(net(x), dense)


NETWORKS = ["resnet18", "resnet34", "resnet50", "vgg16_bn", "mobilenet_v2", "tf_efficientnet_lite0"]
NETWORKS += ["squeezenet1_1", "densenet121", "googlenet"]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("recipe", ["css", "bse"])
@pytest.mark.parametrize("name", NETWORKS)
def test_well_known_networks_convert_with_default_options(name, recipe):
    torch.manual_seed(0)
    net = open_model(name)
    x = torch.randn(1, 3, 224, 224)
    dense = net(x)
    spiking = spikeplug.convert(net, recipe, calibration=[x])
    with in_mode(spiking, "dense"):
        torch.testing.assert_close(spiking(x), dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))
    assert (spiking(x) - dense).norm() < 0.1 * dense.norm()
    assert {op.role for op in spikeplug.report(spiking).ops} <= {"spiking", "neuron", "coded", "decoded", "folded"}


@torch.no_grad()
def test_torchvision_resnet_converts_and_knows_its_images():
    torch.manual_seed(0)
    net = open_model("resnet18")
    assert net.spikeplug_preprocess["crop"] == 224
    x = torch.randn(1, 3, 64, 64)
    dense = net(x)
    spiking = spikeplug.convert(net, "css", calibration=[x])
    assert spikeplug.report(spiking).delay == 12 + 17  # T and a silent step of each of the 17 layers of neurons
    assert (spiking(x) - dense).norm() < 0.1 * dense.norm()
    assert isinstance(net, torchvision.models.ResNet)
    assert isinstance(spiking, nn.Module)
