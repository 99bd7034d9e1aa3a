"""Neurons with kernels: Theorem 2 step by step, Corollaries 1-5, approximators and their error bounds, Theorem 3."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spikeplug
from spike_plugin_ttfs.encoder import TTFS
from spike_plugin_ttfs.explain import bound, explain
from spike_plugin_ttfs.kernels import KernelNeuron, Window
from spike_plugin_ttfs.nonlinear import POINTWISE, Kernels
from spikeplug import ActivationStats
from spikeplug.errors import ConversionError, NonFiniteError, OptionError

IDENTITY = nn.Identity()
ROUNDINGS = ["floor", "nearest"]


def times(window, *shape, seed=0):
    return torch.randint(window.steps, shape, generator=torch.Generator().manual_seed(seed))


def quantized(y, window, rounding):
    """Clip and quantize on the window's grid, straight from Eq. 9."""
    shift = 0.5 if rounding == "nearest" else 0.0
    code = torch.floor((y - window.low) * window.tau + shift).clamp(0, window.last)
    return window.low + code / window.tau


def test_kernels_by_hand():
    """f = square on {0, 1, 2, 3}, h = square root on {0, 1, 2}: h^-1 = square."""
    neuron = KernelNeuron(torch.square, torch.square, Window(0.0, 3.0, 4), Window(0.0, 2.0, 3), "floor")
    assert neuron.eta().tolist() == [1, 3, 5]
    assert neuron.theta() == 4
    assert neuron.psi().tolist() == [3]
    # Inputs 3 (step 0), 1 (step 2) and 0 (silent), weights 1/2, 1, 7: potential 5.5, root 2.3.
    when = torch.tensor([[0, 2, 3], [2, 3, 3], [3, 3, 3]])
    v = neuron.receive(when, torch.tensor([0.5, 1.0, 7.0]))
    assert v.tolist() == [5.5, 0.5, 0.0]
    assert neuron.emit(v).tolist() == [0, 2, 2]
    assert neuron.outgoing.values(neuron.emit(torch.tensor([3.9, 1.0, 4.0]))).tolist() == [1, 1, 2]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("f", "h", "h_inverse", "outgoing"),
    [
        (IDENTITY, IDENTITY, IDENTITY, Window(-1.3, 2.1, 33)),
        (torch.exp, torch.log, torch.exp, Window(0.3, 3.0, 40)),
        (F.silu, IDENTITY, IDENTITY, Window(-0.4, 3.0, 64)),
        (torch.square, torch.sqrt, torch.square, Window(0.1, 2.5, 17)),
        (torch.sin, torch.atan, torch.tan, Window(-1.0, 1.2, 50)),
    ],
    ids=["identity", "log-sum-exp", "silu", "norm", "atan"],
)
def test_theorem_2(f, h, h_inverse, outgoing, rounding):
    """Step by step, in closed form, and from Eq. 9."""
    incoming = Window(-1.5, 1.7, 21)
    neuron = KernelNeuron(f, h_inverse, incoming, outgoing, rounding)
    when = times(incoming, 500, 6)
    weight = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.6
    v = neuron.receive(when, weight)
    plain = (weight * f(incoming.values(when))).sum(-1)
    torch.testing.assert_close(v, plain)
    emitted = neuron.emit(v)
    assert torch.equal(emitted, neuron.fused(when, weight))
    assert emitted.unique().numel() > 5
    if rounding == "floor":
        torch.testing.assert_close(outgoing.values(emitted), quantized(h(plain), outgoing, rounding))
    else:
        reachable = h(plain).clamp(outgoing.low, outgoing.high)
        assert (outgoing.values(emitted) - reachable).abs().max() <= 0.5 / outgoing.tau + 1e-9


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_corollary_1_is_the_first_spike_code(rounding):
    code = TTFS(steps=32, rounding=rounding)
    x = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = code.fit(ActivationStats.of(x, ()))
    low, high = (float(end) for end in code.span(p))
    neuron = KernelNeuron(IDENTITY, IDENTITY, Window(-1.0, 1.0, 8), Window(low, high, 32), rounding)
    assert torch.equal(31 - neuron.emit(x), code.quantize(x, p).long())


