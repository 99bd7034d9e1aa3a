"""The recipe `laser` on language models: every nonlinear operation in spikes, subsystems, reload, training."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikeplug
from spikeplug.coding.site import sites
from spikeplug.errors import OptionError
from spikeplug_transformers import SpikeConfig

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def spiking(build, ids):
    return spikeplug.convert(build(), "laser", calibration=[ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_dense_and_stepped_equals_fused(build, ids, family):
    dense = build(family)(ids).logits
    model = spikeplug.convert(build(family), "laser", calibration=[ids])
    fused = model(ids).logits
    assert not torch.equal(fused, dense)
    assert (fused - dense).abs().max() < 2e-2 * dense.abs().max()
    stepped = spikeplug.set_execution(model, "stepped")(ids).logits
    assert (stepped - fused).abs().max() < 5e-3 * fused.abs().max()


def test_only_the_rotation_products_and_additions_stay_dense(spiking):
    report = spikeplug.report(spiking)
    assert {op.name.rpartition(".")[2] for op in report.ops if op.role == "dense"} == {
        "rotary_emb", "rotary", "gate·up", "residual"
    }  # fmt: skip
    approximated = {op.type for op in report.ops if op.role == "approximated"}
    assert approximated == {"rmsnorm", "silu", "softmax"}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_reload_is_bit_equal_and_generates_the_same(build, ids, tmp_path, family):
    model = spikeplug.convert(build(family), "laser", calibration=[ids])
    logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    spikeplug.save(model, tmp_path / "model")
    for loaded in (spikeplug.load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert torch.equal(loaded(ids).logits, logits)
        assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), tokens)
        assert spikeplug.report(loaded) == spikeplug.report(model)


@pytest.mark.parametrize("recipe", ["bse", "laser", "mgpc"])
def test_reload_in_a_process_of_its_own_is_bit_equal(build, ids, tmp_path, recipe):
    model = spikeplug.convert(build(), recipe, calibration=[ids])
    spikeplug.save(model, tmp_path / "model")
    torch.save((ids, model(ids).logits), tmp_path / "logits.pt")
    code = f"""
import spikeplug, torch
ids, logits = torch.load({str(tmp_path / "logits.pt")!r})
assert torch.equal(spikeplug.load({str(tmp_path / "model")!r})(ids).logits, logits)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_second_door_equals_the_first(dense_folder, spiking, ids):
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=SpikeConfig("laser"))
    spikeplug.calibrate(model, [ids])
    assert torch.equal(model(ids).logits, spiking(ids).logits)


@pytest.mark.parametrize(
    ("include", "kept", "gone"),
    [
        (["ffn"], "mlp.gate_proj", "self_attn.q_proj"),
        (["activation"], "mlp.act_fn.codec", "mlp.gate_proj"),
        (["attention"], "self_attn.softmax.exp.codec", "mlp.act_fn.codec"),
        (["norm"], "input_layernorm.rsqrt.codec", "self_attn.softmax.exp.codec"),
        (["query", "key"], "self_attn.key", "self_attn.value"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_subsystem_at_a_time(build, ids, include, kept, gone):
    model = spikeplug.convert(build(), "laser", calibration=[ids], include=include)
    found = set(sites(model))
    assert f"model.layers.0.{kept}" in found
    assert f"model.layers.0.{gone}" not in found
    assert "lm_head" not in found
    dense, fused = build()(ids).logits, model(ids).logits
    assert not torch.equal(fused, dense)
    assert (fused - dense).abs().max() < 1e-2 * dense.abs().max()


def test_embedding_is_a_subsystem_of_two_sites(build, ids):
    model = spikeplug.convert(build(), "laser", calibration=[ids], include=["embedding"])
    assert set(sites(model)) == {"model.embed_tokens", "lm_head"}


def test_unknown_subsystem_says_the_nearest(build, ids):
    with pytest.raises(OptionError, match="include='norms' matches nothing, did you mean 'norm'"):
        spikeplug.convert(build(), "laser", calibration=[ids], include=["norms"])


def test_bfloat16_model_keeps_its_dtype(build, ids):
    model = spikeplug.convert(build().to(torch.bfloat16), "laser", calibration=[ids])
    assert model(ids).logits.dtype == torch.bfloat16


def test_gradient_reaches_every_weight(spiking, ids):
    spiking(ids).logits.square().mean().backward()
    assert all(bool(weight.grad.abs().sum() > 0) for weight in spiking.parameters())


@pytest.mark.parametrize("recipe", ["bse", "laser"])
def test_training_lowers_the_loss(build, ids, recipe):
    model = spikeplug.convert(build(), recipe, calibration=[ids], steps=4)
    losses = spikeplug.get_trainer("ste", steps=12, lr=3e-3).train(model, [ids])
    assert losses[-1] < losses[0] - 0.1


def test_train_command_goes_on_after_a_kill(cli, dense_folder, text, tmp_path, monkeypatch):
    def run(command, *more):
        return cli(command, *more, "--json")

    assert run("convert", dense_folder, "--recipe", "bse", "-s", "steps=6", "--calibrate", text, "--out",
               tmp_path / "spiking", "--seqlen", 32)[0] == 0  # fmt: skip
    arguments = [tmp_path / "spiking", "--text", text, "--out", tmp_path / "trained", "--seqlen", 32, "-s", "steps=8",
                 "-s", "every=4", "-s", "lr=0.003"]  # fmt: skip
    step = spikeplug.get_trainer("ste").__class__._step
    done = []

    def interrupted(self, *given):
        done.append(1)
        if len(done) == 6:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr("spike_plugin_bse.ste.STE._step", interrupted)
    assert run("train", *arguments)[0] == 130
    assert not (tmp_path / "trained").exists()
    assert (tmp_path / "trained.checkpoint").is_dir()
    code, result, err = run("train", *arguments)
    assert code == 0, err
    assert len(done) == 6 + 4
    assert len(result["losses"]) == 8
    assert result["losses"][-1] < result["losses"][0]
    assert not (tmp_path / "trained.checkpoint").exists()
    before, after = (
        run("eval", tmp_path / folder, "--ppl", text, "--seqlen", 32)[1]["perplexity"]
        for folder in ("spiking", "trained")
    )
    assert after < before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer", "sta"], "unknown trainer 'sta', did you mean 'ste'"),
        (["-s", "step=3"], "unknown option 'step' of trainer 'ste', did you mean 'steps'"),
        (["-s", "steps=0"], "steps=0: at least 1"),
        (["--batch", "0"], "--batch 0"),
        (["--text", "no.txt"], "cannot read the text no.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_of_train_are_one_line(cli, dense_folder, text, tmp_path, more, message):
    code, _, err = cli("train", dense_folder, "--text", text, "--out", tmp_path / "trained", "--seqlen", 32, *more)
    assert code == 1
    assert message in err
    assert not (tmp_path / "trained").exists()


def test_training_a_dense_model_says_what_to_do(cli, dense_folder, text, tmp_path):
    code, _, err = cli("train", dense_folder, "--text", text, "--out", tmp_path / "trained", "--seqlen", 32)
    assert code == 1
    assert "is no converted model: convert it" in err
