"""Image networks on the command line: converted, measured in every framework, diagnosed; mistakes are named."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from spikeplug_vision.models import CifarResNet


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


def test_a_dry_run_prints_the_plan_and_writes_nothing(cli, folder, weights, tmp_path):
    arguments = ("convert", "cifar_resnet8", "--weights", weights, "--recipe", "css", "--images", folder, "--dry-run")
    code, plan, err = cli(*arguments, "--json")
    assert code == 0, err
    assert (plan["network"], plan["problems"], plan["delay"]) == ("CifarResNet", [], 12 + 7)
    # 3 x 3 kernels: 3 to 16 channels, two layers of 16, 16 to 32 at half the size and one of 32, likewise 64; the head.
    macs = 1024 * 9 * (3 * 16 + 2 * 16 * 16) + 256 * 9 * (16 * 32 + 32 * 32) + 64 * 9 * (32 * 64 + 64 * 64) + 640
    assert sum(op["macs"] for op in plan["ops"]) == macs
    code, text, _ = cli(*arguments)
    assert text.startswith("CifarResNet, recipe css: ")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "net.safetensors"}
    code, _, err = cli(*arguments[:-1])
    assert (code, "give --out FOLDER, or --dry-run" in err) == (1, True)


def test_window_codes_too(cli, folder, weights, tmp_path):
    code, _, err = cli(
        "convert", "cifar_resnet8", "--weights", weights, "--recipe", "rate", "--images", folder,
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert code == 0, err
    code, result, _ = cli("eval", tmp_path / "o", "--images", folder, "--execution", "stepped", "--count", 4, "--json")
    assert result["spiking"]["steps_to_result"] == 32 * 8
    code, _, err = cli("eval", tmp_path / "o", "--images", folder, "--framework", "snntorch")
    assert (code, "error: only networks of streaming codes" in err) == (1, True)


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
