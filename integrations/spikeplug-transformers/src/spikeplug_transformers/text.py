"""Texts: what a model is calibrated on, and perplexity with the protocol that makes the number comparable."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeplug.coding.site import Coder
from spikeplug.conversion.architecture import Opened, Watch
from spikeplug.conversion.record import conversion_of
from spikeplug.conversion.verbs import report
from spikeplug.errors import NonFiniteError, OptionError
from spikeplug.measure.counting import count_spikes
from spikeplug.measure.energy import charge


def tokenize(opened: Opened, text: Path) -> tuple[Tensor, dict[str, Any]]:
    """Token ids `[n]` of a whole text, and the part of the protocol that describes them.

    Raises:
        OptionError: the text cannot be read or is empty, or has tokens that the model does not know.
    """
    tokenizer, model = opened.tokenizer, opened.model
    try:
        content = text.read_bytes()
        decoded = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise OptionError(f"cannot read the text {text}: {reason}") from None
    if not decoded.strip():
        raise OptionError(f"the text {text} is empty")
    ids = tokenizer(decoded, return_tensors="pt", verbose=False)["input_ids"][0]
    config: Any = model.config
    known = config.vocab_size  # not of the embedding, which not every rank of a pipeline has
    if len(ids) and int(ids.max()) >= known:
        raise OptionError(
            f"the text {text} has token {int(ids.max())}, the model knows {known}: it is not this model's tokenizer"
        )
    starts = tokenizer.bos_token_id is not None and len(ids) > 0 and int(ids[0]) == tokenizer.bos_token_id
    return ids, {
        "text": text.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "tokenizer": f"{type(tokenizer).__name__} ({Path(getattr(tokenizer, 'name_or_path', '') or '?').name})",
        "bos": starts,
    }


def windows(ids: Tensor, seqlen: int, tokens: int | None) -> list[Tensor]:
    """Consecutive windows `[1, seqlen]` that do not overlap; a text shorter than one window is a single window.

    Raises:
        OptionError: fewer than two tokens, or a window shorter than two.
    """
    if seqlen < 2:
        raise OptionError(f"seqlen={seqlen}: at least 2 is needed, a token and the one it predicts")
    if tokens is not None and tokens < 2:
        raise OptionError(f"tokens={tokens}: at least 2 is needed, a token and the one it predicts")
    ids = ids[:tokens]
    if ids.numel() < 2:
        raise OptionError(f"the text has {ids.numel()} token: at least 2 are needed, a token and the one it predicts")
    size = min(seqlen, ids.numel())
    whole = ids[: ids.numel() // size * size]
    return list(whole.reshape(-1, 1, size).unbind(0))


SHORT = 16
"""Tokens of a short calibration window."""


def calibration(ids: Tensor, seqlen: int, tokens: int, beginnings: bool = True) -> list[Tensor]:
    """Batches of a text to calibrate on: windows `[1, seqlen]`, then half of the text again in short windows.

    The largest activations of a language model stand at the first tokens of its window, and their size depends on
    which tokens those are. Windows of `seqlen` alone show too few beginnings: on SmolLM2 with 16-step per-tensor
    BSE a single unseen one costs 0.45 % of perplexity, and the short windows bring it to 0.07 %.

    Args:
        beginnings: whether there are short windows. A model with a prefix has its largest activations there, and short
            windows would show it outliers that a text hardly has.

    Raises:
        OptionError: as `windows`.
    """
    long = windows(ids, seqlen, tokens)
    short = ids[: min(tokens, ids.numel()) // 2]
    if not beginnings or short.numel() < SHORT:
        return long
    rows = short[: short.numel() // SHORT * SHORT].reshape(-1, SHORT)
    return [*long, *torch.split(rows, max(1, seqlen // SHORT))]


@torch.no_grad()
def evaluate(opened: Opened, text: Path, *, seqlen: int, tokens: int | None, watch: Watch) -> dict[str, Any]:
    """Perplexity `exp(mean negative log-likelihood)` over all targets of non-overlapping windows.

    Each window of `seqlen` tokens has `seqlen - 1` targets; tokens after the last whole window are left out.

    Returns:
        perplexity, protocol, tokens_per_second (of all windows but the first, where there are more) and, for a
        converted model, spikes and report.

    Raises:
        OptionError: the text is too short, or a window longer than the model's context.
        NonFiniteError: the model gives NaN or infinity.
    """
    model: Any = opened.model
    ids, protocol = tokenize(opened, text)
    batches = windows(ids, seqlen, tokens)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and batches[0].shape[1] > context:
        raise OptionError(f"seqlen={batches[0].shape[1]}: the model's context is {context} tokens")
    spiking = any(isinstance(module, Coder) for module in model.modules())
    with count_spikes(model) if spiking else contextlib.nullcontext() as counts:
        total, tokens_per_second = _log_likelihood(model, batches, watch)
    if not math.isfinite(total):
        raise NonFiniteError(f"the model's logits on {text.name} are NaN or infinite")
    seen = sum(batch.numel() for batch in batches)
    targets = seen - len(batches)
    size = batches[0].shape[1]
    result: dict[str, Any] = {
        "perplexity": math.exp(min(total / targets, 700.0)),
        "protocol": {**protocol, "seqlen": size, "stride": size, "tokens": seen, "targets": targets},
        "tokens_per_second": tokens_per_second,
    }
    result["protocol"] |= {"dtype": str(model.dtype).removeprefix("torch."), "model": opened.name}
    if counts is not None:
        result["spikes"] = {"total": counts.total, "per_token": counts.total / seen}
        result["energy"] = charge(model, counts, seen).summary()
        result["report"] = report(model).summary()
        result["config"] = conversion_of(model).config.model_dump(mode="json")
    return result


def _log_likelihood(model: Any, batches: Sequence[Tensor], watch: Watch) -> tuple[float, float]:
    """Negative log-likelihood of all targets, summed, and tokens per second."""
    total, timed, start = 0.0, 0, time.perf_counter()
    for index, batch in enumerate(batches):
        watch("evaluating", index, len(batches))
        batch = batch.to(model.device)
        logits = model(batch, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, batch[0, 1:], reduction="sum").item()
        if index == 0 and len(batches) > 1:
            start = time.perf_counter()  # the first window warms caches and threads up
        else:
            timed += batch.numel()
    watch("evaluating", len(batches), len(batches))
    return total, timed / (time.perf_counter() - start)
