"""State of a forward pass lives in that pass: padding, threads and recomputation change no result and no count."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import spikeplug
from spikeplug.coding.site import Site, sites
from spikeplug.errors import ConversionError


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, **options,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    return model


@pytest.fixture
def ids():
    return torch.randint(2, 97, (4, 24), generator=torch.Generator().manual_seed(1))


def padded(ids, count=8):
    given = torch.cat([torch.zeros(len(ids), count, dtype=torch.long), ids], 1)
    mask = (given != 0).long()
    return {"input_ids": given, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "options"), [("bse", {"steps": 8}), ("ttfs", {"steps": 256}), ("mgpc", {"steps": 6})]
)
def test_padding_is_neither_observed_nor_counted(ids, recipe, options):
    model = llama()
    model.model.embed_tokens.weight.data[0] = 30 * torch.randn(32)  # what a padded position would bring into ranges
    plain = spikeplug.convert(model, recipe, calibration=[ids], **options)
    masked = spikeplug.convert(model, recipe, calibration=[padded(ids)], **options)
    for one, other in zip(
        spikeplug.observe(plain, [ids]).values(), spikeplug.observe(masked, [padded(ids)]).values(), strict=True
    ):
        torch.testing.assert_close(other.low, one.low, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other.high, one.high, rtol=1e-3, atol=1e-4)
        # Probabilities have a column for every padded key, which is 0.
        assert other.count == one.count or other.count == one.count // 24 * 32
    energy = spikeplug.energy(plain, [ids]), spikeplug.energy(plain, [padded(ids)])
    assert energy[1].total("acs") == pytest.approx(energy[0].total("acs"), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["laser", "ttfs"])
@pytest.mark.parametrize("execution", ["fused", "stepped"])
def test_padding_fires_nothing_within_approximated_operations(ids, recipe, execution):
    options = (
        {"steps": 8}
        if recipe == "laser"
        else {
            "steps": 64,
            "approximators": {"*": "ttfs-kernels"},
            "approximator_options": {"ttfs-kernels": {"steps": 256}},
        }
    )
    model = spikeplug.set_execution(spikeplug.convert(llama(), recipe, calibration=[ids], **options), execution)
    found = []
    for batch in ({"input_ids": ids}, padded(ids)):
        with spikeplug.count_spikes(model) as counts:
            model(**batch, use_cache=False)
        found.append(counts.by_site)
    codecs = [name for name, site in sites(model).items() if not isinstance(site, Site)]
    assert codecs
    for name in codecs:
        assert found[1][name].spikes == pytest.approx(found[0][name].spikes, rel=0.02), name
        # Scores have a column for every padded key, from which nothing comes.
        assert found[1][name].neurons in (found[0][name].neurons, found[0][name].neurons // 24 * 32), name


@torch.no_grad()
def test_prefix_is_sought_without_padding(ids):
    options = {"passes": ["prefix"], "steps": 8}
    found = [
        spikeplug.conversion_of(spikeplug.convert(llama(), "bse", calibration=[batch], **options)).config.pass_options
        for batch in (ids, padded(ids))
    ]
    assert found[0] == found[1]
    assert found[0]["prefix"]["tokens"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    ).eval()  # fmt: skip


class Shared(nn.Module):
    """Several layers read one activation, the input among them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(8 * 36, 5)

    def forward(self, x):
        return self.c(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1).flatten(1))


