"""Operations on two activations, or on none of the linear kind, step by step (MGPC, appendix B).

An activation comes as the contributions `X(t) = scale * d(t) * s(t)` of its T steps, whose sum is its decoded value.
Each function gives the contributions of the result, whose sum is the fused result.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikeplug.coding.site import Site
from spikeplug.coding.types import CodeParams, Encoder


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


def _whole(x: Tensor, step: int) -> Tensor:
    return x


def _turned(x: Tensor, step: int) -> Tensor:
    return x.mT


class Operand(NamedTuple):
    """One operand of a product of activations.

    Attributes:
        site: where it is coded; None: it is not.
        shaped: how a tensor enters the product, and of which step; what is added to the operand, as a prefix is, comes
            with step 0.
        new: as of `Site.forward`.
    """

    site: Site | None
    x: Tensor
    shaped: Callable[[Tensor, int], Tensor] = _whole
    new: slice | None = None

    def coded(self) -> Tensor:
        """Its decoded value, shaped."""
        x = self.x if self.site is None else self.site(self.x, self.new)
        return self.shaped(x, 0)

    def steps(self, p: CodeParams, spikes: Iterator[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """Contributions of the steps, shaped."""
        assert self.site is not None
        for step, worth in enumerate(contributions(self.site.encoder, p, spikes)):
            yield self.shaped(worth.to(dtype), step)


Combine = Callable[[Iterator[Tensor], Iterator[Tensor]], Iterator[Tensor]]


def stepped_product(a: Operand, b: Operand, combine: Combine) -> Tensor | None:
    """A product of two activations by their spikes; None where one is not carried by spikes, or gradients stream."""
    first, second = a.site, b.site
    if first is None or second is None or not (first.steps_now and second.steps_now):
        return None
    if torch.is_grad_enabled() and (a.x.requires_grad or b.x.requires_grad):
        return None

    def multiply(p: CodeParams, spikes: Iterator[Tensor], q: CodeParams, others: Iterator[Tensor]) -> Tensor:
        dtype = functools.reduce(torch.promote_types, (a.x.dtype, b.x.dtype, p.scale.dtype, q.scale.dtype))
        parts = combine(a.steps(p, spikes, dtype), b.steps(q, others, dtype))
        total = next(parts)
        for each in parts:
            total += each
        return total

    total: Tensor = first(a.x, a.new, lambda p, spikes: second(b.x, b.new, functools.partial(multiply, p, spikes)))
    return total.to(a.x.dtype)


def matrix_product_of(a: Operand, b: Operand) -> tuple[Tensor, Tensor | None]:
    """`A Bᵀ` of two operands; and A, coded, where it was decoded."""
    total = stepped_product(a, b, matrix_product)
    if total is not None:
        return total, None
    coded, other = a.coded(), b.coded()
    return torch.matmul(coded.to(other.dtype), other.mT), coded


class Product(nn.Module):
    """A product of two activations that spikes carry: of matrices, or element by element.

    Fused, it is that of the decoded values; stepped, every step's spikes meet the sums of the other's (Eq. 51 and 55).

    Args:
        op: `matmul` or `mul`.
    """

    _sites: tuple[Site | None, Site | None]

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self._sites = op, (None, None)

    def extra_repr(self) -> str:
        return self.op

    @property
    def sites(self) -> tuple[Site | None, Site | None]:
        """Where its operands are coded."""
        return self._sites

    def attach(self, left: Site | None, right: Site | None) -> None:
        """Receive the spikes of two sites."""
        # A tuple hides the sites from nn.Module's registration: they may be those of a layer.
        self._sites = (left, right)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`, or `a * b`."""
        left, right = self._sites
        if self.op == "matmul":
            return matrix_product_of(Operand(left, a), Operand(right, b, _turned))[0]
        one, other = Operand(left, a), Operand(right, b)
        total = stepped_product(one, other, lambda x, y: hadamard(list(x), list(y)))
        return one.coded() * other.coded() if total is None else total
