"""Transformers of any kind, captured: every spike made equals the closed form, through the whole network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

import spikeplug
from spikeplug.coding.site import sites

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def ids(length=9):
    return torch.randint(3, 50, (3, length), generator=torch.Generator().manual_seed(0))


def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


NETWORKS = {
    "bert": lambda: (
        BertModel(BertConfig(vocab_size=50, **SMALL)), {"input_ids": ids(), "attention_mask": ids() * 0 + 1},
    ),
    "gpt2": lambda: (GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)), {"input_ids": ids()}),
    "clip text": lambda: (CLIPTextModel(CLIPTextConfig(vocab_size=50, eos_token_id=2, **SMALL)), {"input_ids": ids()}),
    "clip vision": lambda: (
        CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=4, **SMALL)), {"pixel_values": images()},
    ),
    "vit": lambda: (
        ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=5, **SMALL)), images(),
    ),
    "encoder": lambda: (
        nn.Sequential(nn.Linear(16, 32), nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), 2, enable_nested_tensor=False,
        ), nn.Linear(32, 5)), torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).double(),
    ),
}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    net, batch = NETWORKS[name]()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # attention that is not even
    return net.double().eval(), batch


def result(net, batch):
    found = net(**batch) if isinstance(batch, dict) else net(batch)
    return found if isinstance(found, torch.Tensor) else found[0]


@torch.no_grad()
@pytest.mark.parametrize(("name", "recipe"), [*((name, "bse") for name in NETWORKS), ("encoder", "ttfs")])
def test_stepped_equals_fused_through_the_whole_network(name, recipe):
    net, batch = built(name)
    dense = result(net, batch)
    spiking = spikeplug.convert(net, recipe, calibration=[batch], steps={"bse": 6, "ttfs": 64}[recipe])
    assert torch.equal(result(net, batch), dense)
    report = spikeplug.report(spiking)
    assert report.share("dense") == 0
    assert report.share("decoded") > 0
    with spikeplug.count_spikes(spiking) as fused_counts:
        fused = result(spiking, batch)
    spikeplug.set_execution(spiking, "stepped")
    with spikeplug.count_spikes(spiking) as stepped_counts:
        stepped = result(spiking, batch)
    assert (stepped - fused).abs().max() < 1e-9 * fused.abs().max()
    assert not torch.equal(fused, dense)
    assert stepped_counts.total == fused_counts.total > 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "css") for name in NETWORKS), ("clip vision", "base2-round"), ("gpt2", "base2-round")]
)
def test_attention_is_coded_and_near(name, recipe, tmp_path):
    net, batch = built(name)
    dense = result(net, batch)
    spiking = spikeplug.convert(net, recipe, calibration=[batch], steps={"css": 24, "base2-round": 14}[recipe])
    assert 0 < (result(spiking, batch) - dense).norm() < 0.02 * dense.norm()
    roles = {op.role for op in spikeplug.report(spiking).ops if op.macs}
    assert roles <= {"spiking", "decoded"}
    spikeplug.save(spiking, tmp_path / "net")
    assert torch.equal(result(spikeplug.load(tmp_path / "net"), batch), result(spiking, batch))


@torch.no_grad()
def test_masked_positions_do_not_matter():
    net, _ = built("bert")
    given, mask = ids(), torch.ones_like(ids())
    mask[:, 6:] = 0
    net.embeddings.word_embeddings.weight.data[7] = 30  # what padding would bring into ranges
    other = given.clone()
    other[:, 6:] = 7
    batch = {"input_ids": other, "attention_mask": mask}
    spiking = spikeplug.convert(net, "bse", calibration=[batch])
    one, two = (spiking(input_ids=each, attention_mask=mask).last_hidden_state[:, :6] for each in (given, other))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    cut = {"input_ids": given[:, :6], "attention_mask": mask[:, :6]}
    plain = spikeplug.convert(net, "bse", calibration=[cut])
    for name, site in sites(plain).items():
        if site.kind not in ("probabilities", "key"):
            torch.testing.assert_close(sites(spiking)[name].scale, site.scale, rtol=1e-3, atol=1e-6)
    with spikeplug.count_spikes(plain) as short, spikeplug.count_spikes(spiking) as long:
        plain(**cut), spiking(**batch)
    for name, count in short.by_site.items():
        if sites(plain)[name].kind == "input":
            assert long.by_site[name].neurons == count.neurons


@torch.no_grad()
def test_a_model_of_no_known_family_is_captured():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=2)).eval()
    dense = model(ids()).logits
    spiking = spikeplug.convert(model, "bse", calibration=[ids()])
    assert 0 < (spiking(ids()).logits - dense).norm() < 0.01 * dense.norm()
    assert torch.equal(model(ids()).logits, dense)
    roles = {op.name: op.role for op in spikeplug.report(spiking).ops if op.macs}
    assert set(roles.values()) == {"spiking", "decoded"}
    assert "transformer.h.0.attn.c_attn" in roles


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "clip text", "vit"])
def test_one_sample_is_taken(name):
    net, batch = built(name)
    spiking = spikeplug.convert(net, "bse", calibration=[batch], steps=6)
    one = {key: each[:1] for key, each in batch.items()} if isinstance(batch, dict) else batch[:1]
    with spikeplug.in_mode(spiking, "dense"):
        torch.testing.assert_close(result(spiking, one), result(net, one))
