"""NIR graphs: they come back to the bit, and readers that do not know our neurons refuse them."""

from __future__ import annotations

import json

import h5py
import nir
import numpy as np
import pytest
import torch

from spikeplug.errors import BundleError, ConversionError
from spikeplug_lava.exporter import Lava
from spikeplug_lava.integer import IntegerNetwork
from spikeplug_lava.nir import NIR, read_nir, to_nir, write_nir
from spikeplug_lava_runtime import load


@pytest.mark.parametrize(("kind", "name"), [("mlp", "tsa-relu"), ("cnn", "tsa-relu"), ("cnn", "bse"), ("cnn", "phase")])
def test_a_network_comes_back(exported, digits, tmp_path, kind, name):
    bundle = load(exported(kind, name)[1])
    write_nir(bundle, tmp_path / "net.nir")
    again = read_nir(tmp_path / "net.nir")
    assert again.graph == bundle.graph
    wanted = {name: each for name, each in bundle.tensors.items() if not name.startswith("golden.")}
    assert set(again.tensors) == set(wanted)
    for name, each in wanted.items():
        assert again.tensors[name].dtype == each.dtype
        assert np.array_equal(again.tensors[name], each)
    x = digits.held_out(20)[0][0]
    assert torch.equal(IntegerNetwork(again)(x), IntegerNetwork(bundle)(x))


def test_foreign_readers_refuse(exported, tmp_path):
    write_nir(load(exported("cnn", "tsa-relu")[1]), tmp_path / "net.nir")
    with pytest.raises((AssertionError, ValueError)):
        nir.read(tmp_path / "net.nir")


def test_there_is_no_stand_in_for_a_neuron(exported):
    graph = to_nir(load(exported("cnn", "tsa-relu")[1]))
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert "SpikeplugNeurons" in kinds
    assert not kinds & {"IF", "LIF", "LI", "CubaLIF", "CubaLI", "I", "Threshold"}
    assert {"Conv2d", "Linear", "SumPool2d", "Flatten"} <= kinds
    weight = next(node.weight for node in graph.nodes.values() if type(node).__name__ == "Conv2d")
    assert weight.dtype == np.int8


def test_the_exporter_writes_one(exported, digits, tmp_path):
    model, _, _ = exported("mlp", "bse")
    report = NIR().export(model, tmp_path / "net.nir", digits.held_out(64))
    assert report["layers"][0]["neuron"] == "BSE (Horner)"
    network, _ = Lava().measured(model, digits.held_out(64))
    x = digits.held_out(20)[0][0]
    assert torch.equal(IntegerNetwork(read_nir(tmp_path / "net.nir"))(x), network(x))


def test_damaged_files_are_refused(exported, tmp_path):
    path = tmp_path / "net.nir"
    write_nir(load(exported("mlp", "bse")[1]), path)
    (tmp_path / "no.nir").write_bytes(b"no")
    with pytest.raises(ConversionError, match="no NIR graph of Spikeplug"):
        read_nir(tmp_path / "no.nir")
    ends = {"input": nir.Input({"input": np.array([2])}), "output": nir.Output({"output": np.array([2])})}
    plain = nir.NIRGraph(ends, [("input", "output")])
    nir.write(tmp_path / "plain.nir", plain)
    with pytest.raises(ConversionError, match="KeyError"):
        read_nir(tmp_path / "plain.nir")

    with h5py.File(path, "r+") as file:
        text = json.loads(file["node/metadata/spikeplug"][()].decode())
        del file["node/metadata/spikeplug"]
        file["node/metadata/spikeplug"] = json.dumps({**text, "spec": 2})
    with pytest.raises(ConversionError, match="version 2"):
        read_nir(path)


def test_a_folder_that_cannot_be_written(exported, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write"):
        write_nir(load(exported("mlp", "bse")[1]), tmp_path / "file" / "x.nir")
