"""One form for what can be written in several ways, so that each kind of operation is understood once.

Operations of constants are computed; batch norms and arithmetic with constants become `affine`; matrix products with a
constant become `linear`; attention and gated linear units are taken apart; what does nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spikeplug.errors import ConversionError

from .builder import Builder, affine, function_of, sizes_of
from .capture import Captured, evaluate, is_random, operands
from .multiplications import MULTIPLICATIONS

aten = torch.ops.aten


def normalize(captured: Captured) -> None:
    """Bring a captured graph into the one form, in place.

    Raises:
        ConversionError: it draws random numbers.
    """
    builder = Builder(captured)
    _fold_constants(builder)
    for node in list(captured.graph.nodes):
        rewrite = REWRITES.get(str(node.target)) if node.op == "call_function" else None
        # What a rewrite puts in is in its form already.
        new = rewrite(builder, node) if rewrite is not None else None
        if new is not None:
            builder.replace(node, new)
    captured.drop_unread()


def _fold_constants(builder: Builder) -> None:
    """Compute what does not depend on the input, its sizes among it."""
    known: dict[fx.Node, Any] = {}
    for node in list(builder.graph.nodes):
        if node.op == "get_attr":
            known[node] = builder.captured.tensors[str(node.target)]
        elif node.op == "call_function" and all(each in known for each in node.all_input_nodes):
            if is_random(node):
                raise ConversionError(
                    f"{builder.captured.name} draws random numbers ({node.target}): its results are not those of its "
                    "input alone, so it has no spiking form"
                )
            known[node] = evaluate(node, known)
    for node, value in known.items():
        for user in [each for each in node.users if each not in known]:
            _insert(builder, user, node, value)
    for node in reversed(known):
        if not node.users:
            builder.graph.erase_node(node)


def _insert(builder: Builder, user: fx.Node, node: fx.Node, value: Any) -> None:
    """Give an operation the value of one of its inputs, which is a constant."""
    if isinstance(value, Tensor):
        if node.op != "get_attr":
            user.replace_input_with(node, builder.constant(user, f"constant_{node.name}", value))
        return

    def replaced(each: fx.Node) -> Any:
        return value if each is node else each

    user.args, user.kwargs = fx.node.map_arg(user.args, replaced), fx.node.map_arg(user.kwargs, replaced)


def _same(builder: Builder, node: fx.Node) -> fx.Node | None:
    """What gives back its first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _whole_slice(builder: Builder, node: fx.Node) -> fx.Node | None:
    x, _, start, end, step = operands(node)
    whole = start in (None, 0) and (end is None or (isinstance(end, int) and end >= 2**62)) and step == 1
    return x if whole else None


