"""BSE: hand-computed codes, the quantization floor, the paper's equations step by step, and the conformance kit."""

from __future__ import annotations

import pytest
import torch

from spike_plugin_bse.encoder import BSE
from spike_plugin_bse.neuron import BitIF, soma
from spikeplug import ActivationStats
from spikeplug.coding.layers import make_spiking
from spikeplug.coding.site import Site
from spikeplug.coding.types import CodeParams
from spikeplug.errors import CalibrationError, OptionError
from spikeplug.testing import EncoderConformance, NeuronConformance
from spikeplug.testing.encoder import activations

UNIT = CodeParams(torch.tensor(1.0), torch.tensor(0.0))


class TestBSEConformance(EncoderConformance):
    @pytest.fixture(
        params=[
            BSE(steps=1),
            BSE(steps=4),
            BSE(steps=16),
            BSE(steps=17),
            BSE(steps=32),
            BSE(steps=8, granularity="channel"),
            BSE(steps=8, granularity="channel", headroom=0.5, percentile=99.0),
            BSE(steps=8, granularity="token"),
            BSE(steps=20, granularity="token"),
        ],
        ids=lambda code: f"N{code.steps}-{code.granularity}-{code.headroom:g}",
    )
    def encoder(self, request):
        return request.param

    @pytest.fixture
    def neuron(self, encoder):
        return BitIF(steps=encoder.steps)


class TestBitIFConformance(NeuronConformance):
    @pytest.fixture
    def neuron(self):
        return BitIF(steps=4)

    @pytest.fixture
    def currents(self):
        xs = torch.zeros(12, 16, dtype=torch.float64)
        xs[0] = torch.arange(16)
        return xs


def test_codes_are_the_bits_most_significant_first():
    x = torch.tensor([0.0, 5.0, 10.0, 15.0])
    bits = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert BSE(steps=4).encode(x, UNIT).tolist() == bits
    assert BSE(steps=4).count(x, UNIT).tolist() == [0, 2, 2, 4]


def test_ties_round_half_to_even_and_the_ends_clip():
    x = torch.tensor([0.5, 1.5, 2.5, 14.5, 15.5, 99.0, -0.5, -7.0])
    assert BSE(steps=4).fused(x, UNIT).tolist() == [0, 2, 2, 14, 15, 15, 0, 0]


def test_scale_and_offset_are_those_of_the_paper():
    # Eq. 3: μ = -min, R = max + μ, λ = (2^N - 1) / R
    p = BSE(steps=4, align_zero=False).fit(ActivationStats.of(torch.tensor([-1.0, 0.5, 2.0])))
    assert p.offset.item() == -1.0
    assert p.scale.item() == pytest.approx(3 / 15)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize("steps", [2, 8, 16, 24])
def test_aligned_zero_is_exactly_zero(steps, granularity):
    code, x = BSE(steps=steps, granularity=granularity), activations(torch.float32)
    p = code.params(x, code.fit(ActivationStats.of(x)))
    zero = code.fused(x, p)[x == 0]
    assert zero.numel() >= 18
    assert torch.equal(zero, torch.zeros_like(zero))


def test_neuron_trace_of_eleven():
    # Θ = 8, 4, 2, 1: u = 11 -> 1, 3 -> 0, 3 -> 1, 1 -> 1 (at exactly the threshold)
    xs = torch.tensor([11.0, 0, 0, 0])
    assert BitIF(steps=4).window(xs).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("steps", [2, 4, 8, 16, 32])
def test_error_on_uniform_values_is_the_quantization_floor(steps):
    x = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    code = BSE(steps=steps)
    p = code.fit(ActivationStats.of(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    mse = (code.decode(code.encode(x, p), p) - x).square().mean().item()
    assert mse == pytest.approx(1 / (12 * (2**steps - 1) ** 2), rel=0.02)


def test_layer_and_next_code_equal_the_soma():
    code, x = BSE(steps=8), activations()
    layer = torch.nn.Linear(6, 5, dtype=torch.float64)
    p_in = code.fit(ActivationStats.of(x))
    p_out = code.fit(ActivationStats.of(layer(x)))
    flat = x.reshape(-1, 6)
    reference = soma(code.encode(flat, p_in), layer.weight, layer.bias, code, p_in, p_out)
    site = Site("layer", "input", code, BitIF(steps=8))
    make_spiking(layer, site)
    site.set_params(p_in.tensors())
    for site.mode in ("fused", "stepped"):
        assert torch.equal(code.quantize(layer(flat), p_out), reference)


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_integer_weights_give_exact_equality(steps):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randint(0, 2**steps, (64, 32), generator=generator).float()
    layer = torch.nn.Linear(32, 8)
    layer.weight.data = torch.randint(-8, 8, layer.weight.shape, generator=generator).float()
    layer.bias.data = torch.randint(-8, 8, layer.bias.shape, generator=generator).float()
    dense = layer(x)
    site = Site("layer", "input", BSE(steps=steps), BitIF(steps=steps))
    make_spiking(layer, site)
    site.set_params(UNIT.tensors())
    fused = layer(x)
    site.mode = "stepped"
    assert torch.equal(layer(x), fused)
    assert torch.equal(fused, dense)


def test_float32_tolerance_of_stepped_against_fused():
    # One rounding per step and per sum: relative to the largest output, 1e-6 holds with room.
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 256)
    site = Site("layer", "input", BSE(steps=16), BitIF(steps=16))
    make_spiking(layer, site)
    site.set_params(site.encoder.fit(ActivationStats.of(x)).tensors())
    fused = layer(x)
    site.mode = "stepped"
    assert ((layer(x) - fused).abs().max() / fused.abs().max()).item() < 2e-6


def test_token_scale_does_not_depend_on_the_batch():
    code, x = BSE(steps=8, granularity="token"), activations()
    alone = code.fused(x[:1], code.params(x[:1], UNIT))
    assert torch.equal(code.fused(x, code.params(x, UNIT))[:1], alone)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("x", [[0.0, 1e-36, 5e-36], [0.0, 1e-40, 0.0], [-1.5e38, 0.0, 1.5e38]], ids=str)
def test_extreme_ranges_stay_finite(x, granularity):
    code, x = BSE(steps=8, granularity=granularity), torch.tensor(x)
    p = code.params(x, code.fit(ActivationStats.of(x)))
    assert torch.isfinite(code.fused(x, p)).all()
    assert (code.fused(x, p) - x).abs().max() <= code.error_bound(p) * 1.01 + 1e-37


def test_range_beyond_float32_is_refused():
    with pytest.raises(CalibrationError, match=r"the range \[-3e\+38, 3e\+38\] has no torch.float32 scale"):
        BSE(steps=8).fit(ActivationStats.of(torch.tensor([-3e38, 3e38])))


def test_headroom_widens_only_ends_that_are_not_zero():
    stats = ActivationStats.of(torch.tensor([0.0, 4.0]))
    low, high = BSE(steps=8, headroom=0.5).span(BSE(steps=8, headroom=0.5).fit(stats))
    assert low.item() == 0
    assert high.item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 33},
        {"steps": "8"},
        {"granularity": "row"},
        {"percentile": 101},
        {"headroom": -1},
        {"granularity": "token", "headroom": 0.5},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        BSE(**options)
