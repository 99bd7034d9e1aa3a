"""Options and changes of language models that have no form: said before anything is changed, never ignored."""

from __future__ import annotations

import pytest
import torch

import spikeplug
from spikeplug.errors import ConversionError, OptionError


@pytest.fixture
def spiking(build, ids):
    return spikeplug.convert(build(), "bse", calibration=[ids])


def test_one_site_has_one_code(build, ids):
    with pytest.raises(OptionError, match=r"v_proj' another code than 'model\.layers\.0\.self_attn\.q_proj'"):
        spikeplug.convert(build(), "bse", calibration=[ids], overrides={"*.v_proj": {"steps": 2}})
    given = {name: {"steps": 6} for name in ("*.q_proj", "*.k_proj", "*.v_proj")}
    model = spikeplug.convert(build(), "bse", calibration=[ids], overrides=given)
    assert model.model.layers[0].self_attn.v_proj.source.encoder.steps == 6


def test_approximators_need_no_star(build, ids):
    model = spikeplug.convert(build(), "bse", calibration=[ids], approximators={"silu": "asnc"})
    approximated = {op.name.rpartition(".")[2] for op in spikeplug.report(model).ops if op.role == "approximated"}
    assert approximated == {"act_fn"}


def test_names_of_approximators_are_checked_before_anything_is_changed(build, ids):
    model = build()
    before = model(ids).logits
    with pytest.raises(OptionError, match="no operation 'gelu'"):
        spikeplug.convert(model, "bse", calibration=[ids], inplace=True, approximators={"gelu": "asnc"})
    assert torch.equal(model(ids).logits, before)
    spikeplug.convert(model, "bse", calibration=[ids], inplace=True)


def test_an_embedding_replaced_in_the_inner_model_is_refused(spiking, tmp_path):
    with pytest.raises(ConversionError, match="coded"):
        spiking.model.resize_token_embeddings(300)
    spiking.model.embed_tokens = torch.nn.Embedding(256, 32)
    for refused in (
        spikeplug.report,
        lambda m: spikeplug.save(m, tmp_path / "a"),
        lambda m: m.save_pretrained(tmp_path / "b"),
    ):
        with pytest.raises(ConversionError, match=r"'model\.embed_tokens' was replaced after the conversion"):
            refused(spiking)


def test_rotation_is_verified_in_float64(build, ids):
    model = build().double()
    spiking = spikeplug.convert(model, "bse", calibration=[ids], passes=["rotate"])
    assert 0 < (spiking(ids).logits - model(ids).logits).abs().max() < 1e-2


@pytest.mark.parametrize(("passes", "options", "says"), [
    (["rotate", "prefix"], {"prefix": {"tokens": [9999]}}, "prefix token 9999"),
    (["rotate", "quantize-weights"], {"quantize-weights": {"group": 7}}, "group=7"),
    (["rotate", "rotate"], {}, "'rotate' is named twice"),
])  # fmt: skip
def test_passes_that_cannot_be_applied_change_nothing_in_place(build, ids, passes, options, says):
    model = build()
    before = model(ids).logits
    with pytest.raises(OptionError, match=says):
        spikeplug.convert(model, "bse", calibration=[ids], inplace=True, passes=passes, pass_options=options)
    assert torch.equal(model(ids).logits, before)
    spikeplug.convert(model, "bse", calibration=[ids], inplace=True)