def test_kernels_that_are_not_monotone_say_so():
    window = Window(-1.0, 1.0, 9)
    for h_inverse in (torch.square, torch.neg, torch.log):
        with pytest.raises(OptionError, match=r"h is not monotone increasing on \[-1, 1\]"):
            KernelNeuron(IDENTITY, h_inverse, window, window)
    with pytest.raises(OptionError, match=r"window \[1, 1\]: a range of no width"):
        KernelNeuron(IDENTITY, IDENTITY, window, Window(1.0, 1.0, 4))
    with pytest.raises(OptionError, match="steps=1"):
        KernelNeuron(IDENTITY, IDENTITY, Window(0.0, 1.0, 1), window)
    with pytest.raises(OptionError, match="rounding='up'"):
        KernelNeuron(IDENTITY, IDENTITY, window, window, "up")


def net(op, width=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), op, nn.Linear(width, 3)).eval()


def batch(seed=0):
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(seed)) * 3


def converted(op, **options):
    """A network whose one nonlinear operation is approximated, alone; that operation; and its inputs."""
    model = spikeplug.convert(
        net(op), "ttfs", calibration=[batch()], approximators={"*": "ttfs-kernels"}, exclude=["input"],
        approximator_options={"ttfs-kernels": options},
    )  # fmt: skip
    return model, model.get_submodule("1"), model.get_submodule("0")(batch()).detach()


@pytest.mark.parametrize("op", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Sigmoid()], ids=str)
@pytest.mark.parametrize("steps", [64, 1024])
def test_functions_of_one_number_are_within_their_bound(op, steps):
    model, approximated, x = converted(op, steps=steps)
    slope = POINTWISE[{"GELU": "gelu", "SiLU": "silu", "ReLU": "relu", "Sigmoid": "sigmoid"}[type(op).__name__]]
    error = (approximated(x) - op(x)).abs().max()
    told, tells = float(approximated.input.step), float(approximated.output.step)
    assert 0 < error <= (slope * told + tells) / 2 + 1e-6
    assert error > 0.2 * tells / 2
    assert {each.role for each in spikeplug.report(model).ops if each.name == "1"} == {"approximated"}


def test_largest_slopes():
    x = torch.linspace(-10, 10, 200001, dtype=torch.float64)
    for op, slope in {F.silu: "silu", F.gelu: "gelu", torch.sigmoid: "sigmoid"}.items():
        steepest = float((op(x).diff() / x.diff()).abs().max())
        assert POINTWISE[slope] - 1e-4 < steepest + 1e-4 < POINTWISE[slope] + 2e-4


@pytest.mark.parametrize("steps", [256, 4096])
def test_softmax_is_within_its_bound(steps):
    _, approximated, x = converted(nn.Softmax(dim=-1), steps=steps, keys=64, reach=18.0)
    exact = x.softmax(-1)
    y = approximated(x)
    near = (x - x.amax(-1, keepdim=True)) > -17.9
    told, tells = float(approximated.score.step), float(approximated.total.step)
    error = (y.log() - exact.log())[near].abs().max()
    assert 0 < error <= told + tells / 2 + 24 * math.exp(-18) + 1e-5
    assert (y[x - x.amax(-1, keepdim=True) < -18.1] == 0).all()
    masked = torch.cat([x, torch.full((len(x), 5), torch.finfo(torch.float32).min)], 1)
    assert (approximated(masked)[:, 24:] == 0).all()
    with pytest.raises(OptionError, match="a row of 65 scores: give ttfs-kernels keys of so many"):
        approximated(torch.zeros(1, 65))


