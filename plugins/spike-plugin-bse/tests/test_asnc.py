"""ASNC: the table against hand-computed numbers, the codec against the table, and bad input."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spikeplug
from spike_plugin_bse.asnc import Table, fit, patterns, schedule
from spike_plugin_bse.codec import Codec
from spike_plugin_bse.neuron import CodecIF
from spike_plugin_bse.nonlinear import ASNC
from spike_plugin_bse.segments import Fit
from spikeplug.coding.listeners import SpikeCount, listening
from spikeplug.coding.statistics import ActivationStats
from spikeplug.errors import CalibrationError, NonFiniteError, OptionError
from spikeplug.testing import NeuronConformance

SAMPLES = torch.randn(65536, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FRESH = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestNeuron(NeuronConformance):
    @pytest.fixture(params=[1, 4, 8, 11, 16, 32])
    def neuron(self, request):
        return CodecIF(steps=request.param)

    @pytest.fixture
    def currents(self):
        return impulse(torch.arange(256, dtype=torch.float64), 12)


def impulse(codes, steps):
    return torch.stack([codes, *[torch.zeros_like(codes)] * (steps - 1)])


def test_schedule_by_hand():
    assert schedule(3) == [(4, 4), (2, 2), (1, 1)]
    # Two steps compare with 256/3 and 512/3, the last eight send bits.
    assert schedule(10)[:2] == [(86, 0), (171, 0)]
    assert schedule(10)[2:] == [(128, 128), (64, 64), (32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert patterns(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert patterns(9)[200].tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("steps", [1, 8, 16, 32])
def test_neuron_fires_the_patterns(steps):
    codes = torch.arange(2 ** min(steps, 8), dtype=torch.float64)
    assert torch.equal(CodecIF(steps=steps).window(impulse(codes, steps)).T, patterns(steps))


def test_table_by_hand():
    # Two segments of two bits: [0, 1) and [1, 4].
    table = Table(
        owner=torch.tensor([0, 1, 1, 1], dtype=torch.int16),
        start=torch.tensor([0.0, 1.0]).double(),
        rate=torch.tensor([3.0, 1.0]).double(),
        bias=torch.tensor([10.0, -1.0]).double(),
        weights=torch.tensor([[2.0, 1.0], [0.5, 0.25]]).double(),
        ends=torch.tensor([[0.0, 7.0], [4.0, -2.0]]).double(),
    )
    x = torch.tensor([0.0, 0.34, 0.99, 1.0, 2.4, 4.0, -1.0, 6.0])
    # codes: (0, 0) (0, 1) (0, 3) (1, 0) (1, 1) (1, 3), then both ends with their lines: 10 - 7, -0.25 - 2 * 2.
    assert table(x).tolist() == [10.0, 11.0, 13.0, -1.0, -0.75, -0.25, 3.0, -4.25]


def test_line_is_fitted_exactly_to_its_levels():
    table = fit(lambda x: 3 * x - 1, torch.linspace(-1, 1, 1000), Fit(steps=8, segments=4, margin=0.0))
    x = torch.linspace(-1, 1, 999, dtype=torch.float64)
    # Half a level of at most the whole range, and the fixed point of the weights.
    assert (table(x) - (3 * x - 1)).abs().max() <= 3 * 2 / 255 / 2 + 1e-4


@pytest.mark.parametrize(("steps", "bound"), [(8, 2.0e-7), (16, 8.7e-7 / 10)])
def test_silu_on_a_gaussian_is_within_the_papers_error(steps, bound):
    table = fit(F.silu, SAMPLES, Fit(steps=steps, segments=32))
    assert (table(FRESH) - F.silu(FRESH)).square().mean() < bound


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.exp], ids=["silu", "gelu", "exp"])
@pytest.mark.parametrize("steps", [4, 8, 16])
def test_more_segments_are_better_and_better_than_uniform_bins(function, steps):
    errors = []
    for segments in (16, 32, 64):
        table = fit(function, SAMPLES, Fit(steps=steps, segments=segments))
        assert table.start.numel() <= segments
        errors.append(float((table(FRESH) - function(FRESH)).square().mean()))
        assert errors[-1] < uniform_bins(function, table.weights.numel() + segments)
    assert errors == sorted(errors, reverse=True)


def uniform_bins(function, bins):
    """Mean squared error of constants on even bins over the range of the samples."""
    low, high = SAMPLES.min(), SAMPLES.max()
    width = (high - low) / bins
    middle = low + (((FRESH - low) / width).floor().clamp(0, bins - 1) + 0.5) * width
    return float((function(middle) - function(FRESH)).square().mean())


def test_segments_crowd_where_function_and_data_need_them():
    edges = fit(F.silu, SAMPLES, Fit(segments=32)).edges
    inner = ((edges > -3) & (edges < 3)).sum()
    assert inner >= 20
    assert torch.equal(edges, edges.sort().values)


def test_ends_go_on_as_asymptotes():
    table = fit(F.silu, SAMPLES * 4, Fit())
    far = torch.tensor([-1e3, 1e3, 1e6], dtype=torch.float64)
    assert torch.allclose(table(far), F.silu(far), atol=2e-2, rtol=1e-3)


def test_end_at_zero_is_not_widened():
    table = fit(torch.exp, torch.linspace(-3, 0, 100), Fit(margin=0.5))
    assert table.ends[:, 0].tolist() == [-4.5, 0.0]


def test_fit_is_deterministic():
    first, second = (fit(F.gelu, SAMPLES, Fit(segments=8)).tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_threshold_ends_the_splitting():
    assert fit(F.silu, SAMPLES, Fit(segments=64, threshold=10.0, refine=0)).start.numel() < 10


@pytest.mark.parametrize("option", ["separation", "consistency", "balance", "target"])
def test_every_criterion_of_the_split_score_acts(option):
    zero = dict.fromkeys(("separation", "consistency", "balance", "target"), 0.0)
    tables = [fit(F.silu, SAMPLES, Fit(segments=4, refine=0, **{**zero, each: 1.0})) for each in zero]
    mine = tables[list(zero).index(option)]
    assert sum(torch.equal(mine.edges, table.edges) for table in tables) == 1


@pytest.mark.parametrize(
    ("function", "samples", "message"),
    [
        (F.silu, torch.empty(0), "empty"),
        (F.silu, torch.full((9,), 2.5), "every input seen is 2.5"),
        (F.silu, torch.tensor([0.0, float("nan")]), "NaN or infinity"),
        (torch.log, torch.linspace(0.1, 1, 9), "not finite at"),
        (lambda x: x * 0 + 3, torch.linspace(0, 1, 9), "constant"),
    ],
    ids=["empty", "one value", "nan", "not finite", "constant"],
)
def test_what_cannot_be_fitted_says_why(function, samples, message):
    with pytest.raises(CalibrationError, match=message):
        fit(function, samples, Fit())


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"steps": 33}, {"segments": 0}, {"segments": 2000}, {"tails": 0.0}, {"margin": -1.0},
        {"threshold": float("nan")}, {"separation": 0.0, "consistency": 0.0, "balance": 0.0, "target": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Fit(**options)


def calibrated(function=F.silu, samples=SAMPLES, **options):
    codec = Codec("act", function, Fit(**options))
    codec.set_params(codec.fit(ActivationStats.of(samples, ())))
    return codec


@pytest.mark.parametrize("steps", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stepped_equals_fused_equals_table(steps, dtype):
    codec = calibrated(steps=steps, segments=8)
    x = torch.cat([FRESH[:5000].to(dtype), torch.tensor([-50.0, 50.0], dtype=dtype)])
    fused = codec(x)
    codec.mode = "stepped"
    assert torch.equal(codec(x), fused)
    table, out = Table.from_tensors(codec._buffers), spikeplug.CodeParams(codec.scale, codec.offset)
    half = float(codec.output.error_bound(out))
    low, high = codec.output.span(out)
    # Inputs at a border between two codes may fall to either side in float32.
    off = (fused - table(x).clamp(low, high)).abs() > half * 1.01 + 1e-5
    assert off.float().mean() <= (0 if dtype == torch.float64 else 0.002)
    assert not torch.equal(fused, F.silu(x))


def test_spikes_are_those_made():
    codec, x, counts = calibrated(segments=8), FRESH[:3000].float(), []
    for execution in ("fused", "stepped"):
        codec.mode = execution
        counts.append(SpikeCount())
        with listening({codec: counts[-1]}):
            codec(x)
    assert counts[0].spikes == counts[1].spikes > 0
    assert counts[0].neurons == counts[1].neurons == 2 * x.numel()


def test_gradient_is_that_of_the_function():
    codec = calibrated(F.gelu)
    x = FRESH[:100].float().requires_grad_()
    (mine,) = torch.autograd.grad(codec(x).square().sum(), x)
    y = codec(x).detach()
    (exact,) = torch.autograd.grad((F.gelu(x) * 2 * y).sum(), x)
    torch.testing.assert_close(mine, exact)


def test_uncalibrated_and_not_finite_are_refused():
    with pytest.raises(CalibrationError, match="'act' is not calibrated"):
        Codec("act", F.silu, Fit())(torch.ones(3))
    with pytest.raises(NonFiniteError, match="site 'act'"):
        calibrated(segments=2)(torch.tensor([1.0, float("nan")]))


def test_parameters_survive_half_and_pickle():
    codec, x = calibrated(segments=4), FRESH[:100].float()
    y = codec(x)
    assert torch.equal(codec.half()(x), y)
    assert codec(x.half()).dtype == torch.float16
    assert torch.equal(pickle.loads(pickle.dumps(codec))(x), y)


def build(op, original=None, **options):
    """An operation as a network has it, calibrated where it needs no data."""
    module = ASNC(**options).build(op, original, "op")
    for part in module.modules():
        if isinstance(part, Codec) and not part.observes:
            part.set_params(part.fit(None))
    return module


@given(st.floats(min_value=-87, max_value=88))
@settings(max_examples=200, deadline=None)
def test_exp_has_a_small_relative_error_everywhere(x):
    value = torch.tensor([x], dtype=torch.float64)
    assert abs(float(EXP(value) / value.exp()) - 1) < 5e-4


@given(st.floats(min_value=1e-30, max_value=1e30))
@settings(max_examples=200, deadline=None)
def test_reciprocal_and_rsqrt_have_a_small_relative_error_everywhere(x):
    value = torch.tensor([x], dtype=torch.float64)
    assert abs(float(RECIPROCAL(value) * value) - 1) < 5e-4
    assert abs(float(RSQRT(value) * value.sqrt()) - 1) < 5e-4


EXP, RECIPROCAL, RSQRT = (build(op) for op in ("exp", "reciprocal", "rsqrt"))


def test_softmax_holds_for_long_rows_and_large_logits():
    softmax = build("softmax", nn.Softmax(dim=-1))
    masked = torch.tensor([[1e4, -1e4, 0.0, torch.finfo(torch.float32).min]])
    torch.testing.assert_close(softmax(masked), masked.softmax(-1), atol=1e-4, rtol=0)
    long = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)) * 3
    exact, found = long.softmax(-1), softmax(long)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2), atol=1e-3, rtol=0)
    assert ((found - exact) / exact).abs().max() < 1e-3
    assert not torch.equal(found, exact)
    other = build("softmax", nn.Softmax(dim=0))
    torch.testing.assert_close(other(long.T), exact.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    "original",
    [nn.LayerNorm(32), nn.LayerNorm((4, 32), elementwise_affine=False), nn.RMSNorm(32), nn.RMSNorm(32, eps=1e-5)],
    ids=str,
)
def test_norms_keep_their_function(original, scale):
    for parameter in original.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    norm = build("layernorm" if isinstance(original, nn.LayerNorm) else "rmsnorm", original)
    x = torch.randn(8, 4, 32, generator=torch.Generator().manual_seed(1)) * scale + scale
    torch.testing.assert_close(norm(x), original(x), atol=2e-4, rtol=2e-4)
    assert not torch.equal(norm(x), original(x))
    assert dict(norm.named_parameters()).keys() == dict(original.named_parameters()).keys()


def test_unknown_operation_says_the_choices():
    with pytest.raises(OptionError, match="no form of 'maxout': elu, exp, gelu"):
        ASNC().build("maxout", nn.Identity(), "op")
    with pytest.raises(OptionError, match="softmax without dim"):
        ASNC().build("softmax", nn.Softmax(), "op")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.act, self.last = nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        return self.softmax(self.last(self.act(self.norm(self.first(x)))))


def test_laser_converts_saves_loads_and_reports(tmp_path):
    batch = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    dense = Net().eval()(batch)
    net = spikeplug.convert(Net().eval(), "laser", calibration=[batch], segments=16)
    assert {op.name: op.role for op in spikeplug.report(net).ops} == {
        "first": "spiking", "norm": "approximated", "act": "approximated", "last": "spiking", "softmax": "approximated"
    }  # fmt: skip
    fused = net(batch)
    torch.testing.assert_close(fused, dense, atol=2e-3, rtol=0)
    assert not torch.equal(fused, dense)
    torch.testing.assert_close(spikeplug.set_execution(net, "stepped")(batch), fused, atol=1e-4, rtol=0)
    spikeplug.set_execution(net, "fused")
    with spikeplug.count_spikes(net) as counts:
        net(batch)
    assert set(counts.by_site) == {
        "first", "last", "act.codec", "norm.rsqrt.codec", "softmax.exp.codec", "softmax.reciprocal.codec"
    }  # fmt: skip
    assert all(count.spikes > 0 for count in counts.by_site.values())
    spikeplug.save(net, tmp_path / "net")
    assert torch.equal(spikeplug.load(tmp_path / "net")(batch), fused)


@pytest.mark.parametrize(
    ("include", "spiking"),
    [
        (["activation"], {"act.codec"}),
        (["norm", "input"], {"first", "last", "norm.rsqrt.codec"}),
        (["attention"], {"softmax.exp.codec", "softmax.reciprocal.codec"}),
        (["gelu", "last"], {"act.codec", "last"}),
    ],
)
def test_subsystems_are_switched_by_name(include, spiking):
    batch = torch.randn(8, 16)
    net = spikeplug.convert(Net().eval(), "laser", calibration=[batch], include=include, segments=4)
    with spikeplug.count_spikes(net) as counts:
        net(batch)
    assert set(counts.by_site) == spiking


def test_options_reach_the_codecs():
    config = spikeplug.ConversionConfig.resolve("laser", {"steps": 8, "segments": 5})
    assert config.build_approximators() == {"asnc": ASNC(steps=8, segments=5)}
    assert dataclasses.asdict(ASNC())["segments"] == 32
    with pytest.raises(OptionError, match="segments=0"):
        spikeplug.ConversionConfig.resolve("laser", {"segments": 0})
    with pytest.raises(OptionError, match="unknown option 'segment' of recipe 'laser', did you mean 'segments'"):
        spikeplug.ConversionConfig.resolve("laser", {"segment": 3})


def test_a_float64_network_with_approximations_is_verified_as_far_as_they_compute():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4), torch.nn.Softmax(-1)
    )
    net, batch = net.double().eval(), torch.randn(32, 8, dtype=torch.float64)
    spiking = spikeplug.convert(net, "bse", calibration=[batch], approximators={"*": "asnc"})
    with torch.no_grad(), spikeplug.in_mode(spiking, "dense"):
        torch.testing.assert_close(spiking(batch), net(batch), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(spiking(batch), net(batch), rtol=1e-5, atol=1e-6)


def test_a_listener_hears_what_it_has_a_method_for():
    class Windows(spikeplug.Listener):
        def __init__(self):
            self.shapes = []

        def window(self, coder, x, spikes):
            self.shapes.append((tuple(x.shape), tuple(spikes.shape)))

    net, batch = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    spiking = spikeplug.convert(net, "bse", calibration=[batch], steps=6)
    heard = Windows()
    (site,) = spikeplug.coding.site.sites(spiking).values()
    with spikeplug.listening({site: heard}):
        assert (heard.hears("window"), heard.hears("fired"), site.heard("activation")) == (True, False, False)
        spiking(batch)
        with spikeplug.in_mode(spiking, "dense"):
            spiking(batch)
        spikeplug.set_execution(spiking, "stepped")(batch)
    spiking(batch)
    assert heard.shapes == [((3, 8), (6, 3, 8))] * 2
