"""The trainer `ste`: gradients, a falling loss, resuming after a kill, and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import spikeplug
from spike_plugin_bse.ste import STE
from spikeplug.conversion import bundle
from spikeplug.errors import BundleError, NonFiniteError, OptionError


def network(steps=16, recipe="bse"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3)).eval()
    x, _ = data(1)[0]
    return spikeplug.convert(net, recipe, calibration=[x * 1.5], steps=steps)


def data(count=8):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        x = torch.randn(32, 8, generator=generator)
        batches.append((x, x[:, :3].argmax(1)))
    return batches


def test_gradient_of_a_bse_layer_is_the_dense_layers():
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    spiking = spikeplug.convert(
        nn.Sequential(nn.Linear(64, 32)), "bse", calibration=[torch.randn(256, 64)], headroom=0.5
    )
    spiking.get_submodule("0").load_state_dict(dense.state_dict(), strict=False)
    x = torch.randn(128, 64)
    gradients = []
    for module, given in ((dense, x.clone().requires_grad_()), (spiking, x.clone().requires_grad_())):
        module(given).square().sum().backward()
        layer = module if module is dense else module.get_submodule("0")
        gradients.append((given.grad, layer.weight.grad, layer.bias.grad))
    for exact, found in zip(*gradients, strict=True):
        assert (found - exact).abs().max() < 2e-4 * exact.abs().max()
        assert not torch.equal(found, exact)


@pytest.mark.parametrize("recipe", ["bse", "laser"])
@pytest.mark.parametrize("execution", ["fused", "stepped"])
def test_loss_falls(recipe, execution):
    net = spikeplug.set_execution(network(steps=4, recipe=recipe), execution)
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    losses = STE(steps=60, lr=1e-2).train(net, data())
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert all(not torch.equal(weight, before[name]) for name, weight in net.named_parameters())
    assert all(weight.grad is None for weight in net.parameters())


def test_bfloat16_trains_too():
    losses = STE(steps=40, lr=1e-2, dtype="bfloat16").train(network(steps=8), data())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_accumulated_batches_are_one_large_one():
    batches = data(4)
    whole = [tuple(torch.cat([batch[part] for batch in batches]) for part in (0, 1))]
    nets = network(), network()
    first = STE(steps=1, accumulate=4).train(nets[0], batches)
    second = STE(steps=1).train(nets[1], whole)
    assert first == pytest.approx(second, rel=1e-5)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_learning_rate_rises_and_falls():
    trainer = STE(steps=100, lr=1.0, warmup=0.1, final=0.2)
    rates = [trainer.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.2, abs=1e-2)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    trainer, folder = STE(steps=30, every=10, lr=1e-2), tmp_path / "state"
    through = network()
    losses = trainer.train(through, data())

    def kill(stage, done, of):
        if done == 25:
            raise KilledError

    with pytest.raises(KilledError):
        trainer.train(network(), data(), checkpoint=folder, watch=kill)
    seen = []
    resumed = network()
    again = trainer.train(resumed, data(), checkpoint=folder, watch=lambda stage, done, of: seen.append(done))
    assert seen == list(range(20, 30))
    assert again == losses
    for one, other in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trainer.train(network(), data(), checkpoint=folder) == losses


def test_checkpoint_of_something_else_is_refused(tmp_path):
    trainer, folder = STE(steps=4, every=2), tmp_path / "state"
    trainer.train(network(), data(), checkpoint=folder)
    with pytest.raises(BundleError, match=r"another conversion, recipe 'bse' \(differs: encoder_options\)"):
        trainer.train(network(steps=8), data(), checkpoint=folder)
    with pytest.raises(BundleError, match="another conversion, recipe 'bse'"):
        trainer.train(network(recipe="laser"), data(), checkpoint=folder)
    with pytest.raises(OptionError, match=r"was made with lr=0\.0001: use these"):
        STE(steps=4, every=2, lr=1e-3).train(network(), data(), checkpoint=folder)
    with pytest.raises(OptionError, match="was made with batches=8"):
        trainer.train(network(), data(2), checkpoint=folder)
    (folder / "state.safetensors").write_bytes(b"no")
    with pytest.raises(BundleError, match="changed or damaged"):
        trainer.train(network(), data(), checkpoint=folder)


def test_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    trainer, folder = STE(steps=20, every=10), tmp_path / "state"
    replace, written = bundle._replace, []

    def full(draft, target):
        written.append(target)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        replace(draft, target)

    monkeypatch.setattr(bundle, "_replace", full)
    with pytest.raises(BundleError, match=r"cannot write the checkpoint .* No space left"):
        trainer.train(network(), data(), checkpoint=folder)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state"]
    assert len(trainer.train(network(), data(), checkpoint=folder)) == 20


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"clip": -1.0}, {"warmup": 2.0}, {"dtype": "float16"}],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        spikeplug.get_trainer("ste", **options)


def test_bad_batches_are_refused():
    with pytest.raises(OptionError, match="no batch"):
        STE().train(network(), [])
    with pytest.raises(OptionError, match=r"a training batch is \(inputs, targets\); got Tensor"):
        STE().train(network(), [torch.zeros(2, 8)])


def test_loss_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError):
        STE(steps=50, lr=1e30, clip=0.0).train(network(), data())
