"""Conversion of tiny models of the family, through both doors."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

import spikeplug
import spikeplug_transformers
from spikeplug.coding.layers import SpikingLinear
from spikeplug.coding.site import in_mode, sites
from spikeplug.errors import BundleError, CalibrationError, ConversionError, NonFiniteError, OptionError
from spikeplug_transformers import SpikeConfig
from spikeplug_transformers.attention import Softmax, spiking_attention

LAYER_SITES = {
    "self_attn.q_proj", "self_attn.query", "self_attn.key", "self_attn.value", "self_attn.probabilities",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
}  # fmt: skip
FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def spiking(build, ids):
    return spikeplug.convert(build(), "bse", calibration=[ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_spiking_model_is_close_to_dense_and_stepped_equals_fused(build, ids, family):
    dense = build(family)(ids).logits
    model = spikeplug.convert(build(family), "bse", calibration=[ids])
    fused = model(ids).logits
    assert not torch.equal(fused, dense)
    assert (fused - dense).abs().max() < 5e-3 * dense.abs().max()
    stepped = spikeplug.set_execution(model, "stepped")(ids).logits
    assert (stepped - fused).abs().max() < 1e-3 * fused.abs().max()


def test_few_steps_are_clearly_worse(build, ids):
    dense = build()(ids).logits
    errors = [
        (spikeplug.convert(build(), "bse", calibration=[ids], steps=steps)(ids).logits - dense).abs().max()
        for steps in (4, 8, 12)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_sites_are_those_of_the_design(spiking):
    layers = {f"model.layers.{layer}.{site}" for layer in range(2) for site in LAYER_SITES}
    assert set(sites(spiking)) == {"model.embed_tokens", "lm_head", *layers}
    assert spiking.model.layers[0].self_attn.k_proj.source is spiking.model.layers[0].self_attn.q_proj.site


def test_report_names_every_operation(spiking):
    report = spikeplug.report(spiking)
    assert report.counts() == {"coded": 1, "spiking": 15, "decoded": 4, "dense": 16}
    products = 2 * 2 * 32 * 512
    linear = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 256
    assert report.share() == pytest.approx(linear / (linear + products))
    assert report.share("decoded") == pytest.approx(products / (linear + products))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_reloads_bit_equal_and_generates_the_same(build, ids, tmp_path, family):
    model = spikeplug.convert(build(family), "bse", calibration=[ids], granularity="channel")
    logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, logits)
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), tokens)
    assert spikeplug.report(loaded) == spikeplug.report(model)


def test_save_and_load_are_bit_equal(spiking, ids, tmp_path):
    spikeplug.save(spiking, tmp_path / "model")
    loaded = spikeplug.load(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, spiking(ids).logits)
    assert spikeplug.conversion_of(loaded) == spikeplug.conversion_of(spiking)


def test_tied_embeddings_stay_tied(build, ids, tmp_path):
    model = spikeplug.convert(build("llama-tied"), "bse", calibration=[ids])
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_second_door_equals_the_first(dense_folder, spiking, ids):
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=SpikeConfig("bse", steps=16))
    with pytest.raises(CalibrationError, match=r"site 'model\.embed_tokens' is not calibrated"):
        model(ids)
    with pytest.raises(CalibrationError, match="before saving"):
        model.save_pretrained(dense_folder.parent / "x")
    spikeplug.calibrate(model, [ids])
    assert torch.equal(model(ids).logits, spiking(ids).logits)


def test_token_scales_need_no_calibration_and_say_so(dense_folder, build, ids):
    config = SpikeConfig("bse", steps=12, granularity="token")
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)
    other = spikeplug.convert(build(), "bse", steps=12, granularity="token")
    assert torch.equal(model(ids).logits, other(ids).logits)
    torch.testing.assert_close(other(ids[:1]).logits, other(ids).logits[:1], rtol=1e-4, atol=1e-4)
    assert any("computed at run time" in note for note in spikeplug.report(other).summary()["notes"])


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("execution", ["fused", "stepped"])
def test_offload_to_disk_is_bit_equal(spiking, ids, tmp_path, execution, offload_buffers):
    spiking.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**device_map, "lm_head": "cpu", "model.rotary_emb": "cpu"},
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
    )
    spikeplug.set_execution(loaded, execution)
    spikeplug.set_execution(spiking, execution)
    assert torch.equal(loaded(ids).logits, spiking(ids).logits)


def test_dispatched_dense_model_is_refused(dense_folder, ids, tmp_path):
    parts = ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {"model.layers.0": "disk"} | dict.fromkeys(parts, "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ConversionError, match=r"dispatched by accelerate.*quantization_config=SpikeConfig"):
        spikeplug.convert(model, "bse", calibration=[ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reload_in_another_dtype_keeps_the_scales(spiking, ids, tmp_path, dtype):
    spiking.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    for name, site in sites(loaded).items():
        assert torch.equal(site.scale, sites(spiking)[name].scale), name
    logits = loaded(ids).logits
    assert logits.dtype == dtype
    assert (logits.float() - spiking(ids).logits).abs().max() < 0.1 * spiking(ids).logits.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_cache_gives_the_logits_of_the_whole_text(build, ids, family):
    model = spikeplug.convert(build(family), "bse", calibration=[ids])
    whole = model(ids).logits
    cache, parts = None, []
    for part in (ids[:, :10], ids[:, 10:11], ids[:, 11:]):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-3 * whole.abs().max()


@pytest.mark.parametrize("execution", ["fused", "stepped"])
def test_cached_keys_and_values_are_counted_once(spiking, ids, execution):
    spikeplug.set_execution(spiking, execution)
    with spikeplug.count_spikes(spiking) as whole:
        spiking(ids)
    with spikeplug.count_spikes(spiking) as parts:
        cache = spiking(ids[:, :10], use_cache=True).past_key_values
        spiking(ids[:, 10:], past_key_values=cache)
    for name in ("model.layers.0.self_attn.key", "model.layers.0.self_attn.value", "model.layers.0.self_attn.q_proj"):
        assert parts.by_site[name].neurons == whole.by_site[name].neurons
        assert parts.by_site[name].spikes == pytest.approx(whole.by_site[name].spikes, rel=1e-3)


def test_static_cache_and_token_scales_count_new_tokens_only(build, ids):
    model = spikeplug.convert(build(), "bse", steps=12, granularity="token")
    spikes = []
    for cache in ("dynamic", "static"):
        with spikeplug.count_spikes(model) as counts:
            model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache, pad_token_id=0)
        spikes.append(counts.by_site["model.layers.0.self_attn.key"])
    with spikeplug.count_spikes(model) as whole:
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with spikeplug.count_spikes(model) as whole:
        model(tokens[:, :-1])
    expected = whole.by_site["model.layers.0.self_attn.key"]
    for count in spikes:
        assert count.neurons == expected.neurons
        assert count.spikes == pytest.approx(expected.spikes, rel=1e-2)


def test_fused_and_stepped_count_the_same_spikes(spiking, ids):
    totals = []
    for execution in ("fused", "stepped"):
        spikeplug.set_execution(spiking, execution)
        with spikeplug.count_spikes(spiking) as counts:
            spiking(ids)
        totals.append(counts.by_site["model.embed_tokens"].spikes)
        assert counts.total > 0
    assert totals[0] == totals[1]


def test_padding_does_not_change_the_other_tokens(spiking, ids):
    padded = torch.cat([torch.zeros(2, 4, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(28) >= 4).long().expand(2, -1)
    got = spiking(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 4:]
    whole = spiking(ids).logits
    assert (got - whole).abs().max() < 1e-3 * whole.abs().max()


def test_attention_without_sites_equals_transformers_own(build):
    generator = torch.Generator().manual_seed(0)
    module = build().model.layers[0].self_attn
    module.softmax = Softmax()
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 9, 8, generator=generator).unbind(0)
    mask = torch.zeros(2, 1, 5, 9).masked_fill_(torch.rand(2, 1, 5, 9, generator=generator) < 0.3, -1e30)
    ours = spiking_attention(module, query, key, value, mask, scaling=0.3)
    theirs = eager_attention_forward(module, query, key, value, mask, scaling=0.3)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_other_attention_implementation_is_refused(spiking, ids):
    spiking.set_attn_implementation("sdpa")
    with pytest.raises(ConversionError, match=r"attention implementation is 'sdpa'.*'spikeplug'"):
        spiking(ids)


def test_softcap_is_refused(build):
    module = build().model.layers[0].self_attn
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ConversionError, match="softcap=30"):
        spiking_attention(module, x, x, x, None, scaling=1.0, softcap=30)


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (["head"], {"lm_head"}),
        (["embedding", "probabilities"], {"model.embed_tokens", "model.layers.0.self_attn.probabilities"}),
        (["*.down_proj"], {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        (["query", "key", "value", "probabilities"], {"model.layers.1.self_attn.query"}),
    ],
    ids=str,
)
def test_excluded_sites_stay_dense_after_reload_too(build, ids, tmp_path, exclude, gone):
    model = spikeplug.convert(build(), "bse", calibration=[ids], exclude=exclude)
    assert not gone & set(sites(model))
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert set(sites(loaded)) == set(sites(model))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_one_excluded_reader_leaves_the_group_working(build, ids):
    model = spikeplug.convert(build(), "bse", calibration=[ids], exclude=["*.q_proj"])
    attention = model.model.layers[0].self_attn
    assert not isinstance(attention.q_proj, SpikingLinear)
    assert attention.v_proj.source is attention.k_proj.site
    assert "model.layers.0.self_attn.k_proj" in sites(model)


def test_unknown_exclude_says_the_nearest(build, ids):
    with pytest.raises(OptionError, match=r"exclude='heads' matches nothing, did you mean 'head'"):
        spikeplug.convert(build(), "bse", calibration=[ids], exclude=["heads"])


def test_passes_at_the_second_door_are_refused(dense_folder):
    config = SpikeConfig("bse", passes=["rotate"])
    with pytest.raises(ConversionError, match="need the weights"):
        AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)


def test_calibration_batch_of_another_kind_is_refused(build, ids):
    with pytest.raises(CalibrationError, match=r"token ids \[B, S\].*got tuple"):
        spikeplug.convert(build(), "bse", calibration=[(ids,)])


def test_changed_config_is_found(spiking, tmp_path):
    spikeplug.save(spiking, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"recipe": "bse"', '"recipe": "bsf"'))
    with pytest.raises(BundleError, match=r"config\.json was changed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_execution_survives_save_pretrained(spiking, ids, tmp_path):
    spikeplug.set_execution(spiking, "stepped").save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, spiking(ids).logits)
    assert spikeplug.conversion_of(loaded).config.execution == "stepped"


def test_unknown_part_is_refused_by_name(build, ids):
    model = build()
    model.model.layers[1].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ConversionError, match=r"'model\.layers\.1\.mlp\.extra' \(Linear\) has no known role"):
        spikeplug.convert(model, "bse", calibration=[ids])


def test_nan_weight_is_named(build, ids):
    model = build()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        spikeplug.convert(model, "bse", calibration=[ids])


def test_changed_byte_is_found_through_either_door(spiking, tmp_path):
    folder = tmp_path / "model"
    spikeplug.save(spiking, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        spikeplug.load(folder)
    with pytest.raises(BundleError, match="was changed"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_converted_model_is_not_converted_again(spiking, ids):
    with pytest.raises(ConversionError, match="converted model already"):
        spikeplug.convert(spiking, "bse", calibration=[ids])


def test_gradient_reaches_every_weight(spiking, ids):
    spiking(ids, labels=ids).loss.backward()
    for name, parameter in spiking.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_lazy_name_of_the_package():
    assert spikeplug_transformers.SpikeConfig is SpikeConfig
    with pytest.raises(AttributeError, match="no attribute 'SpikeConfigs'"):
        _ = spikeplug_transformers.SpikeConfigs


@pytest.mark.parametrize("recipe", ["bse", "laser", "mgpc", "qc-a2s"])
def test_the_plan_is_what_becomes_of_the_model(build, ids, recipe):
    model = build()
    with torch.no_grad():
        before = model(ids).logits
    options = {"pass_options": {"prefix": {"tokens": [5, 1]}}} if recipe == "qc-a2s" else {}
    plan = spikeplug.plan(model, recipe, **options)
    assert plan.problems == ()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not hasattr(model, "conversion")
    converted = spikeplug.convert(model, recipe, calibration=[ids], **options)
    assert spikeplug.report(converted) == plan.report
    assert json.loads(json.dumps(plan.summary()))["problems"] == []
    if not spikeplug.conversion_of(converted).config.passes:
        assert spikeplug.report(plan.apply()) == plan.report


def test_the_plan_has_all_problems_at_once(build, ids):
    model = build()
    model.model.layers[0].mlp.extra = torch.nn.Linear(4, 4)
    model.model.layers[1].self_attn.adapter = torch.nn.Conv1d(4, 4, 1)
    plan = spikeplug.plan(model, "bse")
    assert {each.operation for each in plan.problems} == {
        "model.layers.0.mlp.extra", "model.layers.1.self_attn.adapter",
    }  # fmt: skip
    assert {op.name for op in plan.report.ops if op.role == "spiking"} >= {"lm_head"}
    for refused in (plan.apply, lambda: spikeplug.convert(model, "bse", calibration=[ids])):
        with pytest.raises(ConversionError, match=r"(?s)mlp\.extra.*self_attn\.adapter"):
            refused()


@pytest.mark.parametrize("name", ["rotate", "prefix", "defer-softmax"])
def test_a_model_that_a_pass_rewrote_already_is_refused(build, ids, name):
    model = build()
    spikeplug.get_pass(name, **({"tokens": (5, 1)} if name == "prefix" else {})).apply(model)
    with pytest.raises(ConversionError, match=rf"was rewritten by the pass '{name}' already.*passes=\['{name}'\]"):
        spikeplug.convert(model, "bse", calibration=[ids])
    assert [each.remedy for each in spikeplug.plan(model, "bse").problems]


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["laser", "qc-a2s"])
def test_in_the_mode_dense_it_is_the_dense_model(build, ids, recipe):
    model = build()
    options = {"passes": []} if recipe == "qc-a2s" else {}
    converted = spikeplug.convert(model, recipe, calibration=[ids], **options)
    before, coded = model(ids).logits, converted(ids).logits
    with in_mode(converted, "dense"), spikeplug.count_spikes(converted) as counts:
        found = converted(ids).logits
    assert counts.total == 0
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(converted(ids).logits, coded)
    assert not torch.allclose(coded, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
