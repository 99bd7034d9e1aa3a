"""Attention on coded operands: q, k, v and the probabilities are carried by spikes.

Fused, a product of two activations is that of their decoded values, and is coded again at the next site (LASER, section
3.1). Stepped, every step's spikes meet the sums of the other operand's so far (MGPC, Eq. 51).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from spikeplug.coding.site import Site
from spikeplug.errors import ConversionError
from spikeplug.graph.products import Operand, matrix_product_of

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

DIVISION = "division"
"""Module of an attention block whose softmax is divided behind the product with v (the pass `defer-softmax`)."""

Arrange: TypeAlias = Callable[[Tensor, int], Tensor]
"""How a tensor enters a product, and of which step."""

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
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, with the signature of transformers' attention functions.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, H_kv, K, D]`; the last S positions are new, the others come from the cache.
        attention_mask: additive, `[B, 1, S, K]`.

    Returns:
        The output `[B, S, H, D]`; and the coded probabilities `[B, H, S, K]`, or None where they never exist as
        numbers: in stepped execution, and where the division of softmax is deferred.

    Raises:
        ConversionError: an argument would change the result and has no form here.
    """
    _refuse_arguments(kwargs)
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    new = _new_positions(length, key.shape[2], attention_mask)
    ahead = [getattr(module, name).to(key.dtype) for name in PREFIX if hasattr(module, name)]
    if ahead and attention_mask is not None:
        attention_mask = F.pad(attention_mask, (ahead[0].shape[1], 0))
    division = getattr(module, DIVISION, None)
    rows, keys, values = _arrangements(batch, kv_heads, ahead, division is not None)
    scores, _ = matrix_product_of(
        Operand(_site(module, "query"), query, lambda x, step: rows(x * scaling, step)),
        Operand(_site(module, "key"), key, keys, new),
    )
    scores = scores.view(batch, heads, length, -1)
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    probabilities = module.softmax(scores)
    if division is not None:
        probabilities = probabilities / probabilities.amax(-1, keepdim=True)
    probabilities = F.dropout(probabilities, dropout, module.training)
    weights = Operand(_site(module, "probabilities"), probabilities, rows)
    output, coded = matrix_product_of(weights, Operand(_site(module, "value"), value, values, new))
    if division is not None:
        output, coded = division(output), None
    output = output.to(query.dtype).view(batch, heads, length, size).transpose(1, 2).contiguous()
    return output, coded if coded is None else coded.view(batch, heads, length, -1)


def _arrangements(batch: int, kv_heads: int, ahead: Sequence[Tensor], summed: bool) -> tuple[Arrange, Arrange, Arrange]:
    """How operands of the two products lie: rows of query heads; keys; and values, with a column of ones if `summed`.

    Args:
        ahead: keys and values of a prefix, or nothing.
    """

    # One product for the query heads that share a key head: [B, H_kv, groups * S, D] x [B, H_kv, D, K].
    def rows(x: Tensor, _: int) -> Tensor:
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    def keys(x: Tensor, step: int) -> Tensor:
        return _behind(ahead[0], x, step) if ahead else x

    def values(x: Tensor, step: int) -> Tensor:
        x = _behind(ahead[1], x, step) if ahead else x
        # A column of ones sums the coded probabilities.
        return F.pad(x, (0, 1), value=float(step == 0)).mT if summed else x.mT

    return rows, keys, values


def _refuse_arguments(given: dict[str, Any]) -> None:
    for name in REFUSED:
        argument = given.get(name)
        if argument is not None:
            raise ConversionError(f"attention with {name}={argument!r} has no coded form: exclude the attention sites")


def _behind(prefix: Tensor, x: Tensor, step: int) -> Tensor:
    """The prefix `[H_kv, P, D]`, which is floating point and seen by every token, ahead of `x`."""
    ahead = prefix.to(x.dtype).expand(x.shape[0], -1, -1, -1)
    return torch.cat([ahead if step == 0 else torch.zeros_like(ahead), x], dim=2)


class Division(nn.Module):
    """Divides the output of attention by its last column, the sum of the coded weights."""

    def forward(self, output: Tensor) -> Tensor:
        """`[..., D + 1] -> [..., D]`."""
        return output[..., :-1] / output[..., -1:]


class Softmax(nn.Module):
    """Softmax over the last dimension, at least in float32; a module, so that an approximator can replace it."""

    def forward(self, scores: Tensor) -> Tensor:
        """`[..., K] -> [..., K]`."""
        return F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def plain_softmax(block: nn.Module) -> None:
    """Give an attention block the softmax that our attention calls, unless it has one."""
    if not hasattr(block, "softmax"):
        block.softmax = Softmax()


def _new_positions(length: int, total: int, mask: Tensor | None) -> slice | None:
    """Which keys are those of this call's `length` tokens: the last ones that the last token sees.

    A cache may hold more positions than are filled yet, so they need not be the last of all.
    """
    if total == length:
        return None
    end = total
    if mask is not None and mask.shape[-1] == total:
        # A row whose text has ended sees none of its own: the one that sees furthest says it.
        seen = (mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2).any(0)
        end = int(seen.nonzero().max()) + 1 if bool(seen.any()) else total
    return slice(end - length, end)


def _site(module: nn.Module, kind: str) -> Site | None:
    return getattr(module, f"{kind}_site", None)


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
