"""Tiny models of each family, a tiny tokenizer, and the command line in this process."""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spikeplug.cli import main

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
}


def build_model(family: str = "llama"):
    """The same tiny random model each time."""
    cls, config, more = FAMILIES[family]
    torch.manual_seed(0)
    model = cls(config(**SHAPE, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the initialisation, so that attention is not uniform.
            parameter.mul_(3) if parameter.ndim > 1 else parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def build():
    return build_model


@pytest.fixture
def ids():
    return torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer():
    """A tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture
def dense_folder(tmp_path, build, tokenizer):
    """A dense checkpoint as transformers writes it."""
    folder = tmp_path / "dense"
    build().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 40)
    return path


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command line in this process; gives exit status, stdout (parsed if JSON) and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["spikeplug", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and not code else out, err

    return run
