"""Converting plain PyTorch models: every verb and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import spikeplug
from spikeplug import ConversionConfig, Recipe, plugins
from spikeplug.coding.layers import make_spiking
from spikeplug.coding.rate import IF, Rate
from spikeplug.coding.site import Site, sites
from spikeplug.errors import (
    CalibrationError,
    ConversionError,
    NonFiniteError,
    OptionError,
    UnknownNameError,
)


def test_fused_and_stepped_agree_and_differ_from_dense(network, images, spiking):
    dense, fused = network()(images), spiking(images)
    stepped = spikeplug.set_execution(spiking, "stepped")(images)
    torch.testing.assert_close(stepped, fused, rtol=1e-5, atol=1e-6)
    assert not torch.equal(fused, dense)
    assert (fused - dense).abs().max() < 0.2 * dense.abs().max()


def test_spikes_are_counted_alike_in_both_executions(spiking, images):
    totals = []
    for execution in ("fused", "stepped"):
        spikeplug.set_execution(spiking, execution)
        with spikeplug.count_spikes(spiking) as counts:
            spiking(images)
            spiking(images)
        totals.append({name: (count.spikes, count.neurons) for name, count in counts.by_site.items()})
        assert counts.total == sum(spikes for spikes, _ in totals[-1].values())
    assert totals[0] == totals[1]
    assert totals[0]["0"][1] == 2 * images.numel()
    spiking(images)
    assert counts.total == sum(spikes for spikes, _ in totals[0].values())


def test_report_names_every_operation(spiking, images):
    spiking(images)
    report = spikeplug.report(spiking)
    assert {op.name: op.role for op in report.ops} == {
        "0": "spiking", "1": "neuron", "2": "neuron", "3": "spiking", "4": "neuron", "5": "spiking",
    }  # fmt: skip
    # conv: 4 x 4 outputs of 4 channels, 9 inputs each; linear: 64 x 16 and 16 x 3
    assert [op.macs for op in report.ops if op.role == "spiking"] == [576, 1024, 48]
    assert report.share() == 1.0
    assert "100.0% of the MACs" in str(report)
    assert json.dumps(report.to_dict())


def test_excluded_layer_stays_dense_and_is_listed(network, images):
    net = spikeplug.convert(network(), "rate", calibration=[images], exclude=["3"])
    assert type(net.get_submodule("3")) is nn.Linear
    report = spikeplug.report(net)
    assert next(op for op in report.ops if op.name == "3").role == "dense"
    assert report.share() == (576 + 48) / (576 + 1024 + 48)


def test_shared_site_codes_counts_and_observes_once(images):
    encoder = spikeplug.get_encoder("rate")
    site = Site("shared", "input", encoder, consumers=2)
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    make_spiking(first, site)
    make_spiking(second, site, owner=False)
    block = nn.ModuleDict({"first": first, "second": second})
    assert set(block.state_dict()) == {f"{layer}.{p}" for layer in ("first", "second") for p in ("weight", "bias")}
    site.set_params(encoder.fit(spikeplug.ActivationStats.of(images)).tensors())
    for site.mode in ("fused", "stepped"):
        with spikeplug.count_spikes(block) as counts:
            first(images), second(images)
        assert counts.total == int(encoder.count(images, site.params(images)).sum())
    copied = copy.deepcopy(block)
    assert copied["second"].source is copied["first"].site
    assert copied["second"].source is not site


def test_shared_site_sees_a_change_in_place(images):
    encoder = spikeplug.get_encoder("rate")
    site = Site("shared", "input", encoder, consumers=2)
    site.set_params(encoder.fit(spikeplug.ActivationStats.of(images)).tensors())
    x = images.clone()
    site(x)
    x.mul_(0.5)
    assert torch.equal(site(x), encoder.fused(x, site.params(x)))
    site(x.requires_grad_() * 1)
    copy.deepcopy(site)  # with an activation of a graph kept for the second layer


def test_every_step_sends_its_spikes_through_the_weights(spiking, images, monkeypatch):
    seen = []
    layer = type(spiking.get_submodule("3"))
    real = layer.synapse

    def watch(self, s, weight, bias):
        seen.append(s)
        return real(self, s, weight, bias)

    monkeypatch.setattr(layer, "synapse", watch)
    with torch.no_grad():
        spikeplug.set_execution(spiking, "stepped")(images)
    trains = [s for s in seen if s.shape == (8, 64)]
    assert len(trains) == 64 + 1  # T = 64 steps, and the offset
    assert all(set(s.unique().tolist()) <= {-1.0, 0.0, 1.0} for s in trains)
    assert sum(s.abs().sum() for s in trains) > 0


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("layer", ["Conv1d", "Conv2d", "Conv3d"])
@pytest.mark.parametrize("scale", ["tensor", "channel", "row"])
def test_stepped_convolution_equals_fused(layer, padding_mode, scale):
    class Shifted(Rate):
        """A rate code around an offset, with a scale of any shape."""

        def fit(self, stats):
            shape = {"tensor": (), "channel": stats.low.shape, "row": (1,)}[scale]
            like = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            return spikeplug.CodeParams(0.02 + 0.05 * like, like - 0.3)

        def quantize(self, x, p):
            return super().quantize(x - p.offset, p)

    dims = int(layer[4])
    torch.manual_seed(0)
    conv = getattr(nn, layer)(4, 6, 3, padding=1, stride=2, groups=2, dilation=1, padding_mode=padding_mode)
    x = torch.randn(2, 4, *[6] * dims)
    dense = conv(x)
    from spikeplug.coding.layers import channels_of

    site = Site("conv", "input", Shifted(steps=64), channels=channels_of(conv))
    site.set_params(site.encoder.fit(spikeplug.ActivationStats.of(x, site.channels)).tensors())
    make_spiking(conv, site)
    fused = conv(x)
    site.mode = "stepped"
    torch.testing.assert_close(conv(x), fused, rtol=1e-4, atol=1e-4)
    assert not torch.equal(fused, dense)


def test_stepped_gradient_equals_the_fused_one(spiking, images):
    gradients = []
    for execution in ("fused", "stepped"):
        spikeplug.set_execution(spiking, execution).zero_grad()
        spiking(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in spiking.parameters()])
    for fused, stepped in zip(*gradients, strict=True):
        torch.testing.assert_close(stepped, fused, rtol=1e-3, atol=1e-4)


def test_products_of_activations_are_coded_and_counted(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 16)

        def forward(self, x):
            y = self.layer(x.flatten(1)).reshape(-1, 4, 4)
            return y @ (y.mT @ y)

    dense = Net().eval()
    net = spikeplug.convert(dense, "rate", calibration=[images], steps=1024)
    report = spikeplug.report(net)
    assert [(op.role, op.macs) for op in report.ops if op.macs] == [("spiking", 1024), ("decoded", 64), ("decoded", 64)]
    assert report.share() == 1024 / (1024 + 128)
    with torch.no_grad():
        fused = net(images)
        assert 0 < (fused - dense(images)).norm() < 0.01 * fused.norm()
        torch.testing.assert_close(spikeplug.set_execution(net, "stepped")(images), fused, rtol=1e-3, atol=1e-4)


def test_layer_called_twice_counts_twice(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(self.layer(x.flatten(1)))

    net = spikeplug.convert(Net(), "rate", calibration=[images])
    assert sum(op.macs for op in spikeplug.report(net).ops) == 2 * 64 * 64


def test_neuron_that_does_not_fire_the_code_is_refused(network, images):
    with pytest.raises(OptionError, match=r"IF\(threshold=3\.0\) does not fire the spikes of Rate"):
        spikeplug.convert(network(), "rate", calibration=[images], neuron_options={"threshold": 3.0})


def test_networks_side_by_side_keep_all_their_sites(network, images):
    pair = nn.Sequential(*[spikeplug.convert(network(), "rate", calibration=[images]) for _ in range(2)])
    assert len(sites(pair)) == 6
    spikeplug.set_execution(pair, "stepped")
    assert {site.mode for site in sites(pair).values()} == {"stepped"}


def test_nested_counts_both_count(spiking, images):
    with spikeplug.count_spikes(spiking) as outer:
        spiking(images)
        with spikeplug.count_spikes(spiking) as inner:
            spiking(images)
    assert outer.total == 2 * inner.total > 0


def test_modes_of_modules_survive_calibration(network, images):
    net = network().train()
    net[1].eval()
    spikeplug.convert(net, "rate", calibration=[images])
    assert (net.training, net[0].training, net[1].training) == (True, True, False)


def test_half_precision_model_keeps_its_scales(spiking, images):
    scales = {name: site.scale.clone() for name, site in sites(spiking).items()}
    spiking.bfloat16()
    assert spiking.get_submodule("0").weight.dtype == torch.bfloat16
    assert all(torch.equal(site.scale, scales[name]) for name, site in sites(spiking).items())
    assert spiking(images.bfloat16()).dtype == torch.bfloat16


def test_straight_through_gradient_reaches_every_weight(network, images, spiking):
    spiking(images).square().sum().backward()
    dense = network()
    dense(images).square().sum().backward()
    for ours, theirs in zip(spiking.parameters(), dense.parameters(), strict=True):
        assert ours.grad.abs().sum() > 0
        assert torch.nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.95


def test_refusals_of_convert(network, images):
    with pytest.raises(UnknownNameError, match="unknown recipe 'rats', did you mean 'rate'"):
        spikeplug.convert(network(), "rats", calibration=[images])
    with pytest.raises(OptionError, match="unknown option 'step' of recipe 'rate', did you mean 'steps'"):
        spikeplug.convert(network(), "rate", calibration=[images], step=3)
    with pytest.raises(OptionError, match="steps=0"):
        spikeplug.convert(network(), "rate", calibration=[images], steps=0)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        spikeplug.convert(network(), "rate")
    with pytest.raises(CalibrationError, match="no calibration batch"):
        spikeplug.convert(network(), "rate", calibration=[])
    with pytest.raises(OptionError, match=r"exclude='7' matches nothing"):
        spikeplug.convert(network(), "rate", calibration=[images], exclude=["7"])
    with pytest.raises(UnknownNameError, match="unknown pass 'fold'"):
        spikeplug.convert(network(), "rate", calibration=[images], passes=["fold"])
    net = spikeplug.convert(network(), "rate", calibration=[images])
    with pytest.raises(ConversionError, match="converted model already"):
        spikeplug.convert(net, "rate", calibration=[images])


def test_nan_weight_and_nan_calibration_are_named(network, images):
    net = network()
    net[3].weight.data[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"parameter '3\.weight'"):
        spikeplug.convert(net, "rate", calibration=[images])
    images[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="site '0'"):
        spikeplug.convert(network(), "rate", calibration=[images])


def test_nan_at_run_time_is_named(spiking, images):
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="site '0'"):
        spiking(images)


def test_layer_by_layer_a_module_with_parameters_and_no_spiking_form_is_refused_unless_excluded(images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return x * self.weight

    def convert(**options):
        net = nn.Sequential(nn.Flatten(), Odd(), nn.Linear(64, 2))
        return spikeplug.convert(net, "rate", calibration=[images], structure="layers", **options)

    with pytest.raises(ConversionError, match=r"'1' \(Odd\) owns parameters"):
        convert()
    assert next(op for op in spikeplug.report(convert(exclude=["1"])).ops if op.name == "1").role == "dense"


@torch.no_grad()
def test_encoder_layer_with_a_fast_path_is_converted_whole(images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 16)), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    net.eval()
    spiking = spikeplug.convert(net, "rate", calibration=[images], steps=1024)
    dense = net(images)
    assert 0 < (spiking(images) - dense).norm() < 0.02 * dense.norm()
    macs = {op.name: (op.role, op.macs) for op in spikeplug.report(spiking).ops if op.macs}
    # Four tokens of 16 features: projections in and out, two products of two heads, the feed-forward layers.
    assert macs == {
        "2.self_attn.in_proj": ("spiking", 4 * 16 * 48),
        "2.self_attn.matmul": ("decoded", 2 * 4 * 4 * 8),
        "2.self_attn.matmul_1": ("decoded", 2 * 4 * 4 * 8),
        "2.self_attn.out_proj": ("spiking", 4 * 16 * 16),
        "2.linear1": ("spiking", 4 * 16 * 32),
        "2.linear2": ("spiking", 4 * 32 * 16),
    }


def test_verbs_on_a_dense_model_say_so(network, tmp_path):
    with pytest.raises(ConversionError, match="convert"):
        spikeplug.set_execution(network(), "fused")
    with pytest.raises(ConversionError, match="convert"):
        spikeplug.report(network())
    with pytest.raises(ConversionError, match="convert"):
        spikeplug.save(network(), tmp_path / "net")


def test_approximator_stands_in_and_is_reported(network, images, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Wrapping:
        static = False

        def build(self, op, original, name):
            return nn.Sequential(original, nn.Identity()) if op == "relu" else original

    part = plugins.Part("approximator", "mine", "here:Wrapping", "test")
    monkeypatch.setitem(plugins.registry().parts, ("approximator", "mine"), [part])
    load = plugins.Part.load
    monkeypatch.setattr("spikeplug.plugins.Part.load", lambda self: Wrapping if self is part else load(self))
    net = spikeplug.convert(network(), "rate", calibration=[images], approximators={"relu": "mine"})
    assert {op.name for op in spikeplug.report(net).ops if op.role == "approximated"} == {"1", "4"}
    assert [op.name for op in spikeplug.report(net).ops] == ["0", "1", "2", "3", "4", "5"]
    with pytest.raises(OptionError, match="no operation 'rely', did you mean 'relu'"):
        spikeplug.convert(network(), "rate", calibration=[images], approximators={"rely": "exact"})


def test_unknown_execution_is_refused(spiking):
    with pytest.raises(OptionError, match="execution='fast': choose one of fused, stepped"):
        spikeplug.set_execution(spiking, "fast")


def test_config_round_trips_through_json_and_refuses_unknown_keys():
    config = ConversionConfig.resolve("rate", {"steps": 8, "exclude": ["a.*"]})
    assert config.encoder_options == {"steps": 8}
    assert config.build()[1] == IF(threshold=8)
    again = ConversionConfig.resolve(config, {"steps": 4})
    assert again.build() == (Rate(steps=4), IF(threshold=4))
    assert again.exclude == ("a.*",)
    assert ConversionConfig.from_json(config.model_dump_json()) == config
    with pytest.raises(OptionError, match="unknown key 'excludes', did you mean 'exclude'"):
        ConversionConfig.parse({**config.model_dump(), "excludes": []})
    with pytest.raises(OptionError, match="execution='slow'"):
        ConversionConfig.parse({**config.model_dump(), "execution": "slow"})


def test_recipe_of_a_third_party_works_without_registration(network, images):
    recipe = Recipe(name="mine", summary="", encoder="rate", encoder_options={"steps": 9})
    net = spikeplug.convert(network(), recipe, calibration=[images])
    assert spikeplug.report(net).recipe == "mine"
    spikeplug.set_execution(net, "stepped")(images)
