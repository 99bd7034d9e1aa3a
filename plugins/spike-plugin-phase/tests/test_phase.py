"""Phase codes: hand-computed spikes, the equations step by step, learning, the conformance kit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spikeplug
from spike_plugin_phase.encoder import Phase, fire
from spike_plugin_phase.neuron import PhaseIF
from spike_plugin_phase.trainer import _Neurons, candidates, even, learn, search
from spikeplug import ActivationStats
from spikeplug.coding.site import sites
from spikeplug.coding.types import CodeParams
from spikeplug.errors import CalibrationError, OptionError
from spikeplug.testing import EncoderConformance, NeuronConformance
from spikeplug.testing.encoder import activations

HEAVY = torch.randn(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
"""Most values small, some large: what a learned code can serve better than an even one."""


class TestPhaseConformance(EncoderConformance):
    @pytest.fixture(
        params=[
            Phase(steps=1),
            Phase(steps=4, rounding="floor"),
            Phase(steps=8),
            Phase(steps=16),
            Phase(steps=8, clip="mse"),
        ],
        ids=lambda code: f"T{code.steps}-{code.rounding}-{code.clip}",
    )
    def encoder(self, request):
        return request.param

    @pytest.fixture
    def neuron(self, encoder):
        return PhaseIF(spikes=encoder.spikes)


NOT_IDEMPOTENT = "its levels are not where its thresholds are, so a level may be coded as another"


class TestLearnedConformance(EncoderConformance):
    waived = {  # noqa: RUF012
        "test_grid_points_are_kept": NOT_IDEMPOTENT,
        "test_ties_go_to_a_neighbour": NOT_IDEMPOTENT,
        "test_single_number": "from one value nothing can be learned, which is an error",
        "test_all_zero_stays_zero": "from one value nothing can be learned, which is an error",
    }

    @pytest.fixture(
        params=[Phase(steps=6, grains=2, rounds=3, samples=500), Phase(steps=5, grains=5, rounds=2)], ids=str
    )
    def encoder(self, request):
        return request.param

    @pytest.fixture
    def neuron(self, encoder):
        return PhaseIF()


class TestFewSpikesConformance(EncoderConformance):
    @pytest.fixture(params=[{"spikes": 1}, {"spikes": 2}, {"mask": 3}], ids=str)
    def encoder(self, request):
        return Phase(steps=8, rounding="floor", **request.param)

    @pytest.fixture
    def neuron(self, encoder):
        return PhaseIF(spikes=encoder.spikes, mask=encoder.mask)


class TestPhaseIFConformance(NeuronConformance):
    @pytest.fixture(params=[0, 1, 2])
    def neuron(self, request):
        return PhaseIF(spikes=request.param)

    @pytest.fixture
    def currents(self):
        xs = torch.zeros(12, 9, dtype=torch.float64)
        xs[0] = torch.arange(-4, 5) * 9000
        return xs


def unit(code, scale=1.0):
    return code.params_of(torch.tensor(scale), *code.start())


def test_las_by_hand():
    code = Phase(steps=3, rounding="floor")
    x = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0, -0.7])
    # Binary digits behind the point, cut: 0, .001, .1, .110, .111 (1 is more than all of them), -.101
    expected = [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [-1, 0, -1]]
    assert code.encode(x, unit(code)).T.tolist() == expected
    assert code.fused(x, unit(code)).tolist() == [0.0, 0.125, 0.5, 0.75, 0.875, -0.625]
    assert code.count(x, unit(code)).tolist() == [0, 1, 1, 2, 3, 2]


def test_rounding_by_hand():
    code = Phase(steps=3)
    x = torch.tensor([0.05, 0.07, 0.2, 0.8, -0.7])
    assert code.fused(x, unit(code)).tolist() == [0.0, 0.125, 0.25, 0.75, -0.75]


@pytest.mark.parametrize(("spikes", "expected"), [(1, [0.5, 0.5, 0.25]), (2, [0.75, 0.625, 0.375])])
def test_few_spikes_by_hand(spikes, expected):
    code = Phase(steps=3, rounding="floor", spikes=spikes)
    x = torch.tensor([0.9, 0.7, 0.4])
    assert code.fused(x, unit(code)).tolist() == expected


def test_mask_drops_late_spikes_of_early_neurons():
    code = Phase(steps=4, rounding="floor", mask=2)
    x = torch.tensor([0.6875, 0.4375, 0.0625])  # .1011, .0111, .0001
    assert code.encode(x, unit(code)).T.tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert error(Phase(steps=8)) < error(Phase(steps=8, mask=6)) < error(Phase(steps=8, mask=4))
    p = Phase(steps=8).fit(ActivationStats.of(HEAVY, ()))
    assert Phase(steps=8, mask=4).count(HEAVY, p).sum() < 0.95 * Phase(steps=8).count(HEAVY, p).sum()


def test_decoupled_thresholds_and_resets_by_hand():
    # θ = (0.4, 0.3), h = (0.1, 0.2), d = (0.7, 0.05): 0.5 fires, keeps 0.4, fires again.
    code = Phase(steps=2)
    p = code.params_of(torch.tensor(1.0), *(torch.tensor(each) for each in ([0.4, 0.3], [0.1, 0.2], [0.7, 0.05])))
    x = torch.tensor([0.5, 0.35, 0.2])
    assert code.encode(x, p).T.tolist() == [[1, 1], [0, 1], [0, 0]]
    torch.testing.assert_close(code.fused(x, p), torch.tensor([0.75, 0.05, 0.0]))


def reference(x, threshold, reset, weight):
    """Eq. 1, 2 and 8 for one number, as plainly as can be."""
    v, y = abs(x), 0.0
    for theta, h, d in zip(threshold, reset, weight, strict=True):
        s = 1 if v >= theta else 0
        v = v - h * s
        y = y + d * s
    return y if x >= 0 else -y


@pytest.mark.parametrize("code", [Phase(steps=5), Phase(steps=6, grains=2, rounds=2, samples=400)], ids=str)
def test_code_equals_the_equations(code):
    p = code.fit(ActivationStats.of(HEAVY[:2000], ()))
    cell = 2.0**-code.fraction
    threshold, reset = (p.extra[name].double() * cell for name in ("threshold", "reset"))
    weight, scale = p.extra["weight"].double(), float(p.scale)
    # Potentials are whole multiples of the cell, so the equations are given such ones.
    v = torch.randint(-(2**code.fraction), 2**code.fraction, (500,), generator=torch.Generator().manual_seed(0)) * cell
    expected = [scale * reference(float(x), threshold.tolist(), reset.tolist(), weight.tolist()) for x in v]
    found = code.fused((v.double() + cell / 4 * v.sign()) * scale, p)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_spikes_of_every_code_are_those_of_the_neuron():
    code = Phase(steps=7, grains=3, rounds=2, samples=300)
    p = code.fit(ActivationStats.of(HEAVY[:2000], ()))
    v = torch.arange(2**code.fraction + 1, dtype=torch.int32)
    planes = torch.stack(list(fire(v, p.extra["threshold"], p.extra["reset"])))
    impulse = torch.stack([v.double(), *[torch.zeros(v.numel(), dtype=torch.float64)] * 6])
    assert torch.equal(PhaseIF().bind(p).window(impulse).to(torch.int8), planes)


def error(code, x=HEAVY):
    p = code.fit(ActivationStats.of(x, ()))
    return float((code.fused(x, p) - x).square().mean())


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_learned_is_at_most_rounding_is_at_most_floor(steps):
    las, rounding = error(Phase(steps=steps, rounding="floor")), error(Phase(steps=steps))
    assert rounding < las
    for grains in (1, 2, 3, steps):
        assert error(Phase(steps=steps, grains=grains, rounds=6)) <= rounding
    assert steps > 6 or error(Phase(steps=steps, grains=2)) < 0.9 * rounding


def test_searched_clipping_lowers_the_error():
    assert error(Phase(steps=6, clip="mse")) < 0.9 * error(Phase(steps=6))


def test_learning_is_deterministic():
    code = Phase(steps=6, grains=2, rounds=3)
    many = [HEAVY[start : start + 2000].abs() / HEAVY.abs().max() for start in range(0, 20000, 2000)]
    for one, other in zip(learn(code, many), learn(code, many), strict=True):
        assert torch.equal(one.threshold, other.threshold)
        assert torch.equal(one.weight, other.weight)


def test_best_iterate_is_kept():
    code = Phase(steps=6, grains=2, lr_neuron=5.0, lr_bases=5.0)
    learned = learn(code, [HEAVY.abs() / HEAVY.abs().max()])[0]
    assert learned.losses[-1] > learned.losses[0]  # such steps lead away
    x = (HEAVY.abs() / HEAVY.abs().max())[:10000].float()
    v, y = x.clone(), torch.zeros_like(x)
    for threshold, reset, weight in zip(*(each.float() for each in learned[:3]), strict=True):
        s = (v >= threshold).float()
        v, y = v - reset * s, y + weight * s
    assert float((y - x).square().mean()) * 4**6 <= float(learned.losses.min()) * 1.001
    assert learned.course.shape == (code.rounds + 1, 2)


def test_gradient_of_the_bases_is_the_true_one():
    code = Phase(steps=4, grains=2)
    neurons = _Neurons(code, (HEAVY[:1000].abs() / HEAVY.abs().max()).float()[None], (0, 0, 1, 1))
    _, _, spikes, _ = neurons._forward()
    bases = torch.tensor([[2.1, 1.9]], requires_grad=True)
    y = sum(bases[:, [0, 0, 1, 1][t]] ** -(t + 1.0) * spikes[t] for t in range(4))
    ((y - neurons.x).square().mean() / neurons.unit**2).backward()
    neurons.bases.values[0].copy_(bases.detach())
    seen = []
    neurons.bases.step = lambda gradients: seen.append(gradients[0])
    losses = neurons._bases_steps(1)
    torch.testing.assert_close(seen[0], bases.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        losses[0], ((y - neurons.x).square().mean() / neurons.unit**2).detach()[None], rtol=1e-3, atol=0
    )


def test_allocations():
    assert even(8, 3) == (0, 0, 0, 1, 1, 1, 2, 2)
    assert even(5, 5) == (0, 1, 2, 3, 4)
    assert candidates(4, 2) == [(0, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 1)]
    assert len(candidates(8, 3)) == 21
    x = (HEAVY[:4000].abs() / HEAVY.abs().max()).float().reshape(2, 2000)
    assert all(found in candidates(5, 2) for found in search(Phase(steps=5, grains=2), x))
    assert error(Phase(steps=5, grains=2, allocation="search")) <= error(Phase(steps=5))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"steps": 17}, {"grains": 9}, {"grains": -1}, {"rounding": "up"}, {"spikes": 3},
        {"spikes": 1, "grains": 2}, {"rounds": 0}, {"mask": 9}, {"lr_neuron": 0.0}, {"clip": "max"},
        {"allocation": "odd"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Phase(**options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


BATCH = torch.randn(256, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("recipe", ["las", "base2-round", "phase", "mgpc", "single-spike", "two-spike"])
def test_recipes_convert_save_load_and_step(recipe, tmp_path):
    dense = network()(BATCH)
    net = spikeplug.convert(network(), recipe, calibration=[BATCH], steps=10)
    fused = net(BATCH)
    assert not torch.equal(fused, dense)
    assert (fused - dense).abs().max() < (0.01 if recipe not in ("single-spike", "two-spike") else 0.7)
    # The last bit of a sum now and then moves a code of the second layer by one.
    stepped = spikeplug.set_execution(net, "stepped")(BATCH)
    assert ((stepped - fused).abs() > 1e-5).float().mean() < 0.02
    assert (stepped - fused).abs().max() < 2e-3
    spikeplug.set_execution(net, "fused")
    spikeplug.save(net, tmp_path / "net")
    assert torch.equal(spikeplug.load(tmp_path / "net")(BATCH), fused)


@torch.no_grad()
def test_a_dead_site_codes_zero():
    net = network()
    nn.init.constant_(net[0].bias, -1e3)
    spiking = spikeplug.convert(net, "mgpc", calibration=[BATCH])
    with spikeplug.count_spikes(spiking) as counts:
        assert torch.equal(spiking(BATCH), net(BATCH))
    assert counts.by_site["2"].spikes == 0 < counts.by_site["0"].spikes


def test_overrides_give_a_site_its_own_steps():
    net = spikeplug.convert(network(), "base2-round", calibration=[BATCH], steps=4, overrides={"2": {"steps": 9}})
    assert {name: site.encoder.steps for name, site in sites(net).items()} == {"0": 4, "2": 9}
    with pytest.raises(OptionError, match="overrides='3' matches nothing"):
        spikeplug.convert(network(), "base2-round", calibration=[BATCH], overrides={"3": {"steps": 9}})
    with pytest.raises(OptionError, match="unknown option 'step' of encoder 'phase'"):
        spikeplug.convert(network(), "base2-round", calibration=[BATCH], overrides={"2": {"step": 9}})


def test_trainer_learns_what_rounding_started():
    net = spikeplug.convert(network(), "base2-round", calibration=[BATCH], steps=4)
    before = {name: site.params(BATCH).extra["weight"].clone() for name, site in sites(net).items()}
    losses = spikeplug.get_trainer("mgpc", grains=2, rounds=4, samples=2000).train(net, [BATCH])
    assert len(losses) == 4 * 10
    assert min(losses) < losses[0]
    after = {name: site.params(BATCH).extra["weight"] for name, site in sites(net).items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert spikeplug.conversion_of(net).config.encoder_options["grains"] == 2
    bse = spikeplug.convert(network(), "rate", calibration=[BATCH])
    with pytest.raises(OptionError, match="coded by 'rate': the trainer mgpc learns 'phase'"):
        spikeplug.get_trainer("mgpc").train(bse, [BATCH])


def test_site_params_are_tensors_only():
    p = Phase().fit(ActivationStats.of(activations()))
    assert isinstance(p, CodeParams)
    assert all(isinstance(tensor, torch.Tensor) for tensor in p.tensors().values())


@pytest.mark.parametrize("recipe", ["base2-round", "mgpc"])
def test_error_of_a_later_site_names_that_site(recipe):
    net = network()
    with torch.no_grad():
        net[0].weight.mul_(1e-40)
        net[0].bias.zero_()
    with pytest.raises(CalibrationError, match="site '2': "):
        spikeplug.convert(net, recipe, calibration=[BATCH])


def test_bad_options_of_the_trainer_are_refused():
    with pytest.raises(OptionError, match="rounds=0"):
        spikeplug.get_trainer("mgpc", rounds=0)
    with pytest.raises(OptionError, match="allocation='odd': choose one of even, search"):
        spikeplug.get_trainer("mgpc", allocation="odd")


def test_bases_of_ones_own_by_hand():
    code = Phase(steps=3, bases=(4.0,), rounding="floor")
    p = code.fit(ActivationStats.of(torch.tensor([0.0, 1.0]), ()))
    # All spikes are worth 1/4 + 1/16 + 1/64, and one more of the last makes 22/64: the scale lets 1 be that much.
    assert float(p.scale) == pytest.approx(64 / 22)
    x = torch.tensor([17.0, 21.0, 4.5, 0.9]) / 22
    assert code.encode(x, p).T.tolist() == [[1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert (code.fused(x, p) * 22).tolist() == pytest.approx([17, 21, 4, 0], abs=1e-4)
    mixed = Phase(steps=4, bases=(2.0, 1.5))
    assert mixed.start()[2].tolist() == pytest.approx([1 / 2, 1 / 4, 1.5**-3, 1.5**-4])


def test_learning_from_bases_is_never_worse_than_rounding():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) ** 3
    stats = ActivationStats.of(x, ())

    def error(code):
        return float((code.fused(x, code.fit(stats)) - x).square().mean())

    learned = error(Phase(steps=6, grains=2, bases=(3.0, 1.3), rounds=2, samples=4000))
    assert learned <= error(Phase(steps=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bases": (1.0,)}, r"bases=\[1\.0\]: 1 is no base: a number above 1"),
        ({"bases": (2.0, 0.5)}, r"0\.5 is no base"),
        ({"bases": (float("nan"),)}, "nan is no base"),
        ({"steps": 1, "bases": (2.0, 3.0)}, "at most one for each of steps=1"),
        ({"grains": 3, "bases": (2.0,)}, "learning of grains=3 starts from as many bases"),
        ({"steps": 16, "bases": (4.0,)}, r"worth less than 2\^-22"),
        ({"grains": 9}, r"grains=9: a whole number from 0 to steps=8"),
    ],
    ids=str,
)
def test_bad_bases_and_grains_say_so(options, message):
    with pytest.raises(OptionError, match=message):
        Phase(**options)


def test_learning_does_not_depend_on_the_default_dtype():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = spikeplug.convert(net, "phase", calibration=[x])(x)
    torch.set_default_dtype(torch.float64)
    try:
        found = spikeplug.convert(net, "phase", calibration=[x])(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)
