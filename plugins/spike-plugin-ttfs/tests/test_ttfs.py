"""Time to first spike: numbers by hand, Eq. 10 code for code, the conformance kit, bad input."""

from __future__ import annotations

import pytest
import torch

from spike_plugin_ttfs.encoder import TTFS, ContinuousTTFS
from spike_plugin_ttfs.neuron import FirstSpikeIF
from spikeplug import ActivationStats
from spikeplug.coding.types import CodeParams
from spikeplug.errors import CalibrationError, OptionError
from spikeplug.testing import EncoderConformance, NeuronConformance

NO_WIDTH = "a range of no width is an error"


class TestTTFSConformance(EncoderConformance):
    waived = {"test_single_number": NO_WIDTH, "test_all_zero_stays_zero": NO_WIDTH}  # noqa: RUF012

    @pytest.fixture(
        params=[
            TTFS(steps=2),
            TTFS(steps=16, rounding="floor"),
            TTFS(steps=64),
            TTFS(steps=100, clip="mse"),
            TTFS(steps=4096),
            ContinuousTTFS(steps=300),
        ],
        ids=lambda code: f"{code.name}-T{code.steps}-{code.rounding}",
    )
    def encoder(self, request):
        return request.param

    @pytest.fixture
    def neuron(self, encoder):
        return FirstSpikeIF(steps=encoder.steps)


class TestFirstSpikeConformance(NeuronConformance):
    @pytest.fixture
    def neuron(self):
        return FirstSpikeIF(steps=12)

    @pytest.fixture
    def currents(self):
        xs = torch.zeros(12, 9, dtype=torch.float64)
        xs[0] = torch.arange(-2, 7) * 2
        return xs


def params(scale, zero):
    scale, zero = torch.tensor(scale), torch.tensor(float(zero))
    return CodeParams(scale, -(scale * zero), {"zero": zero, "low": -scale * zero, "high": scale * 100})


def test_spikes_by_hand():
    """λ = 1/2, z = 2, N = 7: the codes of Eq. 10, and a spike at step 7 - q."""
    x = torch.tensor([-9.0, -1.0, -0.9, -0.75, 0.0, 0.2, 0.3, 2.5, 9.0])
    floor, nearest, p = TTFS(steps=8, rounding="floor"), TTFS(steps=8), params(0.5, 2)
    assert floor.quantize(x, p).tolist() == [0, 0, 0, 0, 2, 2, 2, 7, 7]
    # -0.75 and 0.25 are half points: floor(x / λ + 1/2) takes them up.
    assert nearest.quantize(x, p).tolist() == [0, 0, 0, 1, 2, 2, 3, 7, 7]
    window = nearest.encode(x, p)
    assert [row.nonzero().flatten().tolist() for row in window.T] == [[], [], [], [6], [5], [5], [4], [0], [0]]
    assert nearest.fused(x, p).tolist() == [-1, -1, -1, -0.5, 0, 0, 0.5, 2.5, 2.5]
    fired = torch.stack(list(FirstSpikeIF(steps=8).bind(p).stream(nearest.drive(x, p))))
    assert torch.equal(fired, window)


