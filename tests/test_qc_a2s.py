"""QC-A2S on language models: equal to the quantized model it came from, stepped equal to fused, explained."""

from __future__ import annotations

import copy

import pytest
import torch

import spikeplug
from spike_plugin_ttfs.explain import explain
from spikeplug.coding.site import Site, sites
from spikeplug.errors import OptionError

PASSES = {"pass_options": {"prefix": {"tokens": [5, 1]}}}


@pytest.fixture
def spiking(build, ids):
    return spikeplug.convert(build(), "qc-a2s", calibration=[ids], steps=64, **PASSES)


def quantize_like(model):
    """Eq. 10 written out in every site's place: the quantized model that the spiking one came from."""
    quantized = copy.deepcopy(model)
    for site in sites(quantized).values():

        def forward(x, new=None, receive=None, *, scale=site.scale, zero=site.zero, top=site.encoder.top):
            return scale * (torch.floor(x / scale + 0.5) + zero).clamp(0, top) - scale * zero

        site.forward = forward
    return quantized


def test_equals_the_quantized_model(spiking, build, ids):
    quantized = quantize_like(spiking)
    logits = spiking(ids).logits.detach()
    torch.testing.assert_close(logits, quantized(ids).logits.detach(), rtol=1e-6, atol=1e-6)
    dense = build()
    spikeplug.get_pass("prefix", tokens=(5, 1)).apply(dense)
    reference = dense(ids).logits.detach()
    assert 1e-3 < (logits - reference).abs().max() / reference.abs().max() < 0.2


def test_stepped_equals_fused(spiking, ids):
    torch.nn.Module.to(spiking, torch.float64)
    with torch.no_grad(), spikeplug.count_spikes(spiking) as fused:
        logits = spiking(ids[:, :6]).logits
    spikeplug.set_execution(spiking, "stepped")
    with torch.no_grad(), spikeplug.count_spikes(spiking) as stepped:
        torch.testing.assert_close(spiking(ids[:, :6]).logits, logits, rtol=1e-6, atol=1e-6)
    assert {name: each.spikes for name, each in fused.by_site.items()} == {
        name: each.spikes for name, each in stepped.by_site.items()
    }
    # At most one spike in a window.
    assert all(0 < each.spikes <= each.neurons for each in stepped.by_site.values())


def test_reload_generates_the_same(spiking, ids, tmp_path):
    spikeplug.save(spiking, tmp_path / "model")
    loaded = spikeplug.load(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, spiking(ids).logits)
    tokens = [model.generate(ids, max_new_tokens=4, do_sample=False) for model in (spiking, loaded)]
    assert torch.equal(*tokens)
    assert explain(loaded) == explain(spiking)


def test_theorem_3_bounds_every_site(build, ids):
    model = spikeplug.convert(build(), "qc-a2s", calibration=[ids], steps=16, **PASSES)
    found = {each.site: each for each in explain(model)}
    seen = spikeplug.observe(model, [ids])
    assert set(found) == set(seen) == {name for name, site in sites(model).items() if isinstance(site, Site)}
    for name, stats in seen.items():
        site = sites(model)[name]
        error = (site.encoder.fused(stats.values, site.params(stats.values)) - stats.values).abs().max()
        assert error <= found[name].total * (1 + 1e-5), name
        assert found[name].low == pytest.approx(float(stats.low.min()))


def test_report_says_how_long_a_token_takes(spiking, build, ids):
    # Six windows in each of two layers, the embedding's, and the output layer's.
    report = spikeplug.report(spiking)
    assert report.delay == 64 * (6 * 2 + 2)
    assert f"; {64 * 14} steps to the result" in str(report).splitlines()[0]
    model = spikeplug.convert(
        build(), "qc-a2s", calibration=[ids], steps=64, overrides={"probabilities": {"steps": 256}},
        approximators={"*": "ttfs-kernels"}, approximator_options={"ttfs-kernels": {"steps": 1000}}, **PASSES,
    )  # fmt: skip
    # A layer's norms pass 3 windows each, its softmax and its activation 2; the last norm 3.
    assert spikeplug.report(model).delay == 64 * 14 + 2 * (256 - 64) + 1000 * (2 * (3 + 3 + 2 + 2) + 3)


def test_nonlinear_operations_by_kernels(build, ids, tmp_path):
    dense = build()
    spikeplug.get_pass("prefix", tokens=(5, 1)).apply(dense)
    reference = dense(ids).logits.detach()
    model = spikeplug.convert(
        build(), "qc-a2s", calibration=[ids], steps=1024, approximators={"*": "ttfs-kernels"}, **PASSES
    )
    logits = model(ids).logits.detach()
    assert 1e-4 < (logits - reference).norm() / reference.norm() < 0.05
    roles = {op.type: op.role for op in spikeplug.report(model).ops}
    assert {roles[op] for op in ("rmsnorm", "silu", "softmax")} == {"approximated"}
    spikeplug.save(model, tmp_path / "model")
    assert torch.equal(spikeplug.load(tmp_path / "model")(ids).logits, logits)


def test_explain_on_the_command_line(cli, dense_folder, text, tmp_path):
    common = ["--calibrate", text, "--seqlen", 32]
    code, _, err = cli("convert", dense_folder, "--recipe", "qc-a2s", *common, "--out", tmp_path / "out")
    assert code == 0, err
    code, out, _ = cli("explain", tmp_path / "out")
    assert code == 0
    assert "clipping is the larger part at" in out
    assert out.count("self_attn.probabilities") == 2
    found = cli("explain", tmp_path / "out", "--error", 0.001, "--json")[1]
    assert found["error"] == 0.001
    assert all(each["total"] == each["clipping"] + each["quantization"] for each in found["sites"])
    assert all(each["needed"] in {512, 1024} for each in found["sites"])


def test_bad_input_is_one_clear_line(cli, dense_folder, text, tmp_path, build, ids):
    code, _, err = cli("convert", dense_folder, "--recipe", "qc-a2s", "-s", "steps=48", "--calibrate", text,
                       "--out", tmp_path / "out")  # fmt: skip
    assert code == 1
    assert "steps=48: a model of n bits has 2^n steps, choose 32 or 64" in err
    code, _, err = cli("explain", tmp_path / "nothing")
    assert code == 1
    assert "is no saved model" in err
    assert cli("convert", dense_folder, "--recipe", "bse", "--calibrate", text, "--seqlen", 32,
               "--out", tmp_path / "bse")[0] == 0  # fmt: skip
    code, _, err = cli("explain", tmp_path / "bse")
    assert code == 1
    assert "no site is coded by first spikes (bse is): convert with the recipe qc-a2s or ttfs" in err
    with pytest.raises(OptionError, match="steps=48"):
        spikeplug.convert(build(), "qc-a2s", calibration=[ids], steps=48, **PASSES)
