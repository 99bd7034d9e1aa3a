"""Exported networks on Lava's CPU simulator, spike by spike. `make test-lava` makes the files and runs this."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from spikeplug_lava_runtime import load, verify
from spikeplug_lava_runtime.cli import main

pytest.importorskip("lava", reason="Lava is not installed; it needs Python 3.10: make test-lava")
FOLDER = Path(os.environ.get("SPIKEPLUG_BUNDLES", "none"))
FILES = sorted(FOLDER.glob("*.safetensors"))

pytestmark = [pytest.mark.skipif(not FILES, reason="SPIKEPLUG_BUNDLES names no folder of exported networks")]


def run_on_lava(*given, **options):
    from spikeplug_lava_runtime.on_lava.simulate import run_on_lava

    return run_on_lava(*given, **options)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_spike_is_the_golden_one(path, capfd):
    assert main(["verify", str(path), "--backend", "lava"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("Lava CPU simulator, integer model: PASS")
    assert "Not run on Loihi 2." in out
    network = load(path)
    assert network.samples == 100
    assert verify(network, "numpy").passed


def differing(network, **options) -> int:
    first = network.populations[0]["name"]
    result = run_on_lava(network, network.golden(first)[:, :4], **options)
    return sum(int((spikes != network.golden(name)[:, :4]).sum()) for name, spikes in result.spikes.items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_flipped_weight_is_found(path):
    network = load(path)
    name = f"{network.populations[1]['name']}.0.weight"
    weight = network.tensors[name].copy()
    place = np.unravel_index(np.abs(weight.astype(int)).argmax(), weight.shape)
    weight[place] = -weight[place]
    network.tensors[name] = weight
    assert differing(network) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_offset_of_a_step_is_found(path):
    assert differing(load(path), shift=1) > 0


@pytest.mark.parametrize(
    "path", [path for path in FILES if "tsa" in path.stem or "phase" in path.stem], ids=lambda p: p.stem
)
def test_unary_messages_are_found(path):
    network = load(path)
    ternary = any((network.golden(each["name"]) < 0).any() for each in network.populations[:-1])
    assert network.code != "css" or ternary
    assert differing(network, message_bits=0) > 0


@pytest.mark.parametrize("name", ["mlp-tsa-relu", "cnn-bse"])
def test_energy_is_that_of_the_events(name, capfd):
    """SANA-FE's counts are ours, and its synapses cost what they must."""
    pytest.importorskip("sanafe")
    path = next(path for path in FILES if path.stem == name)
    assert main(["energy", str(path), "--samples", "2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["simulated"] == found["events"]
    assert found["energy_j"]["synapse"] == pytest.approx(found["events"]["synaptic"] * 33.6e-12)
    assert "Loihi 1" in found["assumptions"]
    assert "not Loihi 2" in found["assumptions"]
