"""Exported networks: ways to compute them agree spike by spike, and what cannot be exported is refused by name."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spikeplug
from spikeplug.coding.site import in_mode
from spikeplug.errors import BundleError, ConversionError, OptionError, UnknownNameError
from spikeplug_lava import IntegerNetwork
from spikeplug_lava.exporter import Lava
from spikeplug_lava.lower import lower
from spikeplug_lava.quantize import Quantizer
from spikeplug_lava_runtime import load, run, verify

CASES = [(kind, name) for kind in ("mlp", "cnn") for name in
         ("tsa", "tsa-relu", "tsa-relu-2", "bse", "ttfs", "phase", "rate")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_interpreter_fires_every_golden_spike(exported, kind, name):
    _, path, _ = exported(kind, name)
    network = load(path)
    assert network.samples == 100
    verdict = verify(network)
    assert verdict.passed, str(verdict)
    assert verdict.compared > 10_000


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_accuracy_is_that_of_the_network(exported, kind, name):
    _, _, report = exported(kind, name)
    accuracy = report["accuracy"]
    assert report["samples"] == 597
    assert abs(accuracy["integer"] - accuracy["dense"]) <= 0.01
    assert report["agreement"]["integer with dense"] >= 0.95


@pytest.mark.parametrize("name", ["tsa-relu", "bse", "ttfs", "phase", "rate"])
def test_it_is_no_other_network(exported, digits, name):
    """Spikes are those of integers: logits are neither the dense network's nor exactly the converted one's."""
    model, path, report = exported("cnn", name)
    x = digits.held_out(100)[0][0]
    with torch.no_grad():
        ours = IntegerNetwork.load(path)(x)
        theirs = model(x).double()
        with in_mode(model, "dense"):
            dense = model(x).double()
    assert ours.shape == dense.shape
    near = (ours - dense).abs().mean() / dense.abs().mean()
    assert 0 < near < 0.2
    assert not torch.equal(ours, theirs)
    differing = [row["spikes_differ"] for row in report["layers"] if row["spikes_differ"] is not None]
    assert all(share < 0.5 for share in differing)


def test_a_flipped_weight_is_found(exported):
    network = load(exported("cnn", "tsa-relu")[1])
    name = f"{network.populations[1]['name']}.0.weight"
    weight = network.tensors[name].copy()
    place = np.unravel_index(np.abs(weight.astype(int)).argmax(), weight.shape)
    weight[place] = -weight[place]
    network.tensors[name] = weight
    verdict = verify(network)
    assert not verdict.passed
    assert verdict.differing[network.populations[1]["name"]] > 0


def test_the_report_names_layers_and_ranges(exported):
    _, _, report = exported("cnn", "tsa-relu")
    assert [row["name"] for row in report["layers"]] == ["act", "act_1", "relu", "readout"]
    for row in report["layers"]:
        assert 2 <= row["weight_bits"] <= 8
        assert row["state_bits"] <= 24
    assert report["layers"][0]["neuron"] == "tsa-relu"
    assert 0 < report["layers"][0]["spikes_differ"] < 0.5


def test_plain_tsa_carries_signed_sums(exported):
    _, path, report = exported("cnn", "tsa")
    assert "tsa" in {row["neuron"] for row in report["layers"]}
    assert min(int(each.min()) for name, each in load(path).tensors.items() if name.startswith("golden.")) < 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_spikes_give_the_same_in_both(exported, data):
    """The PyTorch module and the interpreter on random spikes, of networks whose neurons then saturate and clip."""
    kind, name = data.draw(st.sampled_from(CASES))
    network = load(exported(kind, name)[1])
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    low = -1 if network.code in ("css", "rate", "phase") else 0
    shape = (network.steps, 2, *network.populations[0]["shape"])
    spikes = rng.integers(low, 2, shape).astype(np.int8) * (rng.random(shape) < data.draw(st.floats(0, 1)))
    fired, readout = IntegerNetwork(network).fire(torch.from_numpy(spikes.astype(np.int8)))
    result = run(network, spikes.astype(np.int8))
    for population, theirs in result.spikes.items():
        assert np.array_equal(fired[population].numpy(), theirs), population
    assert np.array_equal(readout.numpy(), result.readout)


class Clipped(nn.Module):
    """ReLU6, a concatenation, a mean, a strided slice with padding; and a skip from the input of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, padding=1)
        self.two = nn.Conv2d(1, 4, 3, padding="same", dilation=2)
        self.three = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=False)
        self.four = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.cat([nn.functional.relu6(self.one(x) * 3), nn.functional.relu6(self.two(x) * 3)], 1)
        y = nn.functional.relu6(self.three(x) + x[:, :, ::2, ::2])
        y = nn.functional.pad(y, (0, 0, 0, 0, 4, 4))
        return self.four(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("css", {}), ("css", {"silent": 2}), ("css", {"silent": 0}), ("css-q", {"negative": False}), ("bse", {"steps": 6}),
     ("mgpc", {"steps": 6, "rounds": 2}), ("ttfs", {"steps": 32}), ("rate", {"steps": 16})],
)  # fmt: skip
def test_everything_that_is_linear(recipe, options, tmp_path):
    torch.manual_seed(0)
    net, x = Clipped().eval(), torch.randn(64, 1, 8, 8)
    model = spikeplug.convert(copy.deepcopy(net), recipe, calibration=[x], **options)
    report = Lava(golden=64).export(model, tmp_path / "net.safetensors", [x])
    verdict = verify(load(tmp_path / "net.safetensors"))
    assert verdict.passed, str(verdict)
    assert report["accuracy"] is None
    assert report["agreement"]["integer with dense"] >= (0.6 if options.get("negative") is False else 0.8)
    with torch.no_grad(), in_mode(model, "dense"):
        dense = model(x).double()
    ours = IntegerNetwork.load(tmp_path / "net.safetensors")(x)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), dense.flatten(), dim=0) > 0.95


