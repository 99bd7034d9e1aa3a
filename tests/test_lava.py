"""`spikeplug export` and the documents of the integer networks; ResNet-20 on CIFAR-10 where the data is."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SPIKEPLUG_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted network with weights at random, and images in class folders, where README's commands expect them."""
    folder = tmp_path_factory.mktemp("lava")
    for label in range(10):
        (folder / "cifar10" / f"{label}").mkdir(parents=True)
        pixels = np.random.default_rng(label).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "cifar10" / f"{label}" / "0.png")
    command = ["convert", "cifar_resnet8", "--recipe", "css", "-s", "steps=6", "--images", "cifar10", "--out"]
    run(["spikeplug", *command, "resnet20-css"], folder)
    return folder


def run(command, folder, code=0):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def commands(document: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / document).read_text(), flags=re.M | re.S)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]


def test_commands_of_the_documents_run(folder):
    lines = commands("integrations/spikeplug-lava/README.md")
    assert [line.split()[0] for line in lines] == ["spikeplug", "spikeplug", "spikeplug-lava"]
    out = [run(["bash", "-c", line], folder) for line in lines]
    assert "layer3.0.relu_1" in out[0]
    assert "agreement  converted with dense" in out[0]
    assert "accuracy   dense" in out[0]
    assert "PASS" in out[2]
    assert "Not run on Loihi 2." in out[2]
    (folder / "net.safetensors").write_bytes((folder / "resnet20.safetensors").read_bytes())
    lines = commands("integrations/spikeplug-lava-runtime/README.md")
    assert len(lines) == 5
    assert "code css, 6 steps" in run(["bash", "-c", lines[0]], folder)
    assert "PASS" in run(["bash", "-c", lines[1]], folder)
    assert "spikes per neuron and sample" in run(["bash", "-c", lines[3]], folder)
    # Where a package is missing, the command says which.
    for line, package in ((lines[2], "lava"), (lines[4], "sanafe")):
        if find_spec(package) is None:
            assert f"pip install 'spikeplug-lava-runtime[{package}]'" in run(["bash", "-c", line], folder, code=1)


def test_export_refuses_in_one_line(cli, folder, tmp_path):
    (tmp_path / "there").write_text("")
    model = folder / "resnet20-css"
    images = ["--images", folder / "cifar10"]
    for arguments, message in (
        (["export", model, "--to", "lavo", "--out", tmp_path / "x", *images], "did you mean 'lava'?"),
        (["export", model, "--to", "lava", "--out", tmp_path / "there", *images], "there exists: choose another file"),
        (["export", model, "--to", "lava", "--out", tmp_path, *images], "is a folder: choose another file"),
        (["export", model, "--to", "lava", "--out", tmp_path / "x"], "give some, on the command line --images FOLDER"),
        (["export", model, "--to", "lava", "--out", tmp_path / "x", *images, "--count", 0], "--count 0: at least 1"),
        (["export", model, "--to", "lava", "--out", tmp_path / "x", *images, "-s", "golden=-1"], "golden=-1"),
        (["export", folder, "--to", "lava", "--out", tmp_path / "x", *images], "is no saved model"),
    ):
        code, _, err = cli(*arguments)
        assert code == 1
        assert message in err
        assert err.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def test_a_dense_network_is_refused(cli, folder, tmp_path):
    arguments = ["--to", "lava", "--out", tmp_path / "x", "--images", folder / "cifar10"]
    code, _, err = cli("export", "cifar_resnet8", *arguments)
    assert (code, err.count("\n")) == (1, 1)
    assert "convert it with spikeplug.convert first" in err


def cifar(name: str, count: int, net):
    """Images `[B, 3, 32, 32]`, prepared for a network, and labels."""
    import torch

    with np.load(DATA / "cifar10" / name) as data:
        raw, offsets, labels = data["webp"].tobytes(), data["offsets"][: count + 1], data["labels"][:count]
    files = [io.BytesIO(raw[start:end]) for start, end in itertools.pairwise(offsets)]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    mean, std = (torch.tensor(net.spikeplug_preprocess[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std, torch.from_numpy(labels.astype(int))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"no test data at {DATA}: set SPIKEPLUG_TEST_DATA")
@pytest.mark.parametrize(("recipe", "options"), [("css", {}), ("css-q", {}), ("bse", {"steps": 8}), ("ttfs", {})])
def test_resnet20_equals_its_integer_module(recipe, options, tmp_path):
    import spikeplug
    from spikeplug_lava.exporter import Lava
    from spikeplug_lava_runtime import load, verify
    from spikeplug_vision.models import open_model

    net = open_model("cifar_resnet20", DATA / "models" / "cifar10_resnet20.safetensors")
    calibration, _ = cifar("train_shard0of5.npz", 256, net)
    model = spikeplug.convert(net, recipe, calibration=list(calibration.split(32)), **options)
    samples = [cifar("test_public.npz", 64, net)]
    report = Lava(golden=20, fitted=32).export(model, tmp_path / "net.safetensors", samples)
    verdict = verify(load(tmp_path / "net.safetensors"))
    assert verdict.passed, str(verdict)
    assert verdict.samples == 20
    assert report["agreement"]["integer with dense"] >= 0.9
