"""Saved networks: bit-equal again, damage found, and nothing lost where a save fails."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import spikeplug
from spikeplug import ConversionConfig
from spikeplug.coding.site import sites
from spikeplug.conversion.bundle import _digest
from spikeplug.errors import (
    BundleError,
    CalibrationError,
)


def test_tied_weights_reload(images, tmp_path):
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
        net[2].weight = net[1].weight
        return net

    net = spikeplug.convert(build(), "rate", calibration=[images])
    spikeplug.save(net, tmp_path / "net")
    assert torch.equal(spikeplug.load(tmp_path / "net")(images), net(images))


def test_layer_by_layer_another_network_or_dtype_is_refused(network, images, tmp_path):
    dense = network()
    spiking = spikeplug.convert(dense, "rate", calibration=[images], structure="layers")
    spikeplug.save(spiking, tmp_path / "net")
    loaded = spikeplug.load(tmp_path / "net", model=dense)
    assert torch.equal(loaded(images), spiking(images))
    assert spikeplug.report(loaded) == spikeplug.report(spiking)
    with pytest.raises(BundleError, match="does not fit the given Sequential"):
        spikeplug.load(tmp_path / "net", model=nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(BundleError, match=r"'0.weight' is torch.float32, the given network's is torch.float64"):
        spikeplug.load(tmp_path / "net", model=network().double())
    with pytest.raises(BundleError, match="converted layer by layer: give the dense network"):
        spikeplug.load(tmp_path / "net")


def test_execution_is_that_of_the_saved_model(spiking, network, tmp_path):
    spikeplug.save(spikeplug.set_execution(spiking, "stepped"), tmp_path / "net")
    assert {site.mode for site in sites(spikeplug.load(tmp_path / "net")).values()} == {"stepped"}


def test_save_and_load_are_bit_equal(spiking, network, images, tmp_path):
    os.umask(0o022)
    spikeplug.save(spiking, tmp_path / "net")
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "net").iterdir()} == {0o644}
    loaded = spikeplug.load(tmp_path / "net")
    assert torch.equal(loaded(images), spiking(images))
    assert [op.macs for op in spikeplug.report(loaded).ops] == [op.macs for op in spikeplug.report(spiking).ops]
    assert spikeplug.conversion_of(loaded) == spikeplug.conversion_of(spiking)


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "no manifest", "bad manifest", "newer", "steps", "no config", "traversal"]
)
def test_damaged_folder_is_refused(spiking, network, tmp_path, damage):
    folder = tmp_path / "net"
    spikeplug.save(spiking, folder)
    weights, manifest = folder / "model.safetensors", folder / "spikeplug.json"
    content = json.loads(manifest.read_text())
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("{}")
    elif damage == "newer":
        manifest.write_text(json.dumps({**content, "format": 99}))
    elif damage == "steps":
        content["config"]["encoder_options"]["steps"] = 4
        manifest.write_text(json.dumps(content))
    elif damage == "no config":
        del content["config"]
        manifest.write_text(json.dumps(content))
    else:
        content["files"] = {"../x": "0"}
        manifest.write_text(json.dumps({**content, "digest": _digest(content)}))
    with pytest.raises(BundleError, match="net"):
        spikeplug.load(folder)


@pytest.mark.parametrize("moment", ["weights", "manifest", "interrupt", "replace", "full"])
def test_failed_save_leaves_the_old_folder_and_nothing_else(spiking, network, images, tmp_path, monkeypatch, moment):
    folder = tmp_path / "net"
    spikeplug.save(spiking, folder)

    def fail(*_, **__):
        if moment == "full":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise KeyboardInterrupt if moment == "interrupt" else OSError(28, "No space left on device")

    replace = os.replace
    if moment == "replace":
        monkeypatch.setattr("os.replace", lambda a, b: fail() if b == folder and "old" not in a.name else replace(a, b))
    elif moment == "manifest":
        monkeypatch.setattr("spikeplug.conversion.bundle._sync", fail)
    else:
        monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(KeyboardInterrupt if moment == "interrupt" else BundleError):
        spikeplug.save(spiking, folder, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert torch.equal(spikeplug.load(folder)(images), spiking(images))


def test_existing_folder_is_not_overwritten_unasked(spiking, tmp_path):
    spikeplug.save(spiking, tmp_path / "net")
    with pytest.raises(BundleError, match="exists"):
        spikeplug.save(spiking, tmp_path / "net")
    spikeplug.save(spiking, tmp_path / "net", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "photo").write_text("precious")
    with pytest.raises(BundleError, match="is no saved model and is not overwritten"):
        spikeplug.save(spiking, tmp_path / "home", overwrite=True)


def test_uncalibrated_model_says_what_to_do(network, images, tmp_path):
    net = spikeplug.prepare(network(), ConversionConfig.resolve("rate", {}), [images])
    with pytest.raises(CalibrationError, match=r"site '0' is not calibrated: call spikeplug\.calibrate"):
        net(images)
    with pytest.raises(CalibrationError, match="before saving"):
        spikeplug.save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())
    spikeplug.calibrate(net, [images])
    net(images)


@pytest.mark.parametrize("recipe", ["rate", "streaming"])
def test_pickled_and_copied_networks_are_bit_equal(network, images, recipe, third_party, tmp_path):
    spiking = spikeplug.convert(network(), recipe, calibration=[images])
    spikeplug.set_execution(spiking, "stepped")
    torch.save(spiking, tmp_path / "whole.pt")
    for other in (
        copy.deepcopy(spiking), pickle.loads(pickle.dumps(spiking)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ):  # fmt: skip
        assert torch.equal(other(images), spiking(images))
        assert spikeplug.report(other) == spikeplug.report(spiking)
        assert spikeplug.conversion_of(other).config == spikeplug.conversion_of(spiking).config
        assert not other.training
