"""A converted network while it is put together: its graph, the kind of every operation, and modules at their paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikeplug.config import ConversionConfig

from .capture import Captured, operands
from .operations import Kind, activations, kinds, labels_of

STRUCTURAL = ("input", "output", "size")
"""Kinds of what is no operation on activations."""


class Tree(nn.Module):
    """Holds modules and tensors at paths."""

    def place(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds a path, and the last name of it; what is missing on the way is made."""
        *above, last = path.split(".")
        holder: nn.Module = self
        for name in above:
            if name not in holder._modules:
                holder.add_module(name, Tree())
            holder = holder._modules[name]  # type: ignore[assignment]
        return holder, last

    def taken(self, path: str) -> bool:
        """Whether something is at a path already."""
        holder: Any = self
        for name in path.split("."):
            known = (
                {**holder._modules, **holder._parameters, **holder._buffers} if isinstance(holder, nn.Module) else {}
            )
            if name not in known:
                return False
            holder = known[name]
        return True


class Draft:
    """A network while it is put together.

    Attributes:
        graph: a copy of the captured graph, which grows.
        kinds: of every node.
        root: holds the modules that the graph calls, and its tensors, by their paths.
        stored: name of every captured tensor -> where it lies in `root`.
        decoded: path of every product of two trains -> the sites whose spikes it receives.
        by_sample: whether every operation does the same to every sample, whatever the others are.
    """

    def __init__(self, captured: Captured, config: ConversionConfig) -> None:
        self.captured, self.config = captured, config
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(captured.graph, copies)
        self.graph.output(result)
        known = kinds(captured)
        self.kinds = {copies[node]: kind for node, kind in known.items() if node in copies}
        self.end = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        original = next(node for node in reversed(captured.graph.nodes) if node.op == "output")
        self.kinds[self.end], self.end.meta = Kind("output", "output"), dict(original.meta)
        self.root = Tree()
        self.stored: dict[str, str] = {}
        self.decoded: dict[str, tuple[str, ...]] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self.by_sample = all(keeps_rows(node, self) for node in self.graph.nodes if self._acts(node))

    def _acts(self, node: fx.Node) -> bool:
        """Whether an operation works on what depends on the input, its masks and indices among it."""
        if self.kinds[node].kind in ("input", "output", "lookup") or node.meta["shape"] is None:
            return False
        return any(each.op != "get_attr" for each in node.all_input_nodes)

    def path(self, node: fx.Node) -> str:
        """Unique name of an operation."""
        return str(node.meta["path"])

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def of_kind(self, *wanted: str) -> list[fx.Node]:
        """Nodes of these kinds, in order."""
        return [node for node in self.graph.nodes if self.kinds[node].kind in wanted]

    def activations(self, node: fx.Node) -> list[fx.Node]:
        """The activations among the inputs of an operation."""
        return activations(node, self.kinds)

    def tensor(self, node: Any) -> Tensor | None:
        """The captured tensor that a node names."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.captured.tensors[str(node.target)]
        return None

    def excluded(self, node: fx.Node, *labels: str) -> bool:
        """Whether an operation stays dense, as the configuration says."""
        return self.config.excludes(self.path(node), *(labels or self.labels(node)))

    def labels(self, node: fx.Node) -> tuple[str, ...]:
        """The words by which `include` and `exclude` name an operation."""
        kind = self.kinds[node]
        if kind.kind == "weighted":
            return ("input",)
        if kind.kind == "nonlinear":
            return labels_of(kind.op)
        if kind.kind == "product":
            return ("product", "attention") if kind.op == "matmul" else ("product",)
        return () if kind.kind in STRUCTURAL else (kind.kind,)

    def free(self, path: str) -> str:
        """A path for a module of ours: this one, with `_` behind it where something is there."""
        while self.root.taken(path):
            path += "_"
        return path

    def add(self, path: str, module: nn.Module) -> None:
        """Put a module at a path."""
        holder, last = self.root.place(path)
        holder.add_module(last, module)

    def call(
        self, module_path: str, args: tuple[Any, ...], kind: Kind, like: fx.Node, path: str | None = None
    ) -> fx.Node:
        """Call a module; the graph's insert point says where."""
        node = self.graph.call_module(module_path, args)
        self.kinds[node] = kind
        node.meta = {**like.meta, "path": path or module_path, "type": kind.type}
        return node

    def swap(self, node: fx.Node, module: nn.Module, args: tuple[Any, ...], kind: Kind | None = None) -> fx.Node:
        """Call a module at the path of an operation, in its place."""
        path = self.path(node)
        where = path if not self.root.taken(path) else self.free(path)
        self.add(where, module)
        with self.graph.inserting_before(node):
            new = self.call(where, args, kind or self.kinds[node], node, path)
        self.replace(node, new)
        return new

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let everything that reads a node read another."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)
        del self.kinds[node]

    def parameter(self, name: str) -> nn.Parameter | Tensor:
        """A captured tensor as a parameter of the new network: its own object, but the same memory."""
        tensor = self.captured.tensors[name]
        if not tensor.is_floating_point():
            return tensor
        if id(tensor) not in self._parameters:
            trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            folded = not isinstance(tensor, nn.Parameter) and name.rpartition(".")[2].strip("_") in ("weight", "bias")
            self._parameters[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=trained or folded)
        return self._parameters[id(tensor)]

    def weigh(self, node: fx.Node) -> nn.Module:
        """The dense layer of PyTorch that an operation is, with its weights, at the operation's path."""
        layer = dense_layer(node, self.tensor)
        path = self.free(self.path(node))
        for index, name in ((1, "weight"), (2, "bias")):
            argument = operands(node)[index]
            if argument is not None:
                setattr(layer, name, self.parameter(str(argument.target)))
                self.stored.setdefault(str(argument.target), f"{path}.{name}")
        self.add(path, layer)
        with self.graph.inserting_before(node):
            new = self.call(path, (node.args[0],), self.kinds[node], node, self.path(node))
        self.replace(node, new)
        return layer

    def _stored(self, name: str) -> str:
        """Where a captured tensor lies; it is put in place where it does not."""
        if name not in self.stored:
            self.stored[name] = self.free(name)
            holder, last = self.root.place(self.stored[name])
            value = self.parameter(name)
            if isinstance(self.captured.tensors[name], nn.Parameter):
                holder.register_parameter(last, value)  # type: ignore[arg-type]
            else:
                holder.register_buffer(last, value.detach())
        return self.stored[name]

    def finish(self) -> None:
        """Put the tensors that are left in place and drop what nobody reads."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
                self.kinds.pop(node, None)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                node.target = self._stored(str(node.target))
        # Modules of ours hold the others.
        held = {id(each): name for name, each in [*self.root.named_parameters(), *self.root.named_buffers()]}
        for name in self.captured.tensors:
            if name not in self.stored:
                known = id(self.parameter(name))
                self.stored[name] = held[known] if known in held else self._stored(name)
        self.graph.lint()  # type: ignore[no-untyped-call]


def keeps_rows(node: fx.Node, draft: Draft) -> bool:
    """Whether an operation does the same to every row of its first dimension, and says no number of rows elsewhere."""
    dims = node.meta["dims"]
    tensors = [each for each in node.all_input_nodes if each.op != "get_attr" and each.meta["shape"] is not None]
    inputs = [each.meta["dims"] for each in tensors]
    if not dims or not inputs or not all(each and each[0] == dims[0] for each in inputs):
        return False
    if not dims[0].isdigit() and any(re.search(rf"\b{re.escape(dims[0])}\b", each) for each in dims[1:]):
        return False
    if draft.kinds[node].kind in ("other", "recurrent") or draft.kinds[node].op == "batchnorm":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    said = {argument.name: value for argument, value in zip(schema.arguments, operands(node), strict=True)}
    indices = said.get("indices")
    if (indices and indices[0] is not None) or not _within_rows(str(node.target), said, len(inputs[0])):
        return False
    return _spares_rows(
        str(node.target), {name: each for name, each in said.items() if _says_dims(name, each)}, len(inputs[0])
    )


def _says_dims(name: str, value: Any) -> bool:
    """Whether an argument of that name says dimensions."""
    named = "dim" in name or "axis" in name or name in ("source", "destination")
    return named and value is not None and not isinstance(value, bool)


def _within_rows(name: str, said: dict[str, Any], size: int) -> bool:
    """Whether an operation that names no dimensions leaves the first one out, of as many as its input has."""
    word = name.removeprefix("aten.").partition(".")[0]
    if word == "as_strided" or (word in ("tril", "triu") and size <= 2):
        return False
    if "pad" in said and any(said["pad"][2 * size - 2 : 2 * size]):
        return False
    return len(said.get("normalized_shape") or ()) < size


def _spares_rows(name: str, said: dict[str, Any], size: int) -> bool:
    """Whether an operation names no first dimension among its own; of a permutation, whether that stays first."""
    for value in said.values():
        dims = [value] if isinstance(value, int) else list(value)
        if "permute" in name:
            return bool(dims) and dims[0] % size == 0
        if not dims or any(isinstance(dim, int) and dim % size == 0 for dim in dims):
            return False
    return True


def dense_layer(node: fx.Node, tensor: Callable[[Any], Tensor | None]) -> nn.Module:
    """The layer of PyTorch that an operation is, its parameters still to be given."""
    args, name = operands(node), str(node.target).split(".")[1]
    weight = tensor(args[1])
    assert weight is not None
    bias = args[2] is not None
    dims, shape = weight.ndim - 2, tuple(weight.shape[2:])
    with torch.device("meta"):
        if name == "linear":
            return nn.Linear(weight.shape[1], weight.shape[0], bias)
        if name.startswith("conv_transpose"):
            stride, padding, more, groups, dilation = args[3:8]
            cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
            given: list[Any] = [_each(value, dims) for value in (stride, padding, more)]
            sizes = (len(weight), weight.shape[1] * groups, shape)
            turned: nn.Module = cls(*sizes, *given, groups, bias, _each(dilation, dims))
            return turned
        stride, padding, dilation, groups = args[3:7]
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        padding = padding if isinstance(padding, str) else _each(padding, dims)
        given = [_each(stride, dims), padding, _each(dilation, dims)]
        layer: nn.Module = cls(weight.shape[1] * groups, len(weight), shape, *given, groups, bias)
    return layer


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)
