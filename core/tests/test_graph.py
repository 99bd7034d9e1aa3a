"""Captured networks: a role for every operation, folding, shared sites, streamed trains, one clock, a third party."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spikeplug
from spikeplug.coding.site import in_mode
from spikeplug.errors import CalibrationError, ConversionError, OptionError
from spikeplug.graph.capture import capture
from spikeplug.graph.operations import kinds
from spikeplug.graph.streaming import PooledInput
from spikeplug.graph.timestepped import Delay, TimeStepped, network
from spikeplug.testing import EncoderConformance, NeuronConformance

pytestmark = pytest.mark.usefixtures("third_party")


class TestFlowing(EncoderConformance):
    @pytest.fixture
    def encoder(self, third_party):
        return third_party.Streaming(steps=16)


class TestLateIF(NeuronConformance):
    @pytest.fixture(params=[{}, {"silent": 0, "rectify": True}])
    def neuron(self, request, third_party):
        return third_party.LateIF(**request.param)


class TestClocked(NeuronConformance):
    waived: ClassVar = {"test_is_a_frozen_dataclass": "one of its fields is a neuron, which asdict takes apart"}

    @pytest.fixture
    def neuron(self, third_party):
        return TimeStepped(third_party.LateIF(silent=1), 0, 12)


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
@pytest.mark.parametrize("recipe", ["rate", "streaming"])
@pytest.mark.parametrize("pool", [True, False])
def test_everything_converts_and_every_operation_has_a_role(recipe, pool, images):
    dense = everything(pool=pool)(images)
    spiking = spikeplug.convert(everything(pool=pool), recipe, calibration=[images], steps=1024)
    result = spiking(images)
    assert not torch.equal(result, dense)
    assert (result - dense).norm() < 0.05 * dense.norm()
    with in_mode(spiking, "dense"):
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
    streaming = spikeplug.convert(everything(), "streaming", calibration=[images], silent=3)
    assert spikeplug.report(streaming).delay == 64 + 6 * 3
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
    spiking = spikeplug.convert(everything().double(), "streaming", calibration=[x])
    clocked = network(spiking)
    assert clocked.delay == spikeplug.report(spiking).delay
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
    for recipe in ("streaming", "rate"):
        spiking = spikeplug.convert(everything(), recipe, calibration=[images])
        spikeplug.save(spiking, tmp_path / recipe)
        loaded = spikeplug.load(tmp_path / recipe)
        assert torch.equal(loaded(images), spiking(images))
        assert spikeplug.report(loaded).to_dict() == spikeplug.report(spiking).to_dict()


@torch.no_grad()
def test_copies_and_dtypes(images):
    spiking = spikeplug.convert(everything(), "streaming", calibration=[images])
    result = spiking(images)
    copied = copy.deepcopy(spiking)
    assert torch.equal(copied(images), result)
    copied.get_submodule("stem").weight.zero_()
    assert not torch.equal(copied(images), result)
    assert torch.equal(spiking(images), result)
    assert copy.deepcopy(spiking).bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_large_batches_run_in_parts(monkeypatch):
    monkeypatch.setattr("spikeplug.graph.network.MICRO_BATCH", 64 * 192 * 8)
    images = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    spiking = spikeplug.convert(everything().double(), "streaming", calibration=[images])
    assert torch.equal(spiking(images)[:8], spiking(images[:8]))


def test_gradient_reaches_every_weight(images):
    spiking = spikeplug.convert(everything(), "rate", calibration=[images])
    spiking(images).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in spiking.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def test_diagnosis_names_the_site_that_loses(images):
    for recipe in ("streaming", "rate"):
        spiking = spikeplug.convert(everything(), recipe, calibration=[images], steps=512)
        sites = {each.site: each for each in spikeplug.diagnose(spiking, [images])}
        assert max(each.error for each in sites.values()) < 0.1
        assert all(sum(each.by_step) == pytest.approx(1) for each in sites.values())
        if recipe == "rate":
            spikeplug.set_execution(spiking, "stepped")
            stepped = spikeplug.diagnose(spiking, [images])
            assert [each.site for each in stepped] == list(sites)
            for each in stepped:
                assert each.spikes == pytest.approx(sites[each.site].spikes, rel=1e-3)
                assert each.error == pytest.approx(sites[each.site].error, rel=1e-2, abs=1e-5)
            spikeplug.set_execution(spiking, "fused")
        name = "relu" if recipe == "streaming" else "depthwise"
        site = next(module for module in spiking.modules() if getattr(module, "name", "") == name)
        site.set_params({**dict(site.named_buffers()), "scale": site.scale / 20})
        worse = {each.site: each for each in spikeplug.diagnose(spiking, [images])}
        assert worse[name].error > 0.5
        if recipe == "streaming":
            assert worse[name].residual_999 > 10 * sites[name].residual_999
    with pytest.raises(CalibrationError, match="no batch to diagnose"):
        spikeplug.diagnose(spiking, [])
    layers = spikeplug.convert(everything(), "rate", calibration=[images], structure="layers")
    with pytest.raises(ConversionError, match="was not captured as a graph"):
        spikeplug.diagnose(layers, [])


def test_a_layer_that_is_called_twice_is_compared_with_itself_each_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.conv(3 * torch.tanh(self.conv(x))).mean((2, 3)))

    torch.manual_seed(0)
    batch = torch.randn(4, 3, 8, 8)
    spiking = spikeplug.convert(Twice().eval(), "rate", calibration=[batch], steps=4096)
    found = spikeplug.diagnose(spiking, [batch, batch[:1]])
    assert max(each.error for each in found) < 0.01


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
        spiking = spikeplug.convert(net, "streaming", calibration=[images], steps=512)
        assert (spiking(images) - dense).norm() < 0.05 * dense.norm()
    assert len(list(spiking.parameters())) == 2


def test_kinds_of_operations(images):
    captured = capture(everything(), (images,), {})
    found = {node.meta["path"]: kind.kind for node, kind in kinds(captured).items()}
    assert found["first_norm"] == "affine"
    assert found["relu"] == found["relu_1"] == "activation"
    assert found["pool"] == "maxpool"
    assert found["stem"] == "weighted"


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 3, 1), mix

    def forward(self, x):
        return self.conv(self.mix(F.relu(self.conv(x))))


@torch.no_grad()
@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x.mean(0, keepdim=True),
        lambda x: x[1:],
        lambda x: x.flip(0),
        lambda x: x.transpose(0, 1).flatten(0, 1).reshape(3, -1, *x.shape[2:]).transpose(0, 1),
        lambda x: x.permute(1, 0, 2, 3).roll(1, 1).permute(1, 0, 2, 3),
        lambda x: x - x.mean(0),
        lambda x: x.sum(0) + x,
        lambda x: torch.cat([x, x], 0)[: x.shape[0]],
    ],
    ids=["mean", "slice", "flip", "reshape", "roll", "centred", "broadcast", "cat"],
)
def test_operations_that_mix_samples_are_done_on_decoded_trains(mix, images):
    net = Mixing(mix).eval()
    dense = net(images)
    spiking = spikeplug.convert(net, "streaming", calibration=[images], steps=512)
    assert 0 < (spiking(images) - dense).norm() < 0.05 * dense.norm()
    assert any(op.role == "coded" for op in spikeplug.report(spiking).ops)
    with pytest.raises(ConversionError, match="waits for whole windows"):
        network(spiking)


def test_arguments_by_name_are_understood(images):
    class Named(Mixing):
        def forward(self, x):
            return self.conv(input=F.relu(input=self.conv(x)))

    net = Named(None).eval()
    assert (spikeplug.convert(net, "streaming", calibration=[images], steps=512)(images) - net(images)).norm() < 0.5


def test_conversion_works_in_inference_mode(images):
    with torch.inference_mode():
        spiking = spikeplug.convert(everything(), "streaming", calibration=[images])
        assert torch.equal(spiking(images), spiking(images))


@torch.no_grad()
def test_new_weights_are_seen(images):
    spiking = spikeplug.convert(everything(), "streaming", calibration=[images])
    before = spiking(images)
    layer = spiking.get_submodule("head")
    layer.weight = nn.Parameter(layer.weight * 2)
    assert not torch.equal(spiking(images), before)


class Blocks(nn.Module):
    """Attention within blocks of an image, by einsum, with a bias of places, as MaxViT has it."""

    def __init__(self):
        super().__init__()
        self.conv, self.qkv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        x = self.conv(x)
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, (h // 2) * (w // 2), 4, c)
        b, g, n, d = x.shape
        q, k, v = (each.reshape(b, g, n, 2, 4).permute(0, 1, 3, 2, 4) for each in self.qkv(x).chunk(3, -1))
        p = (torch.einsum("bghid,bghjd->bghij", q, k) / 2 + self.bias.unsqueeze(0)).softmax(-1)
        y = torch.einsum("bghij,bghjd->bghid", p, v).permute(0, 1, 3, 2, 4).reshape(b, g, n, d)
        return self.head(y.mean((1, 2)))


@pytest.mark.parametrize("recipe", ["rate", "streaming"])
@pytest.mark.parametrize("samples", [2, 3])
def test_no_rewrite_fixes_the_number_of_samples(recipe, samples):
    torch.manual_seed(0)
    net, batch = Blocks().eval(), torch.randn(6, 3, 8, 8)
    spiking = spikeplug.convert(net, recipe, calibration=[batch], example=batch[:samples], steps=512)
    for count in (1, 2, 5):
        with torch.no_grad(), in_mode(spiking, "dense"):
            torch.testing.assert_close(spiking(batch[:count]), net(batch[:count]), rtol=1e-4, atol=1e-5)
        assert (spiking(batch[:count]) - net(batch[:count])).norm() < 0.05 * net(batch[:count]).norm()
    with pytest.raises(OptionError):
        spiking(batch[0])
