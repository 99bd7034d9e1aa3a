"""The rules of integer networks on numbers computed by hand, and files that are damaged in every way."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

from spikeplug_lava_runtime import Bundle, FormatError, bundle, format, load, run, save, verify
from spikeplug_lava_runtime.check import check
from spikeplug_lava_runtime.cli import main
from spikeplug_lava_runtime.schedule import Schedule
from spikeplug_lava_runtime.synapses import matrix


def one_neuron(code: str, steps: int, weight: int, population=None, graph=None, **tensors) -> Bundle:
    """One input neuron, one neuron of a code behind a weight, and a readout with a weight of 1."""
    head = {"spec": 1, "producer": {}, "network": "hand", "recipe": code, "code": code, "steps": steps, **(graph or {})}
    payload = {"payload": [2, 1]} if code == "phase" else {}
    arrays = {f"n.{key}": np.array(value, np.int32) for key, value in tensors.items()}
    edge = {"from": "image", "ops": [{"op": "linear", "weight": "n.weight"}]}
    out = {"from": "n", "ops": [{"op": "linear", "weight": "out.weight"}]}
    fraction = {"fraction": (population or {}).get("fraction", 0)}
    populations = [
        {"name": "image", "kind": "input", "shape": [1], "edges": [], **payload},
        {
            "name": "n", "kind": "neurons", "shape": [1], "edges": [edge], "bias": None,
            **{key: f"n.{key}" for key in tensors}, **payload, **fraction, **(population or {}),
        },
        {
            "name": "out", "kind": "readout", "shape": [1], "edges": [out], "bias": None, "scale": "out.scale",
            **fraction,
        },
    ]  # fmt: skip
    weights = {"n.weight": np.array([[weight]], np.int8), "out.weight": np.array([[1]], np.int8)}
    return Bundle({**head, "populations": populations}, {**arrays, **weights, "out.scale": np.array([0.5], np.float32)})


def train(*spikes: int) -> np.ndarray:
    return np.array(spikes, np.int8).reshape(-1, 1, 1)


def fired(network: Bundle, *spikes: int) -> list[int]:
    return run(network, train(*spikes)).spikes["n"].reshape(-1).tolist()


CSS = {"beta": "2", "silent": 1}
BY_HAND = {
    # a = 2, 4, 10; 10 + 1 = 11 in units of 3 is 3: bits 011.
    "bits": (one_neuron("bse", 3, 2, threshold=[3], bias=[1]), (1, 0, 1), [0, 1, 1], 3 * 0.5),
    # Below zero nothing fires, above the largest code everything.
    "bits below": (one_neuron("bse", 3, -2, threshold=[3]), (1, 0, 1), [0, 0, 0], 0.0),
    "bits above": (one_neuron("bse", 3, 100, threshold=[3]), (1, 0, 1), [1, 1, 1], 7 * 0.5),
    # A spike at step 1 counts for steps 1 and 2: 3 * 2 = 6, in units of 2 is 3, the largest code: step 0.
    "first spike": (one_neuron("ttfs", 4, 3, threshold=[2]), (0, 1, 0, 0), [1, 0, 0, 0], 3 * 0.5),
    # 2 in units of 2 is 1: step 2. Code 0 is silent.
    "first spike late": (one_neuron("ttfs", 4, 2, threshold=[2]), (0, 0, 1, 0), [0, 0, 1, 0], 0.5),
    "first spike never": (one_neuron("ttfs", 4, 1, threshold=[2]), (0, 0, 1, 0), [0, 0, 0, 0], 0.0),
    # a = 9; a current of 9 + 2 into a threshold of 16: 11, 22 - 16, 17 - 16, 12.
    "rate": (one_neuron("rate", 4, 3, threshold=[4]), (1, 1, 0, 1), [0, 1, 1, 0], 1.0),
    "rate negative": (one_neuron("rate", 4, -3, threshold=[4]), (1, 1, 0, 1), [0, -1, -1, 0], -1.0),
    "rate rectified": (one_neuron("rate", 4, -3, {"rectify": True}, threshold=[4]), (1, 1, 0, 1), [0, 0, 0, 0], 0.0),
    # Payloads 2 and 1: a = 9; 9 >= 5, 9 - 6 = 3 >= 2.
    "phase": (
        one_neuron("phase", 2, 3, threshold=[[5], [2]], reset=[[6], [3]], ceiling=[12]), (1, 1), [1, 1], 1.5,
    ),
    # Clipped to 4 the first threshold is not met.
    "phase clipped": (
        one_neuron("phase", 2, 3, threshold=[[5], [2]], reset=[[6], [3]], ceiling=[4]), (1, 1), [0, 1], 0.5,
    ),
    "phase negative": (
        one_neuron("phase", 2, -3, threshold=[[5], [2]], reset=[[6], [3]], ceiling=[12]), (1, 1), [-1, -1], -1.5,
    ),
    # h = 5 in silence; 10 fires, 2 left; 4 + 5 = 9 fires, 1 left; 2 does not.
    "ternary": (one_neuron("css", 3, 5, graph=CSS, threshold=[4]), (1, 0, 1), [1, 1, 0], 0.5 * 6),
    # -5; -10 fires, -2 left; -4 - 5 = -9 fires.
    "ternary negative": (one_neuron("css", 3, -5, graph=CSS, threshold=[4]), (1, 0, 1), [-1, -1, 0], -0.5 * 6),
    # Rectified it stays at 0.
    "rectified": (one_neuron("css", 3, -5, {"rectify": True}, CSS, threshold=[4]), (1, 0, 1), [0, 0, 0], 0.0),
    # What fired too early is taken back, here of a spike that counts for four: h = 5, 10, 0, 0; g = 8, 16 - 8, 16 - 8.
    "taken back": (
        one_neuron("css", 3, 5, {"rectify": True}, CSS, threshold=[4]), (1, 0, -4), [1, -1, -1], 0.5 * 1,
    ),
    # F = 1: z = 10; h = 10; 10 + 5 = 15 >= 12, 15 - 24 = -9; -9 + (-9 >> 1 = -5) = -14 <= -12, -14 + 24 = 10.
    "one and a half": (
        one_neuron("css", 2, 5, {"fraction": 1}, {"beta": "3/2", "silent": 1}, threshold=[12]), (1, 0), [1, -1],
        0.5 * (3 - 2),
    ),
    # Only from 2 v on without negative spikes: 10 >= 8, 2 left; 4 + 5 = 9, 1 left.
    "positive only": (
        one_neuron("css", 3, 5, {"negative": False}, CSS, threshold=[4]), (1, 0, 1), [1, 1, 0], 0.5 * 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_rules_by_hand(name):
    network, spikes, wanted, logit = BY_HAND[name]
    check(network)
    assert fired(network, *spikes) == wanted
    assert run(network, train(*spikes)).logits.reshape(-1).tolist() == [logit]


def test_a_ceiling_clips_at_every_step():
    network = one_neuron("css", 3, 5, {"rectify": True}, CSS, threshold=[4], ceiling=[[8]] * 3)
    assert fired(network, 1, 1, 1) == [1, -1, -1]  # o = 8 - 8 g, with g doubled in every step


def test_states_beyond_24_bits_are_reported():
    network = one_neuron("bse", 24, 127, threshold=[1])
    network.tensors["n.threshold"] = np.array([2**22], np.int32)
    result = run(network, train(*[1] * 24))
    assert result.overflowing == ["n"]
    assert result.peaks["n"] == 127 * (2**24 - 1)


def test_spikes_of_another_shape_are_refused():
    network = BY_HAND["bits"][0]
    with pytest.raises(ValueError, match="spikes of shape"):
        run(network, train(1, 0))


def spatial(ops, shape, tensors) -> tuple[Bundle, dict]:
    edge = {"from": "image", "ops": ops}
    populations = [{"name": "image", "kind": "input", "shape": list(shape), "edges": []}]
    return Bundle({"code": "bse", "steps": 1, "populations": populations}, tensors), edge


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matrices_of_synapses_are_the_operations(data):
    """Every chain of operations as one sparse matrix, against the operations."""
    from spikeplug_lava_runtime.interpreter import linear

    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    groups = data.draw(st.sampled_from([1, 2]))
    shape = (2 * groups, data.draw(st.integers(4, 7)), data.draw(st.integers(4, 7)))
    tensors = {
        "w": rng.integers(-127, 128, (4 * groups, 2, 3, 2)).astype(np.int8),
        "s": rng.integers(-127, 128, shape[0]).astype(np.int8),
    }
    pair = st.lists(st.integers(1, 2), min_size=2, max_size=2)
    pads = st.lists(st.integers(0, 2), min_size=2, max_size=2)
    conv = {
        "op": "conv", "weight": "w", "stride": data.draw(pair), "padding": data.draw(pads), "dilation": [1, 1],
        "groups": groups,
    }  # fmt: skip
    ops = [{"op": "scale", "weight": "s"}, conv]
    if data.draw(st.booleans()):
        ops[0] = {"op": "sum_pool", "kernel": [2, 2], "stride": data.draw(pair), "padding": [0, 1]}
    x = rng.integers(-3, 4, (2, *shape)).astype(np.float64)
    network, edge = spatial(ops, shape, tensors)
    try:
        y = x
        for op in ops:
            y = linear(op, y, tensors)
    except FormatError:
        return  # the kernel is larger than what is left of the image
    assert np.array_equal((matrix(network, edge) @ x.reshape(2, -1).T).T, y.reshape(2, -1))


def test_a_gather_puts_zeros():
    tensors = {"i": np.array([[2, 0], [1, 1]], np.int32)}
    network, edge = spatial([{"op": "gather", "index": "i", "shape": [2, 2]}], (3,), tensors)
    assert (matrix(network, edge) @ np.array([5, 7, 9])).tolist() == [7, 0, 5, 5]


def test_shorter_paths_wait():
    network = one_neuron("css", 3, 5, graph=CSS, threshold=[4])
    network.populations[-1]["edges"].append({"from": "image", "ops": [{"op": "linear", "weight": "out.weight"}]})
    schedule = Schedule(network)
    assert (schedule.starts, schedule.emits) == ({"image": 0, "n": 1, "out": 3}, {"image": 0, "n": 2, "out": 4})
    assert schedule.length(2) == 3 + 3 + 4


def golden(path) -> Bundle:
    network = BY_HAND["bits"][0]
    network = Bundle(json.loads(json.dumps(network.graph)), dict(network.tensors))
    spikes = train(1, 0, 1)
    result = run(network, spikes)
    network.tensors |= {
        "golden.image": spikes, "golden.n": result.spikes["n"], "golden.out": result.readout.astype(np.int32)
    }  # fmt: skip
    save(network, path)
    return network


def test_files_come_back(tmp_path):
    network = golden(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    assert again.graph == network.graph
    assert all(np.array_equal(again.tensors[name], each) for name, each in network.tensors.items())
    verdict = verify(again)
    assert verdict.passed
    assert str(verdict).startswith("numpy interpreter, integer model: PASS 4/4 spikes and states, 1 samples")
    assert str(verdict).endswith("Not run on Loihi 2.")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_one_flipped_byte_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "flip.safetensors"
    golden(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="flip"):
        load(path)


def rewritten(path, change) -> None:
    """The file with a changed graph and a digest that fits it: what only a check of the rules can find."""
    with safe_open(str(path), "numpy") as file:
        graph = json.loads(file.metadata()["graph"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(graph, tensors)
    text = json.dumps(graph, sort_keys=True, separators=(",", ":"))
    metadata = {"format": format.FORMAT, "graph": text, "sha256": bundle._digest(text, tensors)}
    path.write_bytes(to_bytes(tensors, metadata=metadata))


def pooled(graph, **options) -> None:
    """Put a pooling in the place of the weights."""
    op = {"op": "sum_pool", "kernel": [1], "stride": [1], "padding": [0], **options}
    ahead = {"op": "reshape", "shape": [1, 1]}
    graph["populations"][1]["edges"][0]["ops"] = [ahead, op]


BAD = {
    "version 2": lambda g, t: g.update(spec=2),
    "does not say which version": lambda g, t: g.pop("spec"),
    "-128": lambda g, t: t.update({"n.weight": np.array([[-128]], np.int8)}),
    "is int16": lambda g, t: t.update({"n.weight": np.array([[3]], np.int16)}),
    "24 bits": lambda g, t: t.update({"n.bias": np.array([2**23], np.int32)}),
    "threshold below 1": lambda g, t: t.update({"n.threshold": np.array([0], np.int32)}),
    "a name of letters": lambda g, t: g["populations"][1].update(name="../../etc/passwd"),
    "is there twice": lambda g, t: g["populations"][1].update(name="image"),
    "does not come before": lambda g, t: g["populations"][1]["edges"][0].update({"from": "out"}),
    "one of conv": lambda g, t: g["populations"][1]["edges"][0]["ops"][0].update(op="exec"),
    "lacks weight": lambda g, t: g["populations"][1]["edges"][0]["ops"][0].pop("weight"),
    "is not there": lambda g, t: t.pop("n.weight"),
    "code 'if'": lambda g, t: g.update(code="if"),
    "steps=0": lambda g, t: g.update(steps=0),
    "must be a readout": lambda g, t: g["populations"].pop(),
    "gives [1], [2] is needed": lambda g, t: g["populations"][1].update(shape=[2]),
    "golden spikes of": lambda g, t: t.update({"golden.n": np.zeros((2, 1, 1), np.int8)}),
    "of 'phase' carry": lambda g, t: g["populations"][0].update(payload=[1, 2, 4]),
    "rectify='no'": lambda g, t: g["populations"][1].update(rectify="no"),
    "n' has 0 edges": lambda g, t: g["populations"][1].update(edges=[]),
    "'scale' of population 'out' has shape [7]": lambda g, t: t.update({"out.scale": np.zeros(7, np.float32)}),
    "of [1, 2] samples": lambda g, t: t.update({"golden.n": np.zeros((3, 2, 1), np.int8)}),
    "not 100": lambda g, t: t.update({"golden.n": np.full((3, 1, 1), 100, np.int8)}),
    "threshold of 2097153": lambda g, t: t.update({"n.threshold": np.array([2**21 + 1], np.int32)}),
    "has stride=[0]": lambda g, t: pooled(g, stride=[0]),
    "has padding=[-1]": lambda g, t: pooled(g, padding=[-1]),
    "has kernel=[True]": lambda g, t: pooled(g, kernel=[True]),
    "gives [1, 4097], [1] is needed": lambda g, t: pooled(g, padding=[2048]),
    "up to 16777216 neurons": lambda g, t: g["populations"][0].update(shape=[2**20, 2**20]),
    "version 0": lambda g, t: g.update(spec=0),
    "KeyError": lambda g, t: g.pop("populations"),
    "TypeError": lambda g, t: g.update(populations=3),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_breaks_a_rule_is_refused(tmp_path, reason):
    path = tmp_path / "net.safetensors"
    golden(path)
    rewritten(path, BAD[reason])
    with pytest.raises(FormatError) as error:
        load(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def test_a_differing_spike_fails(tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    golden(path)
    rewritten(path, lambda g, t: t.update({"n.weight": np.array([[3]], np.int8)}))
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL 1/4" in out
    assert "n: 2 differ" in out
    assert "checked: every" not in out


def test_the_command_line(tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    golden(path)
    assert main(["verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["info", str(path)]) == 0
    assert "code bse, 3 steps\n1 golden samples" in capsys.readouterr().out
    (tmp_path / "in.safetensors").write_bytes(to_bytes({"spikes": train(1, 1, 1)}))
    out = tmp_path / "out.safetensors"
    assert main(["run", str(path), "--spikes", str(tmp_path / "in.safetensors"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["logits"] == [[2.5]]  # 14 + 1 in units of 3 is 5
    with safe_open(str(out), "numpy") as file:
        assert file.get_tensor("spikes.n").reshape(-1).tolist() == [1, 0, 1]


def test_errors_are_one_line(tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    assert main(["verify", str(path)]) == 1
    assert "No such file" in capsys.readouterr().err
    path.write_bytes(b"no")
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    save(BY_HAND["bits"][0], path)
    assert main(["verify", str(path)]) == 1
    assert "no golden spikes of 'image'" in capsys.readouterr().err
    (tmp_path / "in.safetensors").write_bytes(to_bytes({"spikes": train(1, 2, 1)}))
    assert main(["run", str(path), "--spikes", str(tmp_path / "in.safetensors")]) == 1
    assert "-1, 0 or 1" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    golden(path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        golden(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