def plain_neuron(x, scale, zero, steps, rounding):
    """Eq. 7 with Corollary 1's kernels, step by step in float64: the code of its spike, 0 where it is silent."""
    tau, n = 1 / scale, steps - 1
    b = (n - zero) / tau
    theta = b - (1 / tau / 2 if rounding == "nearest" else 0)
    v, code = x.clone(), torch.zeros_like(x)
    for t in range(n):  # t_emit = 0, ..., t_end - 1
        code = torch.where((v >= theta) & (code == 0), float(n - t), code)
        v = v + 1 / tau  # ψ(t)
    return code


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize("zero", [0, 5, -3, 1000])
@pytest.mark.parametrize("steps", [2, 3, 16, 64, 256])
def test_equals_the_plain_neuron(steps, zero, rounding):
    """λ a power of two, so that the plain neuron's sums of floats are exact on grid and half points too."""
    code, p = TTFS(steps=steps, rounding=rounding), params(2.0**-5, zero)
    grid = (torch.arange(-2 * steps, 2 * steps, dtype=torch.float64) / 4 - zero + steps / 2) * 2.0**-5
    x = torch.cat([grid, grid + torch.rand(grid.shape, generator=torch.Generator().manual_seed(0)) / 128])
    assert torch.equal(code.quantize(x, p), plain_neuron(x, 2.0**-5, zero, steps, rounding))


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize("steps", [16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("low", [-1.7, 0.0, 0.4, -3.1], ids=["both signs", "from 0", "positive", "negative"])
def test_equals_equation_10_on_a_million_values_and_the_whole_grid(steps, rounding, low):
    code = TTFS(steps=steps, rounding=rounding)
    generator = torch.Generator().manual_seed(steps)
    high = -0.2 if low == -3.1 else 2.3
    x = torch.rand(10**6, dtype=torch.float64, generator=generator) * (high - low) * 1.2 + low - (high - low) * 0.1
    p = code.fit(ActivationStats.of(torch.tensor([low, high], dtype=torch.float64)))
    scale, zero = float(p.scale), int(p.extra["zero"])
    grid = (torch.arange(2 * steps + 4, dtype=torch.float64) / 2 - zero - 1) * scale  # grid points and half points
    x = torch.cat([x, grid])
    v = x / scale
    plain = torch.floor(v + 0.5 if rounding == "nearest" else v) + zero
    plain = plain.clamp(0, steps - 1)
    q = code.quantize(x, p)
    assert torch.equal(q, plain)
    # The fused value is Eq. 10's; the spike of the neuron is at N - q.
    torch.testing.assert_close(code.fused(x, p), scale * plain - scale * zero, rtol=1e-6, atol=1e-6)
    part = torch.cat([x[:2000], grid])
    fired = torch.stack(list(FirstSpikeIF(steps=steps).bind(p).stream(code.drive(part, p))))
    assert torch.equal(fired.sum(0), (code.quantize(part, p) > 0).double())
    assert torch.equal((fired * code.weights(p).reshape(-1, 1)).sum(0), code.quantize(part, p))
    if low <= 0 <= high or steps < 4096:  # else the grid has more bits than float32
        assert torch.equal(code.quantize(grid.float(), p).double(), code.quantize(grid, p))
    # In float32 the quotient is rounded: a code may be a neighbour's where it is within an ulp of a tie.
    single = code.quantize(x.float(), p).double()
    assert (single - plain).abs().max() <= 1
    assert (single != plain).double().mean() < 1e-3 + 2e-4 * (steps == 4096)


@pytest.mark.parametrize("steps", [16, 256])
def test_nearest_has_a_third_of_the_error_of_floor(steps):
    x = torch.randn(50000, generator=torch.Generator().manual_seed(0))
    stats = ActivationStats.of(x, ())
    errors = {}
    for rounding in ("floor", "nearest"):
        code = TTFS(steps=steps, rounding=rounding)
        errors[rounding] = float((code.fused(x, code.fit(stats)) - x).square().mean())
    # Uniform within a step: λ²/3 and λ²/12.
    assert errors["floor"] / errors["nearest"] == pytest.approx(4, rel=0.1)


def test_searched_clipping_is_never_worse():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1)) ** 3
    stats = ActivationStats.of(x, ())
    none, mse = TTFS(steps=32), TTFS(steps=32, clip="mse")
    errors = [float((code.fused(x, code.fit(stats)) - x).square().mean()) for code in (none, mse)]
    assert errors[1] < 0.7 * errors[0]


def test_continuous_needs_far_more_steps():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    stats = ActivationStats.of(x, ())

    def error(code):
        return float((code.fused(x, code.fit(stats)) - x).square().mean())

    assert error(ContinuousTTFS(steps=64)) > 3 * error(TTFS(steps=64))
    assert error(ContinuousTTFS(steps=512)) < error(TTFS(steps=64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1: a whole number from 2 to 4096"),
        ({"steps": 4097}, "from 2 to 4096"),
        ({"steps": 2.0}, r"steps=2\.0"),
        ({"steps": 48, "power_of_two": True}, "steps=48: a model of n bits has 2\\^n steps, choose 32 or 64"),
        ({"rounding": "up"}, "rounding='up': choose one of nearest, floor"),
        ({"clip": "max"}, "clip='max'"),
        ({"percentile": 30.0}, "percentile=30"),
    ],
    ids=str,
)
def test_bad_options_say_so(options, message):
    with pytest.raises(OptionError, match=message):
        TTFS(**options)


def test_a_range_of_no_width_says_so():
    with pytest.raises(CalibrationError, match=r"every activation seen is 0\.75: a range of no width"):
        TTFS().fit(ActivationStats.of(torch.full((3, 4), 0.75)))
    with pytest.raises(CalibrationError, match="has no float32 scale"):
        TTFS().fit(ActivationStats.of(torch.tensor([0.0, 1e-44], dtype=torch.float64)))
    with pytest.raises(OptionError, match="rounding='floor'"):
        ContinuousTTFS(clip="mse")
