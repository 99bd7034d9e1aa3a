"""Attention on coded operands: q, k, v and the probabilities are carried by spikes.

A product of two activations is decoded, multiplied and coded again at the next site (LASER, section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from spikeplug.errors import ConversionError

IMPLEMENTATION = "spikeplug"
"""Name of this attention in transformers' registry."""

OPERANDS = {
    "query": (1, 3),  # [B, H, S, D]: a channel is one feature of one head
    "key": (1, 3),
    "value": (1, 3),
    "probabilities": (1,),  # [B, H, S, K]: a channel is one head
}
"""Kind of operand -> the dimensions that make up a channel."""

PREFIX = ("prefix_key", "prefix_value")
"""Buffers of an attention block that hold keys and values `[H_kv, P, D]` of the prefix, where there is one."""

REFUSED = ("softcap", "s_aux", "head_mask", "position_bias")
"""Arguments of transformers' attention functions that change the result and have no form here."""


def spiking_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of one layer, with the signature of transformers' attention functions.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, H_kv, K, D]`; the last S positions are new, the others come from the cache.
        attention_mask: additive, `[B, 1, S, K]`.

    Returns:
        The output `[B, S, H, D]` and the coded probabilities `[B, H, S, K]`.

    Raises:
        ConversionError: an argument would change the result and has no form here.
    """
    for name in REFUSED:
        argument = kwargs.get(name)
        if argument is not None:
            raise ConversionError(f"attention with {name}={argument!r} has no coded form: exclude the attention sites")
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    new = _new_positions(length, key.shape[2], attention_mask)
    query = _coded(module, "query", query)
    key = _coded(module, "key", key, new)
    value = _coded(module, "value", value, new)
    if hasattr(module, PREFIX[0]):
        # The prefix is seen by every token, and stays in floating point.
        key, value = (
            torch.cat([kept.to(each.dtype).expand(batch, -1, -1, -1), each], dim=2)
            for kept, each in zip((module.prefix_key, module.prefix_value), (key, value), strict=True)
        )
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (module.prefix_key.shape[1], 0))

    # One product for the query heads that share a key head: [B, H_kv, groups * S, D] x [B, H_kv, D, K].
    rows = (query * scaling).reshape(batch, -1, groups * length, size)
    scores = torch.matmul(rows, key.transpose(2, 3)).view(batch, heads, length, -1)
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    probabilities = module.softmax(scores)
    probabilities = F.dropout(probabilities, dropout, module.training)
    coded = _coded(module, "probabilities", probabilities).to(query.dtype)
    output = torch.matmul(coded.view(batch, -1, groups * length, coded.shape[-1]), value)
    return output.view(batch, heads, length, size).transpose(1, 2).contiguous(), coded


class Softmax(nn.Module):
    """Softmax over the last dimension, in float32; a module, so that an approximator can stand in its place."""

    def forward(self, scores: Tensor) -> Tensor:
        """`[..., K] -> [..., K]`."""
        return F.softmax(scores, dim=-1, dtype=torch.float32)


def _new_positions(length: int, total: int, mask: Tensor | None) -> slice | None:
    """Which keys are those of this call's `length` tokens: the last ones that the last token sees.

    A cache may hold more positions than are filled yet, so they need not be the last of all.
    """
    if total == length:
        return None
    end = total
    if mask is not None and mask.shape[-1] == total and torch.finfo(mask.dtype).min / 2 > mask[0, 0, -1, -1]:
        end = int((mask[0, 0, -1] > torch.finfo(mask.dtype).min / 2).nonzero().max()) + 1
    return slice(end - length, end)


def _coded(module: nn.Module, kind: str, x: Tensor, new: slice | None = None) -> Tensor:
    site = getattr(module, f"{kind}_site", None)
    if site is None:
        return x
    coded: Tensor = site(x, new)
    return coded


def refuse_other_attention(module: nn.Module, *_: Any) -> None:
    """Forward pre-hook of converted attention layers: another implementation would leave their sites unused."""
    found = module.config._attn_implementation  # type: ignore[union-attr]
    if found != IMPLEMENTATION:
        raise ConversionError(
            f"attention implementation is '{found}': the spikes of q, k, v and probabilities would be left out. "
            f"Call model.set_attn_implementation('{IMPLEMENTATION}')"
        )


AttentionInterface.register(IMPLEMENTATION, spiking_attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