def _converted(builder: Builder, node: fx.Node) -> fx.Node | None:
    """A change of dtype; none where it has that dtype already. The device is that of the network."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    dtype = node.meta["val"].dtype  # also of `type_as`, which names a tensor
    if first.meta["val"].dtype == dtype:
        return first
    return builder.call(node, aten._to_copy.default, first, dtype=dtype)


def _reshaped(builder: Builder, node: fx.Node) -> fx.Node | None:
    # The same where memory lies in order, as it does in dense networks and does not in spike trains.
    return builder.call(node, aten.reshape.default, *node.args)


def _parts(builder: Builder, node: fx.Node) -> fx.Node | None:
    """Parts of a tensor, one by one: slices where they are cut, selections where they are single."""
    x, size, dim = (*operands(node), 0)[:3]
    if str(node.target).startswith("aten.unbind"):
        size, dim = None, size
    start: Any = 0
    values = node.meta["val"]
    for index, value in enumerate(values):
        readers = [user for user in node.users if user.args[1] == index]
        for reader in readers:
            if size is None:
                part = builder.call(reader, aten.select.int, x, dim, index)
            else:
                width = size[index] if isinstance(size, (list, tuple)) else size
                if not isinstance(width, int) or not isinstance(start, int):
                    return None
                part = builder.call(reader, aten.slice.Tensor, x, dim, start, start + width)
            builder.replace(reader, part)
        start = start + value.shape[dim] if size is not None and isinstance(value.shape[dim], int) else start
    return None


def _first_of_pool(builder: Builder, node: fx.Node) -> fx.Node | None:
    """Max pooling whose indices nobody reads."""
    target = str(node.target)
    if any(user.args[1] != 0 for user in node.users):
        return None
    plain = {"aten.max_pool2d_with_indices.default": aten.max_pool2d.default}.get(target)
    if target == "aten.max_pool3d_with_indices.default":
        plain = aten.max_pool3d.default
    for user in list(node.users):
        if plain is not None:
            builder.replace(user, builder.call(user, plain, *node.args, **node.kwargs))
    return None


def _norm(builder: Builder, node: fx.Node) -> fx.Node | None:
    """A batch norm with running statistics: a scale and a shift per channel."""
    x, weight, bias, mean, var = node.args[:5]
    eps = node.args[6] if "batch_norm" in str(node.target) else node.args[7]
    return _channelwise(builder, node, x, [builder.known(each) for each in (weight, bias, mean, var)], float(eps))  # type: ignore[arg-type]


def _batch_norm(builder: Builder, node: fx.Node) -> fx.Node | None:
    new = _norm(builder, node)
    for user in list(node.users):
        if new is not None and user.args[1] == 0:
            builder.replace(user, new)
    return None


def _instance_norm(builder: Builder, node: fx.Node) -> fx.Node | None:
    return None if node.args[5] else _norm(builder, node)


def _channelwise(builder: Builder, node: fx.Node, x: Any, known: Sequence[Tensor | None], eps: float) -> fx.Node | None:
    weight, bias, mean, var = known
    if mean is None or var is None:
        return None
    shape = [-1, *[1] * (x.meta["val"].ndim - 2)]
    with torch.no_grad():
        scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        scale, shift = scale.to(mean.dtype).reshape(shape), shift.to(mean.dtype).reshape(shape)
    return _affine(builder, node, x, scale, shift)


def _affine(builder: Builder, node: fx.Node, x: fx.Node, scale: Tensor, shift: Tensor) -> fx.Node:
    names = (f"{node.name}.scale", f"{node.name}.shift")
    tensors = [builder.constant(node, name, tensor) for name, tensor in zip(names, (scale, shift), strict=True)]
    new = builder.call(node, affine, x, *tensors)
    new.meta["function"] = function_of(node)
    return new


def _arithmetic(builder: Builder, node: fx.Node) -> fx.Node | None:
    """Arithmetic with a constant tensor, or the addition of a number: affine."""
    name = str(node.target).split(".")[1]
    left, right = node.args[0], node.args[1]
    x = left if builder.known(left) is None else right
    other = right if x is left else left
    if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], Tensor) or not x.meta["val"].is_floating_point():
        return None
    number = other if isinstance(other, (int, float)) and not isinstance(other, bool) else None
    tensor = builder.known(other)
    if (number is None and tensor is None) or (number is not None and name in ("mul", "div")):
        return None  # of two activations; or by a number, which is linear as it is
    dtype = x.meta["val"].dtype
    if tensor is not None and (
        tensor.ndim > x.meta["val"].ndim or not tensor.is_floating_point() or tensor.dtype != dtype
    ):
        return None
    c = torch.tensor(float(number), dtype=dtype) if number is not None else tensor
    assert c is not None
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if not isinstance(alpha, (int, float)) or sizes_of(node) != sizes_of(x):
        return None
    with torch.no_grad():
        one, zero = torch.ones_like(c), torch.zeros_like(c)
        first = x is left
        if name == "add":
            scale, shift = (one, c * alpha) if first else (one * alpha, c)
        elif name == "sub":
            scale, shift = (one, -c * alpha) if first else (-one * alpha, c)
        elif name == "rsub":
            scale, shift = -one * alpha, c
        elif name == "mul":
            scale, shift = c.detach(), zero
        elif name == "div" and first:
            scale, shift = 1 / c, zero
        else:
            return None
    return _affine(builder, node, x, scale, shift)


REWRITES: dict[str, Callable[[Builder, fx.Node], fx.Node | None]] = {
    **dict.fromkeys(
        (
            *("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"),
            *("aten.clone.default", "aten.detach.default", "aten.alias.default", "aten.contiguous.default"),
            *("aten.lift_fresh_copy.default", "aten.detach_copy.default"),
        ),
        _same,
    ),
    "aten.slice.Tensor": _whole_slice,
    **dict.fromkeys(
        ("aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.type_as.default"), _converted
    ),
    **dict.fromkeys(("aten.view.default", "aten._unsafe_view.default"), _reshaped),
    **dict.fromkeys(
        ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int", "aten.split.sizes"), _parts
    ),
    "aten.max_pool2d_with_indices.default": _first_of_pool,
    "aten.max_pool3d_with_indices.default": _first_of_pool,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.instance_norm.default": _instance_norm,
    **dict.fromkeys(
        (
            *("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar"),
            *("aten.mul.Tensor", "aten.div.Tensor"),
        ),
        _arithmetic,
    ),
    **MULTIPLICATIONS,
}
"""ATen operation -> what writes it in the one form: the new operation, or None where it stays or was dealt with."""
