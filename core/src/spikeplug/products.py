"""Operations on two activations, or on none of the linear kind, step by step (MGPC, appendix B).

An activation comes as the contributions `X(t) = scale * d(t) * s(t)` of its T steps, whose sum is its decoded value.
Each function gives the contributions of the result, whose sum is the fused result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from spikeplug.types import CodeParams, Encoder


def contributions(encoder: Encoder, p: CodeParams, spikes: Iterable[Tensor]) -> Iterator[Tensor]:
    """What the spikes of every step are worth, T tensors `[*S]`; a code's offset comes with the first step."""
    for step, (d, s) in enumerate(zip(encoder.weights(p).tolist(), spikes, strict=True)):
        dtype = torch.promote_types(s.dtype, p.scale.dtype)
        worth = s.to(dtype) * (d * p.scale.to(dtype))
        yield worth if step else worth + p.offset.to(dtype)


def matrix_product(q: Iterable[Tensor], k: Iterable[Tensor]) -> Iterator[Tensor]:
    """`Q Kᵀ` step by step (Eq. 51): `S_Q(t) K(t)ᵀ + Q(t) S_K(t)ᵀ - Q(t) K(t)ᵀ`, S the sums up to step t.

    Args:
        q, k: tensors `[..., S, D]` and `[..., K, D]`, one a step; the shorter window is silent afterwards.
    """
    sum_q = sum_k = torch.zeros(())
    for step, (now_q, now_k) in enumerate(itertools.zip_longest(q, k)):
        if step == 0:
            sum_q, sum_k = now_q, now_k
            yield now_q @ now_k.mT
        elif now_k is None:
            yield now_q @ sum_k.mT
        elif now_q is None:
            yield sum_q @ now_k.mT
        else:
            # S_Q(t) K(t)ᵀ - Q(t) K(t)ᵀ is the sum up to the step before, times K(t)ᵀ: one product less.
            before, sum_q, sum_k = sum_q, sum_q + now_q, sum_k + now_k
            yield before @ now_k.mT + now_q @ sum_k.mT


def hadamard(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterator[Tensor]:
    """`A ⊙ B` step by step (Eq. 55), `A(t) ⊙ B(t) + sum_{i≠t} (A(t) ⊙ B(i) + A(i) ⊙ B(t)) / 2`.

    Both whole windows must have come: a step needs those after it. The sum over i closes to `(A(t) B + A B(t)) / 2`.
    """
    whole_a, whole_b = torch.stack(list(a)).sum(0), torch.stack(list(b)).sum(0)
    for now_a, now_b in zip(a, b, strict=True):
        yield (now_a * whole_b + whole_a * now_b) / 2


def accumulated(function: Callable[[Tensor], Tensor], x: Iterable[Tensor]) -> Iterator[Tensor]:
    """`φ(X)` of softmax, RMSNorm, SiLU, ... step by step (Eq. 52-54): `φ(S(t)) - φ(S(t - 1))`, the first whole."""
    total, before = torch.zeros(()), torch.zeros(())
    for now in x:
        total = total + now
        value = function(total)
        yield value - before
        before = value
