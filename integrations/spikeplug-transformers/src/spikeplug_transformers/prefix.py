"""The pass `prefix`: keys and values of outlier tokens, kept once and seen by every token (PrefixQuant).

The huge activations of a language model stand at its first token and at few others. With those tokens ahead of every
text, as stored keys and values, the text itself has none.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeplug.errors import CalibrationError, ConversionError, OptionError

from .attention import IMPLEMENTATION, PREFIX, plain_softmax
from .family import attention_blocks, refuse_strangers


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Finds outlier tokens on calibration data and stores their keys and values in every attention block.

    A token is an outlier where the largest magnitude of its input to a `down_proj` is more than `threshold` times the
    median of all tokens. The prefix is the most frequent outliers behind the first position, as many as a text has on
    average, and the BOS token, which has them always. Then it is tried whether one more frequent token ahead takes
    outliers of a text's first tokens away. Keys are rotated to positions before 0, so that nothing else of the model
    changes: caches, positions and masks are those of the text.

    Args:
        tokens: the prefix, where it is known; empty: found.
        threshold: see above.
        limit: largest number of tokens found.

    Raises:
        OptionError: an option is out of range.
    """

    tokens: tuple[int, ...] = ()
    threshold: float = 64.0
    limit: int = 4

    name: ClassVar[str] = "prefix"
    keeps_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 < self.threshold < math.inf:
            raise OptionError(f"threshold={self.threshold}: a number above 1 is needed")
        if not 1 <= self.limit <= 64:
            raise OptionError(f"limit={self.limit}: a whole number from 1 to 64 is needed")

    def apply(self, model: Any, batches: Sequence[Any] = ()) -> dict[str, Any]:
        """Store the prefix; return its tokens.

        Raises:
            CalibrationError: no batch of token ids to find the tokens on.
            ConversionError: the model is not of the family, or has a prefix already.
            OptionError: a token is none of the model's.
        """
        refuse_strangers(model)
        if any(hasattr(block, PREFIX[0]) for _, block in attention_blocks(model)):
            raise ConversionError("the model has a prefix already")
        self.check(model)
        tokens = self.tokens or find(model, batches, self.threshold, self.limit)
        ids = torch.tensor([tokens], device=model.device)
        positions = torch.arange(-len(tokens), 0, device=model.device).unsqueeze(0)
        with torch.no_grad():
            cache = model.model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
        for (_, block), layer in zip(attention_blocks(model), cache.layers, strict=True):
            for name, tensor in zip(PREFIX, (layer.keys, layer.values), strict=True):
                block.register_buffer(name, tensor[0].clone())
        self.skeleton(model)
        model.set_attn_implementation(IMPLEMENTATION)
        return {"tokens": list(tokens)}

    def check(self, model: Any) -> None:
        """Raises as `apply`, ahead of it: a token is none of the model's."""
        known = model.get_input_embeddings().num_embeddings
        for token in self.tokens or ():
            if not 0 <= token < known:
                raise OptionError(f"prefix token {token}: the model knows tokens 0 to {known - 1}")

    def skeleton(self, model: Any) -> None:
        """Put in place what attention by the implementation that sees the prefix needs."""
        for _, block in attention_blocks(model):
            plain_softmax(block)


CANDIDATES, BEGINNINGS, BEGINNING = 8, 16, 48
"""Frequent tokens that are tried ahead of a prefix, on so many texts' first so many tokens."""

BETTER = 0.8
"""A longer prefix is taken where it brings the largest outlier below this share of what it was."""


@torch.no_grad()
def find(model: Any, batches: Sequence[Any], threshold: float, limit: int) -> tuple[int, ...]:
    """Tokens whose keys and values make the prefix, the BOS token last.

    Raises:
        CalibrationError, ConversionError: as `Prefix.apply`.
    """
    windows = [window for batch in batches for window in _unpadded(batch)]
    windows = [batch for batch in windows if isinstance(batch, Tensor) and batch.ndim == 2 and batch.shape[1] > 1]
    if not windows:
        raise CalibrationError("outlier tokens are found on calibration batches of token ids [B, S]: give some")
    first = model.config.bos_token_id
    if isinstance(first, (list, tuple)):
        first = first[0]
    if first is None:
        raise ConversionError("the model names no BOS token: give pass_options={'prefix': {'tokens': [...]}}")
    seen: collections.Counter[int] = collections.Counter()
    outliers = rows = 0
    for batch in windows[:8]:
        of_layer, _ = _largest(model, batch)
        found = (of_layer > threshold * of_layer.flatten(1).median(1).values[:, None, None]).any(0)
        outliers += int(found.sum())
        rows += len(batch)
        seen.update(batch.to(found.device)[:, 1:][found[:, 1:]].tolist())
    count = min(limit, max(1, round(outliers / rows)))
    others = [token for token, _ in seen.most_common() if token != first]
    return _lengthened(model, windows, (*others[: count - 1], first), limit)


def _unpadded(batch: Any) -> list[Any]:
    """Token ids of a batch; rows with padding one by one, without it."""
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or bool((mask != 0).all()):
        return [ids]
    return [row[kept != 0].unsqueeze(0) for row, kept in zip(ids, mask, strict=True)]


def _lengthened(model: Any, windows: Sequence[Tensor], prefix: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The prefix with frequent tokens ahead, as long as they take outliers of a text's first tokens away."""
    size = min(BEGINNING, min(batch.shape[1] for batch in windows))
    texts = torch.cat([batch[:, :size].cpu() for batch in windows[:BEGINNINGS]])[:BEGINNINGS]
    frequent = collections.Counter(token for batch in windows[:8] for token in batch.flatten().tolist())
    best = _outlier_and_loss(model, texts, prefix)
    while len(prefix) < limit:
        candidates = [token for token, _ in frequent.most_common(CANDIDATES + len(prefix)) if token not in prefix]
        tried = {(token, *prefix): _outlier_and_loss(model, texts, (token, *prefix)) for token in candidates}
        smallest = min((outlier for outlier, _ in tried.values()), default=best[0])
        if smallest >= BETTER * best[0]:
            break
        # Of those that do about as well, the one that the model likes best.
        near = {each: loss for each, (outlier, loss) in tried.items() if outlier < smallest / BETTER}
        prefix = min(near, key=lambda each: near[each])
        best = tried[prefix]
    return prefix


def _outlier_and_loss(model: Any, texts: Tensor, prefix: tuple[int, ...]) -> tuple[float, float]:
    """Largest magnitude over its layer's median behind a prefix, and the mean loss of the texts' tokens."""
    texts = texts.to(model.device)
    ahead = torch.tensor([prefix], device=model.device).expand(len(texts), -1)
    of_layer, logits = _largest(model, torch.cat([ahead, texts], 1))
    of_layer = of_layer[:, :, len(prefix) :].flatten(1)
    loss = F.cross_entropy(logits[:, len(prefix) : -1].float().flatten(0, 1), texts[:, 1:].flatten())
    return float((of_layer.amax(1) / of_layer.median(1).values.clamp(min=1e-12)).max()), float(loss)


def _largest(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of every token's input to every `down_proj`, `[layers, B, S]`, and the logits."""
    largest: list[Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: largest.append(given[0].abs().amax(-1)))
        for layer in model.model.layers
    ]
    try:
        logits = model(ids.to(model.device), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(largest), logits
