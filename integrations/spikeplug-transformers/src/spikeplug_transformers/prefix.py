"""The pass `prefix`: keys and values of outlier tokens, kept once and seen by every token (PrefixQuant).

The huge activations of a language model stand at its first token and at few others. With those tokens ahead of every
text, as stored keys and values, the text itself has none.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikeplug.errors import CalibrationError, ConversionError, OptionError

from .attention import IMPLEMENTATION, PREFIX, plain_softmax
from .family import attention_blocks, refuse_strangers


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Finds outlier tokens on calibration data and stores their keys and values in every attention block.

    A token is an outlier where the largest magnitude of its input to a `down_proj` is more than `threshold` times the
    median of all tokens. The prefix is the most frequent outliers behind the first position, as many as a text has on
    average, and the BOS token, which has them always. Keys are rotated to positions before 0, so that nothing else of
    the model changes: caches, positions and masks are those of the text.

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

    def __post_init__(self) -> None:
        if not 1 < self.threshold < math.inf:
            raise OptionError(f"threshold={self.threshold}: a number above 1 is needed")
        if not 1 <= self.limit <= 64:
            raise OptionError(f"limit={self.limit}: a whole number from 1 to 64 is needed")

    def apply(self, model: Any, batches: Sequence[Any] = ()) -> list[str]:
        """Store the prefix; nothing is folded away.

        Raises:
            CalibrationError: no batch of token ids to find the tokens on.
            ConversionError: the model is not of the family, or has a prefix already.
            OptionError: a token is none of the model's.
        """
        refuse_strangers(model)
        if any(hasattr(block, PREFIX[0]) for _, block in attention_blocks(model)):
            raise ConversionError("the model has a prefix already")
        tokens = self.tokens or find(model, batches, self.threshold, self.limit)
        known = model.get_input_embeddings().num_embeddings
        for token in tokens:
            if not 0 <= token < known:
                raise OptionError(f"prefix token {token}: the model knows tokens 0 to {known - 1}")
        ids = torch.tensor([tokens], device=model.device)
        positions = torch.arange(-len(tokens), 0, device=model.device).unsqueeze(0)
        with torch.no_grad():
            cache = model.model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
        for (_, block), layer in zip(attention_blocks(model), cache.layers, strict=True):
            for name, tensor in zip(PREFIX, (layer.keys, layer.values), strict=True):
                block.register_buffer(name, tensor[0].clone())
        model.config.spikeplug_prefix = list(tokens)
        self.skeleton(model)
        model.set_attn_implementation(IMPLEMENTATION)
        return []

    def skeleton(self, model: Any) -> None:
        """Put in place what attention by the implementation that sees the prefix needs."""
        for _, block in attention_blocks(model):
            plain_softmax(block)


@torch.no_grad()
def find(model: Any, batches: Sequence[Any], threshold: float, limit: int) -> tuple[int, ...]:
    """Tokens whose keys and values make the prefix, the BOS token last."""
    windows = [batch["input_ids"] if isinstance(batch, dict) else batch for batch in batches]
    windows = [batch for batch in windows if isinstance(batch, Tensor) and batch.ndim == 2 and batch.shape[1] > 1][:8]
    if not windows:
        raise CalibrationError("outlier tokens are found on calibration batches of token ids [B, S]: give some")
    largest: list[Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: largest.append(given[0].abs().amax(-1)))
        for layer in model.model.layers
    ]
    seen: collections.Counter[int] = collections.Counter()
    outliers = rows = 0
    try:
        for batch in windows:
            largest.clear()
            model(batch.to(model.device), use_cache=False)
            of_layer = torch.stack(largest)  # [layers, B, S]
            found = (of_layer > threshold * of_layer.flatten(1).median(1).values[:, None, None]).any(0)
            outliers += int(found.sum())
            rows += len(batch)
            seen.update(batch.to(found.device)[:, 1:][found[:, 1:]].tolist())
    finally:
        for hook in hooks:
            hook.remove()
    count = min(limit, max(1, round(outliers / rows)))
    first = model.config.bos_token_id
    if isinstance(first, (list, tuple)):
        first = first[0]
    if first is None:
        raise ConversionError("the model names no BOS token: give pass_options={'prefix': {'tokens': [...]}}")
    others = [token for token, _ in seen.most_common() if token != first]
    return (*others[: count - 1], first)