@pytest.mark.parametrize("kind", ["language", "shared", "css"])
@pytest.mark.parametrize("passes", [20, pytest.param(1250, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_eight_threads_share_a_model(ids, kind, passes):
    if kind == "language":
        model = spikeplug.convert(llama(), "bse", calibration=[ids], steps=8)
        inputs = [ids[index : index + 1] for index in range(4)]
    else:
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        dense = Shared().eval() if kind == "shared" else net()
        model = spikeplug.convert(dense, "css" if kind == "css" else "bse", calibration=[images], steps=8)
        inputs = [images[:2], images[2:4], images[4:6], images[:2]]

    def run(x):
        found = model(x)
        return found if isinstance(found, torch.Tensor) else found.logits

    with torch.no_grad():
        wanted = [run(x) for x in inputs]
        alone = []
        with spikeplug.count_spikes(model) as once:
            for x in inputs:
                before = once.total
                run(x)
                alone.append(once.total - before)
    wrong: list[str] = []

    def work(index):
        with torch.no_grad():
            for turn in range(passes):
                at = (index + turn) % 4
                if not torch.equal(run(inputs[at]), wanted[at]):
                    wrong.append(f"thread {index}, pass {turn}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with spikeplug.count_spikes(model) as counts:
            threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    expected = once.total * 8 * (passes // 4) + sum(
        alone[(index + turn) % 4] for index in range(8) for turn in range(passes % 4)
    )
    assert counts.total == expected > 0


def test_recomputation_of_checkpointing_is_not_counted(ids):
    model = spikeplug.convert(llama(), "bse", calibration=[ids], steps=8).train()
    totals = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with spikeplug.count_spikes(model) as counts:
            model(ids, labels=ids, use_cache=False).loss.backward()
        totals.append(counts.total)
    assert totals[0] == totals[1] > 0


def test_a_resized_head_is_refused(ids):
    model = spikeplug.convert(llama(), "bse", calibration=[ids], steps=8)
    with pytest.raises(ConversionError, match="Resize the dense model, and convert it then"):
        model.resize_token_embeddings(105)
    model.lm_head = nn.Linear(32, 97)
    with pytest.raises(ConversionError, match="'lm_head' was replaced after the conversion"):
        spikeplug.report(model)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["bse", "mgpc", "qc-a2s"])
def test_the_dense_model_stays_as_it_is(ids, recipe):
    model = llama()
    dense = model(ids).logits
    options = {"pass_options": {"prefix": {"tokens": [5, 1]}}} if recipe == "qc-a2s" else {}
    spikeplug.convert(model, recipe, calibration=[ids], **options)
    assert torch.equal(model(ids).logits, dense)
    with pytest.raises(spikeplug.SpikeplugError):
        spikeplug.convert(model, recipe, calibration=[ids], exclude=["nothing"])
    with pytest.raises(spikeplug.SpikeplugError):
        spikeplug.convert(model, recipe, calibration=[torch.zeros(1, 2, 3)])
    assert torch.equal(model(ids).logits, dense)
    assert type(model.lm_head) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_left_out_of_norms_of_heads(build, ids, left):
    lengths = (ids.shape[1], ids.shape[1] // 2, 3)
    text, mask = ids[:1].repeat(3, 1), torch.zeros(3, ids.shape[1], dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
        if not left:
            mask[row] = mask[row].flip(0)
    options = {"steps": 64, "approximators": {"*": "ttfs-kernels"}}
    model = spikeplug.convert(build("qwen3"), "ttfs", calibration=[text], **options)
    with spikeplug.count_spikes(model) as padded:
        model(text, attention_mask=mask, use_cache=False)
    with spikeplug.count_spikes(model) as alone:
        for row in range(3):
            model(text[row : row + 1, mask[row].bool()], use_cache=False)
    names = [name for name in padded.by_site if "q_norm" in name or "k_norm" in name]
    assert names
    for name in names:
        assert padded.by_site[name].neurons == alone.by_site[name].neurons > 0, name


@torch.no_grad()
def test_a_cache_of_which_the_first_row_has_ended_is_counted(build, ids):
    model = spikeplug.convert(build(), "bse", calibration=[ids], steps=8)
    text, mask = ids[:1, :12].repeat(2, 1), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 5:] = 0
    cache = model(text[:, :2], use_cache=True).past_key_values
    with spikeplug.count_spikes(model) as counts:
        model(text[:, 2:], attention_mask=mask, past_key_values=cache)
    site = counts.by_site["model.layers.0.self_attn.key"]
    assert site.neurons == (3 + 10) * site.neurons // 13 > 0
    assert site.spikes > 0
