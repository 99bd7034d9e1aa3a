"""Image networks by name, images from folders and roots, and the command line for both."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import spikeplug
from spikeplug.cli import main
from spikeplug.errors import OptionError
from spikeplug_vision.images import Images
from spikeplug_vision.models import CIFAR, CifarResNet, open_model, take_apart


@pytest.fixture
def cli(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["spikeplug", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and not code else out, err

    return run


@pytest.fixture
def folder(tmp_path):
    """Two images in each of ten class folders."""
    for label in range(10):
        (tmp_path / "images" / f"{label}").mkdir(parents=True)
        for index in range(2):
            pixels = np.random.default_rng(10 * index + label).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{label}" / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    net = CifarResNet(8)
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_convert_and_eval_by_command_line(cli, folder, weights, tmp_path):
    out = tmp_path / "out"
    code, result, err = cli(
        "convert", "cifar_resnet8", "--weights", weights, "--recipe", "css", "--images", folder, "--count", 8,
        "--out", out, "-s", "steps=10", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert result["report"]["delay"] == 10 + 7
    found = {}
    for framework in ("torch", "spikingjelly", "snntorch"):
        code, found[framework], err = cli("eval", out, "--images", folder, "--framework", framework, "--json")
        assert code == 0, err
    assert len({each["dense"]["top1"] for each in found.values()}) == 1
    assert found["torch"]["spiking"]["agreement"] > 0.5
    assert found["torch"]["energy"]["acs"] > 0
    assert found["torch"]["protocol"]["images"] == "images, 20 images"
    code, text, _ = cli("eval", out, "--images", folder, "--count", 5)
    assert "of predictions agree; in torch, 17 steps to the result" in text
    code, rows, _ = cli("diagnose", out, "--images", folder, "--json")
    assert [row["kind"] for row in rows] == ["image", *["relu"] * 7]
    assert all(row["residual"] < 1 for row in rows[1:])
    code, text, _ = cli("diagnose", out, "--images", folder, "--count", 3)
    assert "layer3.0.relu_1" in text
    code, text, _ = cli("eval", "cifar_resnet8", "--weights", weights, "--images", folder)
    assert text.count("top-1") == 1


def test_window_codes_too(cli, folder, weights, tmp_path):
    code, _, err = cli(
        "convert", "cifar_resnet8", "--weights", weights, "--recipe", "rate", "--images", folder,
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert code == 0, err
    code, result, _ = cli("eval", tmp_path / "o", "--images", folder, "--execution", "stepped", "--count", 4, "--json")
    assert result["spiking"]["steps_to_result"] == 32 * 8
    code, _, err = cli("eval", tmp_path / "o", "--images", folder, "--framework", "snntorch")
    assert (code, "error: only networks whose trains flow" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "resnet19", "--images", "{folder}"], "no network 'resnet19', did you mean 'resnet"),
        (["eval", "cifar_resnet9", "--images", "{folder}"], "depths are 6 n + 2"),
        (["eval", "cifar_resnet8"], "what to work on is missing: give --ppl TEXT, or --images"),
        (["eval", "cifar_resnet8", "--images", "{folder}/none"], "is no folder of images"),
        (["eval", "cifar_resnet8", "--images", "{folder}/0", "--count", "0"], "--count 0: at least 1"),
        (
            ["eval", "cifar_resnet8", "--images", "{folder}", "--framework", "snntorch"],
            "a dense network has no neurons",
        ),
        (["diagnose", "cifar_resnet8", "--images", "{folder}"], "has no spiking site"),
        (["eval", "cifar_resnet8", "--images", "{folder}", "--ppl", "x"], "--ppl is for language models"),
        (
            ["eval", "cifar_resnet14", "--weights", "{weights}", "--images", "{folder}"],
            "do not fit CifarResNet: Missing",
        ),
        (["eval", "json:dumps", "--images", "{folder}"], "'json:dumps' cannot be called: TypeError"),
        (["eval", "nothing.here:f", "--images", "{folder}"], "cannot be called: ModuleNotFoundError"),
        (
            ["convert", "cifar_resnet8", "--images", "{folder}", "--recipe", "qc-a2s", "--out", "{folder}/o"],
            "recipe 'qc-a2s' is meant for lm, not for 'module'",
        ),
        (
            [
                "convert",
                "cifar_resnet8",
                "--images",
                "{folder}",
                "--recipe",
                "css",
                "-s",
                "beta=3",
                "--out",
                "{folder}/o",
            ],
            "beta=3.0: a number above 1, at most 2",
        ),
        (
            [
                "convert",
                "cifar_resnet8",
                "--images",
                "{folder}",
                "--recipe",
                "css",
                "-s",
                "steps=0",
                "--out",
                "{folder}/o",
            ],
            "steps=0: a whole number from 1",
        ),
    ],
)
def test_mistakes_are_named(cli, folder, weights, arguments, message):
    code, _, err = cli(*(each.format(folder=folder, weights=weights) for each in arguments))
    assert code == 1
    assert message in err
    assert err.strip().splitlines()[-1].startswith("error: ")


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
def test_timm_layers_are_taken_apart(tmp_path):
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    x = torch.randn(1, 3, 65, 65)
    before = net(x)
    take_apart(net)
    torch.testing.assert_close(net(x), before)
    assert not any(type(module).__name__ in ("BatchNormAct2d", "Conv2dSame") for module in net.modules())


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
    with spiking.observing():
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
    assert spiking.delay == 12 + 17  # T and a silent step of each of the 17 layers of neurons
    assert (spiking(x) - dense).norm() < 0.1 * dense.norm()
    assert isinstance(net, torchvision.models.ResNet)
    assert isinstance(spiking, nn.Module)
