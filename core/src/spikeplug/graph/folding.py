"""Scales and shifts by constants, most of them batch norms, merged into the weighted layer ahead of or behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .builder import affine
from .capture import Captured, operands

TRANSPOSED = "conv_transpose"


def fold(captured: Captured) -> dict[str, str]:
    """Merge what can be merged, in place; return path and type of what was.

    The tensors of the network are left as they are: a merged layer has new ones.
    """
    folded: dict[str, str] = {}
    raw = _preprocessed(captured)
    for node in list(captured.graph.nodes):
        if node.target is not affine:
            continue
        before, users = node.args[0], list(node.users)
        if _is_weighted(before) and len(before.users) == 1 and _fold_behind(captured, before, node):
            node.replace_all_uses_with(before)
        elif (
            len(users) == 1 and node not in raw and _is_weighted(users[0]) and users[0].args[0] is node
            and _fold_ahead(captured, node, users[0])
        ):  # fmt: skip
            node.replace_all_uses_with(before)
        else:
            continue
        folded[node.meta["path"]] = node.meta["type"]
        captured.graph.erase_node(node)
    captured.drop_unread()
    return folded


def _preprocessed(captured: Captured) -> set[fx.Node]:
    """Arithmetic of the input with constants: it stays ahead of the code."""
    raw = set(captured.inputs)
    for node in captured.graph.nodes:
        inputs = [each for each in node.all_input_nodes if each.op != "get_attr" and each.meta["shape"] is not None]
        if (
            inputs
            and all(each in raw for each in inputs)
            and is_arithmetic(node, "affine" if node.target is affine else "")
        ):
            raw.add(node)
    return raw


def is_arithmetic(node: fx.Node, kind: str) -> bool:
    """Whether an operation is what networks do to their input ahead of everything else, and no layer of theirs."""
    name = str(node.target).split(".")
    plain = kind == "affine" or (len(name) > 1 and name[0] == "aten" and name[1] in ("mul", "div", "neg", "_to_copy"))
    return plain and kind not in ("product", "size") and not str(node.meta["type"]).startswith("BatchNorm")


def _is_weighted(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    name = str(node.target)
    weight = operands(node)[1] if name.startswith(("aten.linear.", "aten.conv")) else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _line(captured: Captured, node: fx.Node, channel: int) -> tuple[Tensor, Tensor] | None:
    """Scale and shift `[C]` or `[1]` of an affine node that differ along one dimension only, counted from the end."""
    found = []
    for name in node.args[1:3]:
        tensor = captured.tensors[str(name.target)].detach()  # type: ignore[union-attr]
        others = [size for dim, size in enumerate(tensor.shape) if dim - tensor.ndim != channel]
        if any(size != 1 for size in others):
            return None
        found.append(tensor.reshape(-1))
    return found[0], found[1]


def _channel(layer: fx.Node) -> int:
    """The dimension of a layer's channels, counted from the end."""
    return -1 if "linear" in str(layer.target) else 1 - len(layer.meta["shape"])


def _weights(captured: Captured, layer: fx.Node) -> tuple[Tensor, Tensor | None]:
    weight, bias = operands(layer)[1:3]
    return captured.tensors[weight.target].detach(), None if bias is None else captured.tensors[bias.target].detach()


def _fold_behind(captured: Captured, layer: fx.Node, node: fx.Node) -> bool:
    line = _line(captured, node, _channel(layer))
    if line is None:
        return False
    scale, shift = line
    weight, bias = _weights(captured, layer)
    outputs = int(layer.meta["shape"][_channel(layer)])
    with torch.no_grad():
        if TRANSPOSED in str(layer.target):  # [I, O / groups, ...]
            groups = operands(layer)[6]
            factor = scale.expand(outputs).reshape(groups, 1, -1)
            by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
            new = (by_group * factor.unsqueeze(-1)).reshape(weight.shape)
        else:
            new = weight * scale.expand(outputs).reshape(-1, *[1] * (weight.ndim - 1))
        moved = shift.expand(outputs) + (0 if bias is None else bias * scale)
    _put(captured, layer, new.to(weight.dtype), moved.to(weight.dtype))
    return True


def _fold_ahead(captured: Captured, node: fx.Node, layer: fx.Node) -> bool:
    """Ahead of a convolution with padding it cannot be: its shift is not what is padded."""
    name = str(layer.target)
    if TRANSPOSED in name or (name.startswith("aten.conv") and _padded(operands(layer)[4])):
        return False
    line = _line(captured, node, _channel(layer))
    if line is None:
        return False
    weight, bias = _weights(captured, layer)
    groups = operands(layer)[6] if name.startswith("aten.conv") else 1
    inputs = weight.shape[1] * groups
    with torch.no_grad():
        # Of every output and every input that it reads: [O, I / groups, 1, ...]
        shape = [*weight.shape[:2], *[1] * (weight.ndim - 2)]
        by_output = [
            each.expand(inputs).reshape(groups, -1).repeat_interleave(len(weight) // groups, 0).reshape(shape)
            for each in line
        ]
        moved = (weight * by_output[1]).flatten(1).sum(1)
        moved = moved if bias is None else bias + moved
        _put(captured, layer, (weight * by_output[0]).to(weight.dtype), moved.to(weight.dtype))
    return True


def _padded(padding: Any) -> bool:
    return padding != "valid" if isinstance(padding, str) else any(padding)


def _put(captured: Captured, layer: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Give a layer tensors of its own."""
    args = list(operands(layer))
    for index, tensor in ((1, weight), (2, bias)):
        name = f"{layer.meta['path']}.{('weight', 'bias')[index - 1]}"
        while name in captured.tensors:
            name += "_"
        captured.tensors[name] = tensor
        with captured.graph.inserting_before(layer):
            args[index] = captured.graph.create_node("get_attr", name)
        args[index].meta = {"path": name, "type": "get_attr", "shape": tuple(tensor.shape), "line": ""}
        args[index].meta |= {"dims": tuple(map(str, tensor.shape)), "dtype": tensor.dtype}
    layer.args, layer.kwargs = tuple(args), {}
