"""Traced networks: a role for every operation, folding, shared sites, trains that flow, one clock, a third party."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spikeplug
from spikeplug import plugins
from spikeplug.clock import Clocked, Delay, network
from spikeplug.errors import BundleError, CalibrationError, ConversionError, OptionError
from spikeplug.flow import PooledInput
from spikeplug.graph import Traced
from spikeplug.network import SpikingGraph
from spikeplug.rate import IF, Rate
from spikeplug.testing import EncoderConformance, NeuronConformance
from spikeplug.types import Recipe


# A third party's package: a code and a neuron, nothing of core touched.
@dataclasses.dataclass(frozen=True)
class Flowing(Rate):
    """Spike counts that flow: d(t) = 1."""

    name: ClassVar[str] = "flowing"
    flows: ClassVar[bool] = True

    def fit(self, stats):
        p = super().fit(stats)
        return dataclasses.replace(p, scale=p.scale.reshape(()), offset=p.offset.reshape(()))


@dataclasses.dataclass(frozen=True)
class LateIF(IF):
    """IF that adds up for some silent steps and rectifies in the end, by spikes of -1."""

    silent: int = 2
    rectify: bool = False

    name: ClassVar[str] = "late-if"

    @property
    def latency(self):
        return self.silent

    def activated(self, op, top=float("inf"), steps=0):
        return (
            dataclasses.replace(self, rectify=op != "identity") if op in ("identity", "relu") else super().activated(op)
        )

    def init(self, x):
        return (0, torch.zeros_like(x), torch.zeros_like(x))

    def step(self, x, state):
        t, h, g = state
        h = h + x
        if t < self.silent:
            return torch.zeros_like(h), (t + 1, h, g)
        o = (h.clamp(min=0) if self.rectify else h) - g
        s = (o >= 0.5).to(h.dtype) - (o <= -0.5).to(h.dtype)
        return s, (t + 1, h, g + s)

    def residual(self, state):
        return (state[1].clamp(min=0) if self.rectify else state[1]) - state[2]


PLUGIN = types.ModuleType("their_plugin")
PLUGIN.Flowing, PLUGIN.LateIF = Flowing, LateIF
PLUGIN.RECIPE = Recipe(
    "flowing", "a third party's", encoder="flowing", neuron="late-if", encoder_options={"steps": 64},
    targets=frozenset({"module"}),
)  # fmt: skip


@pytest.fixture(autouse=True)
def their_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "their_plugin", PLUGIN)
    for kind, name, what in (
        ("encoder", "flowing", "Flowing"), ("neuron", "late-if", "LateIF"), ("recipe", "flowing", "RECIPE"),
    ):  # fmt: skip
        part = plugins.Part(kind, name, f"their_plugin:{what}", "theirs")
        monkeypatch.setitem(plugins.registry().parts, (kind, name), [part])


class TestFlowing(EncoderConformance):
    @pytest.fixture
    def encoder(self):
        return Flowing(steps=16)


class TestLateIF(NeuronConformance):
    @pytest.fixture(params=[LateIF(), LateIF(silent=0, rectify=True)])
    def neuron(self, request):
        return request.param


class TestClocked(NeuronConformance):
    waived: ClassVar = {"test_is_a_frozen_dataclass": "one of its fields is a neuron, which asdict takes apart"}

    @pytest.fixture
    def neuron(self):
        return Clocked(LateIF(silent=1), 0, 12)


class Everything(nn.Module):
    """Most of what networks have: norms in all places, skips, concatenation, pools, clips, functions and modules."""

    def __init__(self, pool=True):
        super().__init__()
        self.first_norm = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.ahead = nn.BatchNorm2d(8)
        self.behind = nn.Conv2d(8, 12, 1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(20, 16)
        self.fc_norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)
        self.pools = pool

    def forward(self, x):
        x = self.relu(self.stem_norm(self.stem(self.first_norm(x))))
        x = self.pool(x) if self.pools else F.avg_pool2d(x, 2)
        y = self.relu(self.depthwise(x))
        y = self.point(y) + x
        z = F.relu(self.behind(self.ahead(y)))
        x = torch.cat([F.relu(y), z], dim=1)
        x = F.adaptive_avg_pool2d(x, 1)
        x = self.dropout(torch.flatten(x, 1))
        return self.head(F.relu(self.fc_norm(self.fc(x.view(x.size(0), -1)))))


def everything(**options):
    torch.manual_seed(0)
    net = Everything(**options).eval()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net


@pytest.fixture
def images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rate", "flowing"])
@pytest.mark.parametrize("pool", [True, False])
def test_everything_converts_and_every_operation_has_a_role(recipe, pool, images):
    dense = everything(pool=pool)(images)
    spiking = spikeplug.convert(everything(pool=pool), recipe, calibration=[images], steps=1024)
    result = spiking(images)
    assert not torch.equal(result, dense)
    assert (result - dense).norm() < 0.05 * dense.norm()
    with spiking.observing():
        torch.testing.assert_close(spiking(images), dense, rtol=1e-4, atol=1e-5)
    report = spikeplug.report(spiking)
    assert {op.role for op in report.ops} <= {"spiking", "neuron", "coded", "folded", "decoded"}
    assert {op.name for op in report.ops if op.role == "folded"} == {"stem_norm", "ahead", "fc_norm", "dropout"}
    layers = {"stem", "depthwise", "point", "behind", "fc", "head"}
    assert layers <= {op.name for op in report.ops if op.role in ("spiking", "decoded")}
    energy = spikeplug.energy(spiking, [images])
    assert energy.total("acs") > 0


def test_delay_counts_windows_or_silent_steps(images):
    # The norm that padding keeps from being folded, stem, depthwise, the sum, behind, fc: six layers of neurons.
    flowing = spikeplug.convert(everything(), "flowing", calibration=[images], silent=3)
    assert spikeplug.report(flowing).delay == 64 + 6 * 3
    windows = spikeplug.convert(everything(), "rate", calibration=[images], steps=32)
    assert spikeplug.report(windows).delay == 32 * 6


@torch.no_grad()
def test_stepped_equals_fused_where_windows_are_their_own(images):
    spiking = spikeplug.convert(everything().double(), "rate", calibration=[images.double()], steps=16)
    fused = spiking(images.double())
    torch.testing.assert_close(spikeplug.set_execution(spiking, "stepped")(images.double()), fused)


@torch.no_grad()
def test_one_clock_gives_the_same_numbers(images):
    x = images.double()
    spiking = spikeplug.convert(everything().double(), "flowing", calibration=[x])
    clocked = network(spiking)
    assert clocked.delay == spiking.delay
    assert torch.equal(clocked.run(x), spiking(x))
    # A neuron that began its window too early, or a skip that did not wait, would differ.
    for module in clocked.modules():
        if isinstance(getattr(module, "neuron", None), Delay):
            module.neuron = Delay(0)
            module.forward = lambda s: s
            break
    for module in clocked.modules():
        if hasattr(module, "reset"):
            module.reset()
    assert not torch.equal(clocked.run(x), spiking(x))


def test_delay_line_and_pooled_input():
    line = Delay(2)
    xs = torch.arange(5.0).unsqueeze(1)
    state, seen = line.init(xs[0]), []
    for x in xs:
        y, state = line.step(x, state)
        seen.append(float(y))
    assert seen == [0, 0, 0, 1, 2]
    pool = PooledInput(lambda h: h.amax(1, keepdim=True), 2.0)
    zs = torch.randn(6, 3, 4)
    d = 2.0 ** torch.arange(5, -1, -1)
    total = torch.tensordot(d, torch.stack(list(pool.stream(zs))), dims=1)
    torch.testing.assert_close(total, torch.tensordot(d, zs, dims=1).amax(1, keepdim=True))


@torch.no_grad()
def test_save_and_load_are_bit_equal(images, tmp_path):
    for recipe in ("flowing", "rate"):
        spiking = spikeplug.convert(everything(), recipe, calibration=[images])
        spikeplug.save(spiking, tmp_path / recipe)
        torch.manual_seed(3)
        loaded = spikeplug.load(tmp_path / recipe, model=Everything().eval())
        assert torch.equal(loaded(images), spiking(images))
        assert spikeplug.report(loaded).to_dict() == spikeplug.report(spiking).to_dict()
    with pytest.raises(BundleError, match="does not fit the given Sequential"):
        spikeplug.load(tmp_path / "flowing", model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))


@torch.no_grad()
def test_copies_and_dtypes(images):
    spiking = spikeplug.convert(everything(), "flowing", calibration=[images])
    result = spiking(images)
    twin = copy.deepcopy(spiking)
    assert torch.equal(twin(images), result)
    twin.get_submodule("stem").weight.zero_()
    assert not torch.equal(twin(images), result)
    assert torch.equal(spiking(images), result)
    assert copy.deepcopy(spiking).bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_large_batches_run_in_parts(monkeypatch):
    monkeypatch.setattr("spikeplug.network.MICRO_BATCH", 64 * 192 * 8)
    images = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    spiking = spikeplug.convert(everything().double(), "flowing", calibration=[images])
    assert torch.equal(spiking(images)[:8], spiking(images[:8]))


def test_gradient_reaches_every_weight(images):
    spiking = spikeplug.convert(everything(), "rate", calibration=[images])
    spiking(images).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in spiking.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def test_diagnosis_names_the_site_that_loses(images):
    for recipe in ("flowing", "rate"):
        spiking = spikeplug.convert(everything(), recipe, calibration=[images], steps=512)
        sites = {each.site: each for each in spikeplug.diagnose(spiking, [images])}
        assert max(each.error for each in sites.values()) < 0.1
        assert all(sum(each.by_step) == pytest.approx(1) for each in sites.values())
        name = "relu" if recipe == "flowing" else "depthwise"
        site = next(module for module in spiking.modules() if getattr(module, "name", "") == name)
        site.set_params({**dict(site.named_buffers()), "scale": site.scale / 20})
        worse = {each.site: each for each in spikeplug.diagnose(spiking, [images])}
        assert worse[name].error > 0.5
        if recipe == "flowing":
            assert worse[name].residual_999 > 10 * sites[name].residual_999
    with pytest.raises(CalibrationError, match="no batch to diagnose"):
        spikeplug.diagnose(spiking, [])
    with pytest.raises(ConversionError, match="only traced networks"):
        spikeplug.diagnose(
            spikeplug.convert(nn.Sequential(nn.Linear(4, 2)), "rate", calibration=[torch.randn(3, 4)]), []
        )


def test_shared_layer_keeps_shared_weights(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    torch.manual_seed(0)
    net = Twice().eval()
    with torch.no_grad():
        dense = net(images)
        spiking = spikeplug.convert(net, "flowing", calibration=[images], steps=512)
        assert (spiking(images) - dense).norm() < 0.05 * dense.norm()
    assert len(list(spiking.parameters())) == 2


def _branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    return Branching().eval()


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) * torch.sigmoid(self.gate(x))


@pytest.mark.parametrize("recipe", ["rate", "flowing"])
def test_what_is_not_understood_is_named(recipe, images):
    def convert(net, batch=images, **options):
        return spikeplug.convert(net, recipe, calibration=[batch], structure="graph", **options)

    with pytest.raises(ConversionError, match=r"Branching cannot be traced: .*branch"):
        convert(_branching())
    with pytest.raises(ConversionError, match=r"operation 'sigmoid' \(sigmoid\) of Gated has no spiking form"):
        convert(Gated().eval())
    with pytest.raises(ConversionError, match=r"BN 'first_norm' uses statistics of the batch: call model\.eval"):
        convert(Everything())
    with pytest.raises(OptionError, match=r"Everything does not take a batch of shape \[2, 5, 8, 8\]"):
        convert(everything(), torch.randn(2, 5, 8, 8))
    with pytest.raises(ConversionError, match="no layer that can receive spikes"):
        convert(nn.Sequential(nn.ReLU()).eval())
    with pytest.raises(ConversionError, match="is a converted model already"):
        convert(convert(everything()))


def test_excluding_an_operation_leaves_it_dense_and_listed(images):
    spiking = spikeplug.convert(Gated().eval(), "rate", calibration=[images], exclude=["sigmoid", "mul"])
    roles = {op.name: op.role for op in spikeplug.report(spiking).ops}
    assert (roles["sigmoid"], roles["mul"], roles["conv"]) == ("dense", "dense", "spiking")


def test_a_network_that_cannot_be_handed_out_says_why(images):
    with pytest.raises(ConversionError, match="only networks whose trains flow"):
        network(spikeplug.convert(everything(), "rate", calibration=[images]))


def test_clip_without_a_form_is_named(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(
        ConversionError, match=r"'1' \(ReLU6\): neuron 'late-if' has no form with the activation 'clip'"
    ):
        spikeplug.convert(net, "flowing", calibration=[images])


def test_preprocessing_stays_ahead_of_the_code(images):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv((x - self.mean) / 0.25)

    torch.manual_seed(0)
    net = Scaled().eval()
    with torch.no_grad():
        dense = net(images)
        spiking = spikeplug.convert(net, "flowing", calibration=[images], steps=256)
        assert (spiking(images) - dense).norm() < 0.05 * dense.norm()
    assert [op.role for op in spikeplug.report(spiking).ops][:2] == ["dense", "dense"]
    with pytest.raises(ConversionError, match="changes its input before it is coded"):
        network(spiking)


def test_structure_can_be_chosen(images):
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net = spikeplug.convert(dense.eval(), "rate", calibration=[images], structure="modules")
    assert isinstance(net, nn.Sequential)
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    assert isinstance(spikeplug.convert(mlp, "rate", calibration=[torch.randn(5, 4)], structure="graph"), SpikingGraph)


def test_kinds_of_operations():
    kinds = {
        path: kind.kind
        for path, kind in (
            (traced.paths[n], traced.kinds[n]) for traced in [Traced(everything())] for n in traced.graph.nodes
        )
    }
    assert kinds["first_norm"] == "affine"
    assert kinds["relu"] == kinds["relu_1"] == "activation"
    assert kinds["pool"] == "maxpool"
    assert kinds["size"] == "size"


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 3, 1), mix

    def forward(self, x):
        return self.conv(self.mix(F.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("mix", "name"), [(lambda x: x.mean(0, keepdim=True), "mean"), (lambda x: x[1:], "getitem")], ids=str
)
def test_operations_that_mix_samples_do_not_let_trains_pass(mix, name, images):
    with pytest.raises(ConversionError, match=rf"'{name}' gives \[.* for 8 samples: trains flow only"):
        spikeplug.convert(Mixing(mix).eval(), "flowing", calibration=[images])


def test_arguments_by_name_are_refused_or_understood(images):
    spikeplug.convert(Mixing(lambda x: F.relu(input=x)).eval(), "flowing", calibration=[images])

    class Named(Mixing):
        def forward(self, x):
            return self.conv(input=F.relu(self.conv(x)))

    with pytest.raises(ConversionError, match="Conv2d of other than one tensor"):
        spikeplug.convert(Named(None).eval(), "flowing", calibration=[images])


@torch.no_grad()
def test_norm_ahead_of_a_layer_is_folded_where_that_is_the_same():
    torch.manual_seed(0)

    def trained(norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        return norm

    cases = {
        "grouped": (nn.Sequential(trained(nn.BatchNorm2d(8)), nn.Conv2d(8, 12, 3, groups=4)), (4, 8, 6, 6), 1),
        "padded": (nn.Sequential(trained(nn.BatchNorm2d(8)), nn.Conv2d(8, 12, 3, padding=1)), (4, 8, 6, 6), 0),
        "linear": (nn.Sequential(trained(nn.BatchNorm1d(8)), nn.Linear(8, 3, bias=False)), (4, 8), 1),
        # As many columns as channels: the linear layer reads columns.
        "columns": (nn.Sequential(trained(nn.BatchNorm2d(6)), nn.Linear(6, 3)), (4, 6, 6, 6), 0),
    }
    for name, (net, shape, folded) in cases.items():
        x = torch.randn(shape)
        expected = net.eval()(x)
        traced = Traced(net)
        assert len(traced.folded) == folded, name
        torch.testing.assert_close(torch.fx.GraphModule(traced.root, traced.graph)(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_flowing_code_can_code_windows_of_its_own(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    dense = net(images)
    spiking = spikeplug.convert(net, "flowing", calibration=[images], structure="modules")
    stepped = spiking(images)
    torch.testing.assert_close(stepped, spikeplug.set_execution(spiking, "fused")(images), rtol=1e-4, atol=1e-4)
    assert 0 < (stepped - dense).norm() < 0.05 * dense.norm()


def test_conversion_works_in_inference_mode(images):
    with torch.inference_mode():
        spiking = spikeplug.convert(everything(), "flowing", calibration=[images])
        assert torch.equal(spiking(images), spiking(images))


@torch.no_grad()
def test_new_weights_are_seen(images):
    spiking = spikeplug.convert(everything(), "flowing", calibration=[images])
    before = spiking(images)
    layer = spiking.get_submodule("head")
    layer.weight = nn.Parameter(layer.weight * 2)
    assert not torch.equal(spiking(images), before)
