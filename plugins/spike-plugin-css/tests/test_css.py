"""Canonic signed spikes: hand-computed trains, the equations step by step, fast windows, the conformance kit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spikeplug
from spike_plugin_css.adjust import amplification
from spike_plugin_css.encoder import CSS
from spike_plugin_css.neuron import TSA, TSAReLU
from spikeplug.coding.site import in_mode
from spikeplug.coding.types import CodeParams
from spikeplug.errors import OptionError
from spikeplug.testing import EncoderConformance, NeuronConformance

UNIT = CodeParams(torch.ones(()), torch.zeros(()))


class TestCSSConformance(EncoderConformance):
    waived = {  # noqa: RUF012
        "test_grid_points_are_kept": "with β < 2 a value has several trains, so levels are no grid",
        "test_ties_go_to_a_neighbour": "with β < 2 levels are not even",
    }

    @pytest.fixture(params=[(12, 1.5), (1, 1.5), (8, 2.0), (20, 1.2)], ids=str)
    def encoder(self, request):
        return CSS(*request.param, percentile=100.0)  # below 100, values out of reach would be clipped

    @pytest.fixture
    def neuron(self, encoder):
        return TSA(encoder.beta, silent=0)


@pytest.mark.parametrize(
    "neuron",
    [
        TSA(),
        TSA(2.0, 0),
        TSA(1.2, 3),
        TSAReLU(),
        TSAReLU(2.0, 0),
        TSAReLU(1.5, 2, negative=False),
        TSAReLU(1.5, 1, top=2.0, steps=12),
    ],
    ids=str,
)
class TestNeurons(NeuronConformance):
    @pytest.fixture
    def neuron(self, neuron):
        return neuron


# The kit's causality check shortens nothing, but a top is that of a whole window.
def test_hand_computed_encoding():
    # 5 amplitudes in 3 steps of β = 2, worth 4, 2, 1: 5/4 fires, 2 (5/4 - 1) = 1/2 fires, 2 (1/2 - 1) = -1 fires -1.
    code = CSS(steps=3, beta=2.0)
    spikes = code.encode(torch.tensor([5.0, -5.0, 0.0, 7.0]), UNIT)
    assert spikes.T.tolist() == [[1, 1, -1], [-1, -1, 1], [0, 0, 0], [1, 1, 1]]
    assert code.decode(spikes, UNIT).tolist() == [5, -5, 0, 7]


def test_hand_computed_silent_step():
    # β = 2, L = 1, θ β^L / 2 = 1. z = 1, 1: u = 1 | 3 fires, 1 | 2 fires, 0. Decoded 2 + 1 = what came in.
    assert TSA(2.0, 1).window(torch.tensor([[1.0], [1.0]])).flatten().tolist() == [1, 1]
    # z = 1, -3 decodes to -1: TSA-ReLU fires nothing in all, TSA -1.
    z = torch.tensor([[1.0], [-3.0]])
    assert float((TSA(2.0, 1).window(z).flatten() * torch.tensor([2.0, 1.0])).sum()) == -1
    assert TSAReLU(2.0, 1).window(z).flatten().tolist() == [0, 0]


def reference(z, beta, silent, rectify, top=float("inf")):
    """A.19-A.24 with the three corrections, one neuron, in Python floats."""
    steps, fired = len(z), []
    for t in range(steps + silent):
        h = sum(beta ** (t - tau) * z[tau] for tau in range(min(t, steps - 1) + 1))
        g = sum(beta ** (t - tau) * beta**silent * s for tau, s in fired)
        if t >= silent:
            o = (min(max(h, 0.0), top * beta ** (t - steps + 1)) if rectify else h) - g
            fired.append((t, float(o >= beta**silent / 2) - float(o <= -(beta**silent) / 2)))
    return [s for _, s in fired]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1.25, 1.5, 2.0]),
    st.integers(0, 3),
    st.sampled_from(["tsa", "relu", "clip"]),
    st.lists(st.integers(-40, 40), min_size=1, max_size=8),
)
def test_window_and_steps_equal_the_equations(beta, silent, kind, whole):
    # Eighths and a third of a step off every threshold, so that no sum of floats meets one.
    z = [each / 8 + 1 / 24 for each in whole]
    neuron = TSA(beta, silent) if kind == "tsa" else TSAReLU(beta, silent)
    top = float("inf")
    if kind == "clip":
        neuron, top = TSAReLU(beta, silent, top=1.9, steps=len(z)), 1.9
    expected = reference(z, beta, silent, kind != "tsa", top)
    xs = torch.tensor(z, dtype=torch.float64).unsqueeze(1)
    assert neuron.window(xs).flatten().tolist() == expected
    assert torch.cat(list(neuron.stream(xs))).tolist() == expected


@pytest.mark.parametrize(
    "neuron", [TSA(), TSAReLU(2.0, 2), TSAReLU(top=3.0, steps=12), TSAReLU(negative=False)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_window_is_bit_equal_to_the_step_loop(neuron, dtype):
    xs = torch.randn(12, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(neuron.window(xs), torch.stack(list(neuron.stream(xs))))


@pytest.mark.slow
@pytest.mark.parametrize("neuron", [TSA(), TSAReLU(), TSAReLU(top=3.0, steps=12), TSAReLU(negative=False)], ids=str)
def test_compiled_window_is_bit_equal(neuron):
    import dataclasses

    xs = torch.randn(12, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dataclasses.replace(neuron, compiled=True).window(xs), neuron.window(xs))


def test_gradient_is_the_dense_one_where_the_output_follows_the_input():
    d = 1.5 ** torch.arange(11.0, -1, -1)
    xs = (torch.randn(12, 50, generator=torch.Generator().manual_seed(0)) / 4).requires_grad_()
    value = torch.tensordot(d, TSAReLU().window(xs), dims=1)
    (found,) = torch.autograd.grad(value.sum(), xs)
    inside = torch.tensordot(d, xs.detach(), dims=1)
    expected = d.unsqueeze(1) * ((inside > 0) & (inside <= d.sum())).float()
    torch.testing.assert_close(found, expected)


def test_step_has_a_gradient():
    x = torch.full((3,), 0.4, requires_grad=True)
    neuron = TSA(1.5, 0)
    spikes, _ = neuron.step(x, neuron.init(x))
    spikes.sum().backward()
    assert (x.grad > 0).all()


@pytest.mark.parametrize("beta", [1.0, 2.1, 0.5])
def test_beta_is_checked(beta):
    for part in (lambda: CSS(beta=beta), lambda: TSA(beta)):
        with pytest.raises(OptionError, match=f"beta={beta}: a number above 1, at most 2"):
            part()


@pytest.mark.parametrize("given", [{"steps": 0}, {"steps": 65}, {"headroom": 0.5}, {"percentile": 20}])
def test_options_are_checked(given):
    with pytest.raises(OptionError, match=f"{next(iter(given))}={next(iter(given.values()))}"):
        CSS(**given)
    with pytest.raises(OptionError, match="silent=-1"):
        TSA(silent=-1)
    with pytest.raises(OptionError, match="negative=False"):
        TSA(negative=False).activated("identity")
    with pytest.raises(OptionError, match="needs steps"):
        TSAReLU(top=1.0).init(torch.zeros(1))


def test_adjustment_follows_equation_a18():
    total = 100.0
    assert amplification(0.5, total) == 1.0
    assert amplification(1.5, total) == pytest.approx(1 + 4 * 0.5 / 100)
    assert amplification(4.0, total) == pytest.approx(1 + (3 - 1) / 100 + 0.04)
    assert amplification(21.0, total) == pytest.approx(1.2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    ).eval()


@pytest.fixture
def images():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_adjusting_lowers_what_is_left(images):
    spiking = spikeplug.convert(network(), "css", calibration=[images], silent=0, percentile=95.0)
    before = max(site.residual_999 for site in spikeplug.diagnose(spiking, [images]) if site.residual_999)
    growth = spikeplug.get_trainer("css-adjust", rounds=4).train(spiking, [images])
    after = max(site.residual_999 for site in spikeplug.diagnose(spiking, [images]) if site.residual_999)
    assert growth[0] > 1.5
    assert after < before / 10
    with pytest.raises(OptionError, match="adjusts networks converted by 'css'"):
        spikeplug.get_trainer("css-adjust").train(spikeplug.convert(network(), "rate", calibration=[images]), [images])


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["css", "css-q"])
def test_recipes_are_near_the_dense_network_and_differ_from_it(recipe, images):
    dense = network()(images)
    spiking = spikeplug.convert(network(), recipe, calibration=[images])
    result = spiking(images)
    assert not torch.equal(result, dense)
    assert (result - dense).norm() < 0.03 * dense.norm()
    with in_mode(spiking, "dense"):
        torch.testing.assert_close(spiking(images), dense)


@torch.no_grad()
def test_silent_period_and_negative_spikes_are_what_makes_it_work(images):
    def deep():
        torch.manual_seed(0)
        layers = [part for _ in range(8) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *layers).eval()

    dense = deep()(images)
    error = {}
    for name, options in {"both": {}, "no silence": {"silent": 0}, "no negative": {"negative": False}}.items():
        result = spikeplug.convert(deep(), "css", calibration=[images], **options)(images)
        error[name] = float((result - dense).norm())
    assert error["both"] < 0.5 * min(error["no silence"], error["no negative"])


def test_fused_execution_and_excluded_layers_are_refused(images):
    with pytest.raises(OptionError, match="execution='fused': trains of 'css' stream"):
        spikeplug.convert(network(), "css", calibration=[images], execution="fused")
    spiking = spikeplug.convert(network(), "css", calibration=[images])
    with pytest.raises(OptionError, match="execution='fused': trains of 'css' stream"):
        spikeplug.set_execution(spiking, "fused")


@torch.no_grad()
@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Softmax(1)),
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 4), nn.GELU()
        ),
    ],
    ids=["SiLU", "GroupNorm", "AdaptiveMaxPool2d"],
)
def test_trains_end_where_an_operation_needs_values_and_begin_anew(net, images):
    net.eval()
    dense = net(images)
    spiking = spikeplug.convert(net, "css", calibration=[images], steps=16)
    assert 0 < (spiking(images) - dense).norm() < 0.02 * dense.norm()
    rows = {op.name: op.role for op in spikeplug.report(spiking).ops}
    assert "dense" in rows.values()
    # A window of its own on each side of the operation, and what the neurons wait.
    assert spikeplug.report(spiking).delay >= 2 * 16


@torch.no_grad()
def test_an_excluded_layer_stays_dense_between_trains(images):
    dense = network()
    spiking = spikeplug.convert(dense, "css", calibration=[images], exclude=["2"], steps=16)
    assert {op.name: op.role for op in spikeplug.report(spiking).ops}["2"] == "dense"
    assert 0 < (spiking(images) - dense(images)).norm() < 0.05 * dense(images).norm()


def test_percentile_and_headroom_set_the_amplitude():
    x = torch.cat([torch.zeros(9999), torch.tensor([10.0])])
    stats = spikeplug.ActivationStats.of(x, channels=())
    code = CSS(steps=4, beta=2.0, percentile=100.0)
    assert float(code.fit(stats).scale) == pytest.approx(10 / 15)
    assert float(CSS(steps=4, beta=2.0, percentile=100.0, headroom=1.5).fit(stats).scale) == pytest.approx(1.0)
    assert float(CSS(steps=4, beta=2.0, percentile=99.0).fit(stats).scale) == 1.0  # nothing but zeros left