def test_padding_of_codes_that_start_below_zero(tmp_path):
    """A window without spikes stands for the smallest value; beyond the border there is the value 0, and not that."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 4)), torch.randn(32, 1, 4, 4)
    for recipe in ("bse", "ttfs"):
        model = spikeplug.convert(copy.deepcopy(net), recipe, calibration=[x], steps=8 if recipe == "bse" else 64)
        network, _ = Lava().measured(model, [x])
        with torch.no_grad():
            assert (network(x) - model(x)).abs().max() < 0.05 * model(x).abs().max(), recipe


def convert(net, recipe="css", x=None, **options):
    x = torch.rand(16, 2, 8, 8) if x is None else x
    return spikeplug.convert(net, recipe, calibration=[x], **options), x


def conv(*behind):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), *behind, nn.Flatten(), nn.LazyLinear(3))


REFUSED = {
    "'2' (MaxPool2d) cannot be exported: max pooling": (conv(nn.MaxPool2d(2)), "bse", {}),
    "beta=1.3 is no shift and add: 1.5 and 2 are": (conv(), "css", {"beta": 1.3}),
    "granularity='tensor'": (conv(), "bse", {"granularity": "channel"}),
    "spikes=2 has no integer form": (conv(), "two-spike", {}),
    "code 'ttfs-continuous' has no integer form": (conv(), "ttfs-continuous", {}),
    "'0' (Conv2d) cannot be exported: it was left dense": (conv(), "bse", {"exclude": ["0"]}),
    "was not captured as a graph": (conv(), "bse", {"structure": "layers"}),
    "its windows are not all divided by the same number": (
        conv(nn.AvgPool2d(3, padding=1, count_include_pad=False)), "css", {},
    ),
    "bits, 6 are needed: convert it with fewer steps": (conv(), "bse", {"steps": 22}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_exported_is_named(reason, tmp_path):
    net, recipe, options = REFUSED[reason]
    x = torch.rand(16, 2, 8, 8)
    net(x)  # lazy layers
    model, x = convert(copy.deepcopy(net).eval(), recipe, x, **options)
    with pytest.raises(ConversionError) as error:
        Lava().export(model, tmp_path / "net.safetensors", [x])
    assert reason in str(error.value)
    assert not list(tmp_path.iterdir())


def test_options_are_checked(exported, tmp_path):
    model, _, _ = exported("mlp", "bse")
    for options in ({"golden": -1}, {"fitted": 0}, {"fraction": 17}):
        with pytest.raises(OptionError, match=next(iter(options))):
            Lava(**options)
    with pytest.raises(OptionError, match="--images FOLDER"):
        Lava().export(model, tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="unknown option 'gold' of exporter 'lava', did you mean 'golden'"):
        spikeplug.get_exporter("lava", gold=3)
    with pytest.raises(UnknownNameError, match="did you mean 'lava'"):
        spikeplug.get_exporter("lave")


def test_a_fraction_that_does_not_fit_is_refused(exported, digits, tmp_path):
    model, _, _ = exported("mlp", "tsa-relu")
    with pytest.raises(ConversionError, match=r"weights keep 1 bits.*a smaller fraction"):
        Lava(fraction=16).export(model, tmp_path / "x.safetensors", digits.held_out(64))


def test_a_folder_that_cannot_be_written(exported, digits, tmp_path):
    model, _, _ = exported("mlp", "bse")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write"):
        Lava().export(model, tmp_path / "file" / "x.safetensors", digits.held_out(8))


def test_ranges_hold_beyond_the_samples(exported, digits):
    """Units leave room: states of all held-out images fit where 64 images were measured."""
    for name in ("tsa-relu", "bse"):
        model, _, _ = exported("cnn", name)
        samples = digits.held_out()
        bundle = Quantizer(lower(model, samples[0][0][:64]), {"spec": 1}).run(samples[0][0][:64])
        for x, _ in samples:
            result = run(bundle, IntegerNetwork(bundle).encode(x).numpy())
            assert not result.overflowing


def test_the_network_says_what_it_is(exported):
    graph = load(exported("cnn", "bse")[1]).graph
    assert (graph["code"], graph["recipe"], graph["steps"], graph["network"]) == ("bse", "bse", 8, "Residual")
    assert graph["producer"] == {"spikeplug": spikeplug.__version__}
    json.dumps(graph, allow_nan=False)


def assert_near(model, x, most: float = 0.06) -> None:
    """The integer network is the converted one, but for the rounding of weights."""
    network, _ = Lava().measured(model, [x])
    with torch.no_grad():
        ours, theirs = network(x), model(x).double()
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < most, error


class Net(nn.Module):
    """A network that a test writes as a function of its layers."""

    def __init__(self, body, **layers) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def layers(**more):
    return {"one": nn.Conv2d(2, 4, 3, padding=1), "two": nn.Linear(4 * 64, 5), "relu": nn.ReLU(), **more}


BODIES = {
    "an addition that takes away": (
        lambda n, x: n.two((torch.add(n.relu(n.one(x)), n.relu(n.three(x)), alpha=-0.5)).flatten(1)),
        {"three": nn.Conv2d(2, 4, 3, padding=1)},
    ),
    "a half": (lambda n, x: n.two((n.relu(n.one(x)) * 0.5).flatten(1)), {}),
    "a padded input": (
        lambda n, x: n.two(n.relu(n.one(nn.functional.pad(x, (2, 2, 2, 2))))[:, :, 2:10, 2:10].flatten(1)), {},
    ),
    "a padded average": (
        lambda n, x: n.two(n.relu(n.three(n.pool(n.relu(n.one(x))))).flatten(1)),
        {"pool": nn.AvgPool2d(3, 1, 1), "three": nn.Conv2d(4, 4, 3, padding=1)},
    ),
    "an average behind a layer": (
        lambda n, x: n.two(n.pool(n.one(x)).view(x.size(0), -1)), {"pool": nn.AvgPool2d((3,), 1, 1)},
    ),
    "slices of one activation": (
        lambda n, x: (lambda r: n.three(r[:, :2].flatten(1)) + n.four(r[:, 2:].flatten(1)))(n.relu(n.one(x))),
        {"three": nn.Linear(128, 5), "four": nn.Linear(128, 5)},
    ),
    "a skip beside small weights": (
        lambda n, x: (lambda r: n.two(n.relu(r + n.three(r)).flatten(1)))(n.relu(n.one(x))),
        {"three": nn.Conv2d(4, 4, 3, padding=1)},
    ),
    "names that mean something": (
        lambda n, x: n.two(n.golden(n.output(n.readout(n.image(x)))).flatten(1)),
        {"image": nn.Conv2d(2, 4, 3, padding=1), "readout": nn.ReLU(), "output": nn.Conv2d(4, 4, 1)}
        | {"golden": nn.ReLU()},
    ),
    "one dimension": (
        lambda n, x: n.two(n.relu(n.three(x.flatten(2))).flatten(1)), {"three": nn.Conv1d(2, 4, 5, padding=2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["css", "bse", "ttfs", "rate", "base2-round"])
@pytest.mark.parametrize("body", BODIES)
def test_networks_of_every_kind(recipe, body):
    torch.manual_seed(0)
    function, more = BODIES[body]
    net = Net(function, **copy.deepcopy(layers(**more)))
    if body == "a skip beside small weights":
        net.three.weight.data *= 0.02
    steps = {"css": 10, "bse": 8, "ttfs": 128, "rate": 64, "base2-round": 8}[recipe]
    x = torch.randn(48, 2, 8, 8)
    assert_near(spikeplug.convert(net.eval(), recipe, calibration=[x], steps=steps), x)


def test_nir_holds_names_that_mean_something(tmp_path):
    from spikeplug_lava.nir import read_nir, write_nir

    torch.manual_seed(0)
    function, more = BODIES["names that mean something"]
    model, x = convert(Net(function, **layers(**more)).eval(), "bse", steps=6)
    network, _ = Lava().measured(model, [x])
    write_nir(network.bundle, tmp_path / "net.nir")
    assert torch.equal(IntegerNetwork(read_nir(tmp_path / "net.nir"))(x), network(x))


def test_what_mixes_values_is_refused():
    def resized(n, x):
        return n.two(nn.functional.interpolate(n.relu(n.one(x)), scale_factor=0.5, mode="bicubic").flatten(1))

    x = torch.rand(16, 2, 8, 8)
    with pytest.raises(ConversionError, match="'upsample_bicubic2d'"):
        Lava().measured(convert(Net(resized, **layers(two=nn.Linear(64, 5))).eval(), "bse", x, steps=6)[0], [x])


def test_overrides_of_a_site_are_refused():
    net = Net(lambda n, x: n.two(n.relu(n.one(x)).flatten(1)), **layers())
    model, x = convert(net.eval(), "bse", steps=4, overrides={"two": {"steps": 6}})
    with pytest.raises(ConversionError, match="coded by bse in 6 steps, the input by bse in 4"):
        Lava().measured(model, [x])


def test_dead_channels_do_not_stop_an_export():
    """After folding a norm, weights may be all but zero and the bias large."""
    net = Net(lambda n, x: n.two(n.relu(n.one(x)).flatten(1)), **layers())
    net.one.weight.data[1] *= 1e-9
    net.one.bias.data[1] = -30
    x = torch.randn(48, 2, 8, 8)
    for recipe, options in (("bse", {"steps": 8}), ("css", {}), ("rate", {})):
        assert_near(spikeplug.convert(copy.deepcopy(net).eval(), recipe, calibration=[x], **options), x)


def test_a_sample_that_does_not_fit_is_an_error():
    torch.manual_seed(0)
    net = Net(lambda n, x: n.two(n.relu(n.one(x)).flatten(1)), **layers())
    x = torch.randn(32, 2, 8, 8)
    x[:16] *= 0.01
    model = spikeplug.convert(net.eval(), "css", calibration=[x])
    with pytest.raises(ConversionError, match=r"a state needs \d+ bits on a sample.*-s fitted=32"):
        Lava(fitted=16).measured(model, [x[:16], 1000 * x[16:]])


@pytest.mark.parametrize("recipe", ["css", "css-q", "bse"])
def test_a_network_without_neurons(recipe):
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    net = nn.Sequential(nn.Linear(6, 3)).eval()
    assert_near(spikeplug.convert(net, recipe, calibration=[x], steps=8), x)
