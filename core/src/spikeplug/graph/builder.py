"""What rewrites of a captured graph are made with."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from .capture import Captured

aten = torch.ops.aten


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`scale * x + shift`; both broadcast against `x` and do not enlarge it."""
    return x * scale + shift


class Builder:
    """Adds operations to a captured graph, each with the shape of what it gives."""

    def __init__(self, captured: Captured) -> None:
        self.captured, self.graph = captured, captured.graph
        self.fake = detect_fake_mode([node.meta.get("val") for node in self.graph.nodes])

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """An operation ahead of `like`, whose place in the source it has."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**like.meta}
        values, named = fx.node.map_arg((args, kwargs), lambda each: each.meta["val"])
        assert self.fake is not None
        free = self.fake.shape_env.suppress_guards() if self.fake.shape_env else contextlib.nullcontext()
        # No size may be fixed by what is asked here.
        with self.fake, torch.no_grad(), free:
            node.meta["val"] = target(*values, **named)
        return node

    def constant(self, like: fx.Node, name: str, tensor: Tensor) -> fx.Node:
        """A tensor of ours ahead of `like`."""
        tensors = self.captured.tensors
        free = name
        while free in tensors and tensors[free] is not tensor:
            free += "_"
        tensors[free] = tensor
        with self.graph.inserting_before(like):
            node = self.graph.create_node("get_attr", free)
        assert self.fake is not None
        node.meta = {"val": self.fake.from_tensor(tensor, static_shapes=True)}
        return node

    def known(self, node: Any) -> Tensor | None:
        """The tensor that a node names; None: it is none."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.captured.tensors[str(node.target)]
        return None

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let everything that reads a node read another."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)


def sizes_of(node: fx.Node) -> tuple[str, ...]:
    """Sizes of what an operation gives, as text: to ask whether two of them are equal numbers would fix them."""
    return tuple(str(size) for size in node.meta["val"].shape)


def function_of(node: fx.Node) -> str:
    """What the function of an operation is called."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return "batch_norm" if "batch_norm" in str(name) else str(name).lstrip("_")
