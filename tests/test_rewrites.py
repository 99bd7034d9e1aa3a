"""The passes `rotate` and `prefix`: the function stays, outliers go, everything survives a reload."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikeplug
from spikeplug.coding.site import sites
from spikeplug.errors import CalibrationError, ConversionError, OptionError
from spikeplug_transformers.rotate import OnlineRotation, orthogonal

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("size", [1, 2, 12, 48, 64, 144, 576])
def test_orthogonal_matrices_are_orthogonal(size):
    matrix = orthogonal(size, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(OnlineRotation(size, 0)(x), x @ matrix)
    assert size == 1 or not torch.equal(matrix, orthogonal(size, 1)) or size & (size - 1) == 0


def test_hadamard_of_four_by_hand():
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    torch.testing.assert_close(orthogonal(4, 0) * 2, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"random": False, "online": False}, {"heads": False, "seed": 3}], ids=str)
def test_rotation_keeps_the_logits(build, ids, family, options):
    model = build(family)
    before = model(ids).logits
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    spikeplug.get_pass("rotate", **options).apply(model)
    after = model(ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert (model.model.layers[0].mlp.down_proj.weight - weight).abs().max() > 0.01
    assert all(bool((norm.weight == 1).all()) for name, norm in model.named_modules() if name.endswith("layernorm"))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, after)
    if options.get("online", True):  # within weights alone, two rotations are one
        with pytest.raises(ConversionError, match="rotated already"):
            spikeplug.get_pass("rotate").apply(model)


def test_rotation_spreads_an_outlier(build, ids):
    def largest(model):
        seen = []
        hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, given, out: seen.append(given[0]))
        with torch.no_grad():
            model(ids)
        hook.remove()
        return float(seen[0].abs().max() / seen[0].square().mean().sqrt())

    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] *= 100
    before = largest(model)
    spikeplug.get_pass("rotate").apply(model)
    assert largest(model) < 0.7 * before


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_equals_the_tokens_ahead_of_the_text(build, ids, family):
    model = build(family)
    tokens = (7, 1)
    ahead = torch.tensor([tokens]).expand(len(ids), -1)
    expected = model(torch.cat([ahead, ids], 1)).logits[:, 2:].detach()
    if family == "mistral":
        pytest.skip("a sliding window drops the first tokens of a text, but never the prefix")
    spikeplug.get_pass("prefix", tokens=tokens).apply(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ConversionError, match="a prefix already"):
        spikeplug.get_pass("prefix", tokens=tokens).apply(model)


def test_prefix_works_with_a_cache(build, ids):
    model = build()
    plain = model.generate(torch.cat([torch.tensor([[9], [9]]), ids], 1), max_new_tokens=6, do_sample=False)[:, 1:]
    spikeplug.get_pass("prefix", tokens=(9,)).apply(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)
    whole = model(ids).logits
    first = model(ids[:, :10], use_cache=True)
    rest = model(ids[:, 10:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 10:], rtol=1e-4, atol=1e-4)


def test_outlier_tokens_are_found(build, ids):
    model = build()
    with torch.no_grad():
        # Token 17 makes one feature of the second layer's down_proj huge.
        model.model.embed_tokens.weight[17] = 0
        model.model.embed_tokens.weight[17, 0] = 300
        model.model.layers[1].mlp.up_proj.weight[3] = 0
        model.model.layers[1].mlp.up_proj.weight[3, 0] = 40
        model.model.layers[1].mlp.gate_proj.weight[3] = 0
        model.model.layers[1].mlp.gate_proj.weight[3, 0] = 40
    ids = ids.clone()
    ids[:, 4], ids[:, 9] = 17, 17
    assert spikeplug.get_pass("prefix", threshold=20.0).apply(model, [ids]) == {"tokens": [17, 1]}


@pytest.mark.parametrize("recipe", ["bse", "mgpc", "laser"])
@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_both_passes_convert_reload_and_generate(build, ids, tmp_path, family, recipe):
    passes = ["rotate", "prefix"] if recipe == "bse" else ["rotate", "prefix", "defer-softmax"]
    options = {"passes": passes, "pass_options": {"prefix": {"tokens": [5, 1]}, "rotate": {"seed": 2}}}
    dense = build(family)
    spikeplug.get_pass("prefix", tokens=(5, 1)).apply(dense)
    model = spikeplug.convert(build(family), recipe, calibration=[ids], steps=12, **options)
    logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    reference = dense(ids).logits
    assert (logits - reference).abs().max() < 0.05 * reference.abs().max()
    stepped = spikeplug.set_execution(copy.deepcopy(model), "stepped")(ids).logits
    assert (stepped - logits).abs().max() < 1e-2 * logits.abs().max()
    spikeplug.save(model, tmp_path / "model")
    for loaded in (spikeplug.load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert torch.equal(loaded(ids).logits, logits)
        assert torch.equal(loaded.generate(ids, max_new_tokens=5, do_sample=False), tokens)
        assert spikeplug.report(loaded) == spikeplug.report(model)
    online = [op for op in spikeplug.report(model).ops if op.type == "OnlineRotation"]
    assert [op.macs for op in online] == [48 * (6 + 8)] * 2 or all(op.macs > 0 for op in online)
    assert set(sites(model)) == set(sites(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_deferring_the_division_of_softmax_keeps_the_logits(build, ids, family):
    model = build(family)
    before = model(ids).logits.detach()
    spikeplug.get_pass("defer-softmax").apply(model)
    after = model(ids).logits.detach()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert not torch.equal(after, before)


def test_deferred_weights_fill_every_row_and_lose_less(build, ids):
    """The code sees 1 in every row; rounding down at few steps, the division makes good what small weights lose."""

    def error(*passes):
        model = spikeplug.convert(
            build(), "las", calibration=[ids], steps=5, include=["probabilities"], passes=list(passes)
        )
        seen = spikeplug.observe(model, [ids])["model.layers.0.self_attn.probabilities"]
        peaks = seen.rows.max() if not passes else seen.high
        return float((model(ids).logits.detach() - dense).norm() / dense.norm()), float(peaks.min())

    dense = build()(ids).logits.detach()
    (plain, _), (deferred, peak) = error(), error("defer-softmax")
    assert peak == 1
    assert 0 < deferred < 0.7 * plain


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("passes", [["prefix"], ["prefix", "defer-softmax"]], ids=str)
def test_products_step_by_step_equal_the_decoded_ones(build, ids, family, passes, monkeypatch):
    """Eq. 51 through q·k and p·v, with a prefix, grouped heads, other numbers of steps, and a cache."""
    from spikeplug.graph import products

    steps = []
    original = products.matrix_product
    monkeypatch.setattr(products, "matrix_product", lambda q, k: steps.append(1) or original(q, k))
    model = spikeplug.convert(
        build(family).double(),
        "base2-round",
        calibration=[ids],
        steps=6,
        overrides={"probabilities": {"steps": 9}},
        passes=passes,
        pass_options={"prefix": {"tokens": [5, 1]}},
    )
    with torch.no_grad():
        fused = model(ids).logits
        assert not steps
        spikeplug.set_execution(model, "stepped")
        torch.testing.assert_close(model(ids).logits, fused, rtol=1e-9, atol=1e-9)
        assert len(steps) == 2 * len(model.model.layers)
        first = model(ids[:, :15], use_cache=True)
        rest = model(ids[:, 15:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, fused[:, 15:], rtol=1e-9, atol=1e-9)
    # The gradient of a training step is that of the decoded products.
    gradients = []
    for execution in ("stepped", "fused"):
        spikeplug.set_execution(model, execution)
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_prefix_without_data_or_bos_says_what_to_give(build, ids):
    with pytest.raises(CalibrationError, match="found on calibration batches"):
        spikeplug.get_pass("prefix").apply(build())
    model = build()
    model.config.bos_token_id = None
    with pytest.raises(ConversionError, match="names no BOS token"):
        spikeplug.get_pass("prefix").apply(model, [ids])
    with pytest.raises(OptionError, match="prefix token 999: the model knows tokens 0 to 255"):
        spikeplug.get_pass("prefix", tokens=(999,)).apply(build())
    with pytest.raises(OptionError, match=r"threshold=0\.5"):
        spikeplug.get_pass("prefix", threshold=0.5)


def test_passes_of_the_command_line(cli, dense_folder, text, tmp_path):
    code, result, err = cli("convert", dense_folder, "--recipe", "las", "-s", "passes=rotate,prefix", "--calibrate",
                            text, "--out", tmp_path / "out", "--seqlen", 32, "--json")  # fmt: skip
    assert code == 0, err
    assert result["config"]["passes"] == ["rotate", "prefix"]
    assert cli("eval", tmp_path / "out", "--ppl", text, "--seqlen", 32)[0] == 0


@pytest.mark.parametrize(("bits", "group", "levels"), [(8, 0, 256), (4, 16, 16)])
def test_weights_are_rounded_to_few_levels(build, ids, bits, group, levels):
    model = build()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    spikeplug.get_pass("quantize-weights", bits=bits, group=group).apply(model)
    after = model.model.layers[0].mlp.up_proj.weight.detach()
    rows = after.reshape(-1, group or after.shape[1])
    assert all(row.unique().numel() <= levels for row in rows)
    step = before.reshape(rows.shape).abs().amax(1, keepdim=True) / (levels / 2 - 1)
    assert ((after - before).reshape(rows.shape).abs() <= 0.5001 * step).all()
    assert not torch.equal(after, before)
    assert torch.equal(model.lm_head.weight, head)


def test_bad_weight_options_say_so(build):
    with pytest.raises(OptionError, match="bits=5: choose one of 4, 8"):
        spikeplug.get_pass("quantize-weights", bits=5)
    with pytest.raises(OptionError, match=r"group=7: the rows of .* have 32 weights"):
        spikeplug.get_pass("quantize-weights", group=7).apply(build())
