"""Everything that multiplies as one of two forms: a layer with constant weights, or a product of two activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .builder import Builder
from .capture import operands

aten = torch.ops.aten


def _matrix_product(builder: Builder, node: fx.Node) -> fx.Node | None:
    """A product with a constant matrix: a linear layer, on the last dimension or on the one before."""
    name = str(node.target).split(".")[1]
    bias, left, right = node.args if name == "addmm" else (None, *node.args[:2])
    if name == "addmm" and (node.kwargs or builder.known(bias) is None):
        return None
    if name == "matmul" and _dims(right) == 1 and _dims(left) > 1:
        column = builder.call(node, aten.unsqueeze.default, right, -1)
        return builder.call(node, aten.squeeze.dim, builder.call(node, aten.matmul.default, left, column), -1)
    w = builder.known(right)
    if w is not None and w.ndim == 2 and builder.known(left) is None:
        weight = builder.constant(node, f"{_named(right)}.transposed", w.mT)
        return builder.call(node, aten.linear.default, left, weight, *([] if bias is None else [bias]))
    w = builder.known(left)
    assert isinstance(right, fx.Node)
    if w is None or w.ndim != 2 or bias is not None or right.meta["val"].ndim < 2:
        return None
    turned = builder.call(node, aten.transpose.int, right, -2, -1)
    return builder.call(node, aten.transpose.int, builder.call(node, aten.linear.default, turned, left), -2, -1)


def _dims(node: Any) -> int:
    return int(node.meta["val"].ndim)


def _named(node: Any) -> str:
    return str(node.target) if isinstance(node, fx.Node) else "constant"


def _linear(builder: Builder, node: fx.Node) -> fx.Node | None:
    """A linear layer whose weight is an activation: a product of two activations."""
    x, weight, bias = operands(node)
    if builder.known(weight) is not None:
        return None
    product = builder.call(node, aten.matmul.default, x, builder.call(node, aten.transpose.int, weight, -2, -1))
    return product if bias is None else builder.call(node, aten.add.Tensor, product, bias)


def _added_product(builder: Builder, node: fx.Node) -> fx.Node | None:
    """`baddbmm`, and `addmm` of two activations."""
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    added, left, right = node.args[:3]
    product = builder.call(node, aten.matmul.default, left, right)
    if alpha != 1:
        product = builder.call(node, aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    if beta != 1:
        added = builder.call(node, aten.mul.Tensor, added, beta)
    return builder.call(node, aten.add.Tensor, added, product)


def _addmm(builder: Builder, node: fx.Node) -> fx.Node | None:
    if any(builder.known(each) is not None for each in node.args[1:3]):
        return _matrix_product(builder, node)
    return _added_product(builder, node)


def _glu(builder: Builder, node: fx.Node) -> fx.Node | None:
    x, dim = operands(node)
    half = node.meta["val"].shape[dim]
    if not isinstance(half, int):
        return None
    value = builder.call(node, aten.slice.Tensor, x, dim, 0, half)
    gate = builder.call(node, aten.sigmoid.default, builder.call(node, aten.slice.Tensor, x, dim, half, 2 * half))
    return builder.call(node, aten.mul.Tensor, value, gate)


def _attention(builder: Builder, node: fx.Node) -> fx.Node | None:
    """Scaled dot-product attention as its two products and the softmax between them."""
    query, key, value, mask, _, causal = operands(node)[:6]
    scale, grouped = node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)
    if scale is None:
        width = query.meta["val"].shape[-1]
        if not isinstance(width, int):
            return None  # a number would be made of a size, and fix it
        scale = float(width) ** -0.5
    if grouped:
        groups = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key, value = (builder.call(node, aten.repeat_interleave.self_int, each, groups, -3) for each in (key, value))
    turned = builder.call(node, aten.transpose.int, key, -2, -1)
    scores = builder.call(node, aten.mul.Tensor, builder.call(node, aten.matmul.default, query, turned), scale)
    if causal:
        rows, columns = (builder.call(node, aten.sym_size.int, each, -2) for each in (query, key))
        ones = builder.call(node, aten.new_ones.default, scores, [rows, columns], dtype=torch.bool)
        below = builder.call(node, aten.tril.default, ones)
        scores = builder.call(node, aten.where.ScalarOther, below, scores, float("-inf"))
    if mask is not None:
        if mask.meta["val"].dtype == torch.bool:
            scores = builder.call(node, aten.where.ScalarOther, mask, scores, float("-inf"))
        else:
            scores = builder.call(node, aten.add.Tensor, scores, mask)
    softmax = aten.softmax.int if mask is None else aten._safe_softmax.default  # a row may be masked whole
    probabilities = builder.call(node, softmax, scores, -1)
    return builder.call(node, aten.matmul.default, probabilities, value)


def _einsum(builder: Builder, node: fx.Node) -> fx.Node | None:
    """A sum over products of two tensors as a product of matrices."""
    equation = str(node.args[0]).replace(" ", "")
    tensors: Any = node.args[1]
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    if "." in equation or len(letters) != 2 or any(len(set(each)) != len(each) for each in (*letters, result)):
        return None
    a, b = letters
    result = result if arrow else "".join(sorted(each for each in set(a + b) if (a + b).count(each) == 1))
    shared = [each for each in a if each in b]
    batch, summed = [x for x in shared if x in result], [x for x in shared if x not in result]
    left, right = [x for x in a if x not in b], [x for x in b if x not in a]
    if any(each not in result for each in (*left, *right)):
        return None
    # A size of 1 is repeated along the other tensor's.
    ones = [
        {x for x, size in zip(word, t.meta["val"].shape, strict=True) if size == 1}
        for word, t in zip(letters, tensors, strict=True)
    ]
    if (ones[0] ^ ones[1]) & set(shared):
        return _broadcast(builder, node, letters, tensors, ones)
    sizes = {
        letter: builder.call(node, aten.sym_size.int, tensor, dim)
        for word, tensor in zip(letters, tensors, strict=True)
        for dim, letter in enumerate(word)
    }

    def matrix(tensor: fx.Node, word: str, groups: tuple[list[str], ...]) -> fx.Node:
        order = [word.index(letter) for group in groups for letter in group]
        known = builder.known(tensor)
        if known is not None:
            lengths = [math.prod(known.shape[word.index(x)] for x in group) for group in groups[1:]]
            flat = known.detach().permute(order).reshape(*(known.shape[word.index(x)] for x in groups[0]), *lengths)
            return builder.constant(node, f"{node.name}.matrix", flat)
        turned = builder.call(node, aten.permute.default, tensor, order)
        shape = [*(sizes[x] for x in groups[0]), *(_size(builder, node, [sizes[x] for x in g]) for g in groups[1:])]
        return builder.call(node, aten.reshape.default, turned, shape)

    one, other = tensors
    product = builder.call(
        node, aten.matmul.default,
        matrix(one, a, (batch, left, summed)), matrix(other, b, (batch, summed, right)),
    )  # fmt: skip
    linear = _matrix_product(builder, product)
    product = product if linear is None else linear
    order = [*batch, *left, *right]
    product = builder.call(node, aten.reshape.default, product, [sizes[letter] for letter in order])
    return builder.call(node, aten.permute.default, product, [order.index(letter) for letter in result])


def _broadcast(builder: Builder, node: fx.Node, words: Sequence[str], tensors: Any, ones: Any) -> fx.Node | None:
    """The same sum with sizes of 1 written out as those of the other tensor."""
    wide = []
    for index, (word, tensor) in enumerate(zip(words, tensors, strict=True)):
        other, lengths = words[1 - index], []
        for letter in word:
            longer = letter in ones[index] and letter in other and letter not in ones[1 - index]
            source, dim = (tensors[1 - index], other.index(letter)) if longer else (tensor, word.index(letter))
            lengths.append(builder.call(node, aten.sym_size.int, source, dim))
        wide.append(builder.call(node, aten.expand.default, tensor, lengths))
    return _einsum(builder, builder.call(node, aten.einsum.default, node.args[0], wide))


def _size(builder: Builder, node: fx.Node, sizes: Sequence[fx.Node]) -> Any:
    total: Any = 1
    for size in sizes:
        total = size if total == 1 else builder.call(node, operator.mul, total, size)
    return total


MULTIPLICATIONS: dict[str, Callable[[Builder, fx.Node], fx.Node | None]] = {
    **dict.fromkeys(("aten.mm.default", "aten.matmul.default"), _matrix_product),
    "aten.linear.default": _linear,
    "aten.einsum.default": _einsum,
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _added_product,
    "aten.glu.default": _glu,
    "aten.scaled_dot_product_attention.default": _attention,
}
"""ATen operation -> what writes it in the one form."""