@pytest.mark.parametrize("steps", [512, 4096])
def test_rmsnorm_is_within_its_bound(steps):
    _, approximated, x = converted(nn.RMSNorm(24), steps=steps)
    y, exact = approximated(x), F.rms_norm(x, (24,))
    r = x.square().mean(-1, keepdim=True).sqrt()
    told, tells = float(approximated.input.step), float(approximated.mean.step)
    share = told / r + told**2 / (4 * r**2)
    error = (y / exact).log().abs().amax(-1, keepdim=True)
    assert (error <= tells / 4 + share / (2 - 2 * share) + 1e-4).all()
    assert error.max() > 0


@pytest.mark.parametrize("op", [nn.SiLU(), nn.Softmax(dim=-1), nn.RMSNorm(24)], ids=str)
def test_stepped_fires_what_fused_counts(op, tmp_path):
    model, _, _ = converted(op, steps=128, keys=32)
    results = []
    for execution in ("fused", "stepped"):
        spikeplug.set_execution(model, execution)
        with spikeplug.count_spikes(model) as counts, torch.no_grad():
            results.append((model(batch(1)), {name: count.spikes for name, count in counts.by_site.items()}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert sum(results[0][1].values()) > 0
    spikeplug.save(model, tmp_path / "net")
    loaded = spikeplug.load(tmp_path / "net")
    assert torch.equal(loaded(batch(1)), results[1][0])


def test_gradients_are_those_of_the_function():
    _, approximated, x = converted(nn.SiLU(), steps=4096)
    x.requires_grad_()
    (own,) = torch.autograd.grad(approximated(x).sum(), x)
    (exact,) = torch.autograd.grad(F.silu(x).sum(), x)
    torch.testing.assert_close(own, exact, rtol=0, atol=0.02)


def test_bad_kernels_say_so():
    with pytest.raises(OptionError, match="ttfs-kernels has no form of 'mish'"):
        spikeplug.convert(net(nn.Mish()), "ttfs", calibration=[batch()], approximators={"mish": "ttfs-kernels"})
    for options, message in [
        ({"steps": 1}, "steps=1"),
        ({"margin": -1.0}, "margin=-1"),
        ({"reach": 0.0}, "reach=0"),
        ({"keys": 1}, "keys=1"),
    ]:
        with pytest.raises(OptionError, match=message):
            Kernels(**options)
    model = net(nn.SiLU())
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    dead = spikeplug.convert(
        model, "ttfs", calibration=[batch()], approximators={"*": "ttfs-kernels"}, exclude=["input"]
    )
    torch.testing.assert_close(dead(batch()), model(batch()), rtol=0, atol=1e-3)
    _, approximated, _ = converted(nn.SiLU())
    with pytest.raises(NonFiniteError, match=r"1\.input"):
        approximated(torch.tensor([float("nan")]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("options", [{}, {"clip": "mse"}, {"percentile": 95.0}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_theorem_3_holds(options, rounding, scale):
    x = (torch.randn(40000, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) ** 3 + 0.4) * scale
    code = TTFS(steps=16, rounding=rounding, **options)
    p = code.fit(ActivationStats.of(x, ()))
    found = bound("x", code, p)
    error = float((code.fused(x, p) - x).abs().max())
    assert error <= found.total * (1 + 1e-6)
    assert error > 0.3 * found.total
    assert (found.clipping > found.quantization) == bool(options)
    # With as many steps as it says, and no clipping, the error is what was wanted.
    wide = TTFS(steps=bound("x", code, p, 0.05).needed, rounding=rounding)
    reached = (wide.fused(x, wide.fit(ActivationStats.of(x, ()))) - x).abs().max() / x.abs().max()
    assert reached <= 0.05 * (1 + 2e-3)


def test_explain_names_every_site():
    model = spikeplug.convert(net(nn.ReLU()), "ttfs", calibration=[batch()], steps=32)
    found = explain(model)
    assert [each.site for each in found] == ["0", "2"]
    assert found[1].low == 0
    with pytest.raises(OptionError, match="error=0"):
        explain(model, 0.0)
    with pytest.raises(ConversionError, match=r"no site is coded by first spikes \(rate is\)"):
        explain(spikeplug.convert(net(nn.ReLU()), "rate", calibration=[batch()]))
