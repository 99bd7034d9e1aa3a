"""A captured graph as data for JSON, and back; operations are looked up among known ones, and nothing is called."""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from spikeplug.errors import BundleError

from .builder import affine
from .capture import Captured
from .describe import KEPT
from .guards import Guard
from .operations import name_of, registry
from .structure import Signature, Structure

SIZES = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")
} | {f"operator.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not")}
"""Arithmetic of sizes."""

TYPES = {
    str(each): each
    for each in vars(torch).values()
    if isinstance(each, (torch.dtype, torch.layout, torch.memory_format))
}
"""Dtypes, layouts and memory formats by their names."""


def to_json(captured: Captured) -> dict[str, Any]:
    """What `of_json` reads, without the tensors.

    Raises:
        BundleError: an operation is known to no plugin, so that it could not be read again.
    """
    nodes = []
    for node in captured.graph.nodes:
        if not storable(node):
            raise BundleError(
                f"operation '{node.meta['path']}' ({node.target}) cannot be stored: no plugin gives it a role"
            )
        target = name_of(node) if node.op == "call_function" else str(node.target)
        meta = {key: _value(node.meta[key]) for key in KEPT}
        data = {"op": node.op, "name": node.name, "target": target, "args": _value(node.args), "meta": meta}
        nodes.append(
            data | ({"kwargs": {key: _value(value) for key, value in node.kwargs.items()}} if node.kwargs else {})
        )
    return {
        "name": captured.name,
        "signature": captured.signature.to_json(),
        "outputs": captured.outputs.to_json(),
        "batch": captured.batch,
        "samples": captured.samples,
        "guards": [guard.to_json() for guard in captured.guards],
        "nodes": nodes,
    }


def of_json(data: Mapping[str, Any], tensors: dict[str, Tensor]) -> Captured:
    """The inverse of `to_json`.

    Raises:
        BundleError: it names an operation that is not known here, or is no graph.
    """
    graph, known = fx.Graph(), dict[str, fx.Node]()
    try:
        for name in tensors:
            require_plain(name)
        for each in data["nodes"]:
            known[str(each["name"])] = _node(graph, each, known, tensors)
        signature, outputs = Signature.of_json(data["signature"]), Structure.of_json(data["outputs"])
        graph.lint()  # type: ignore[no-untyped-call]
        results = next(node for node in graph.nodes if node.op == "output").args[0]
        if outputs.count() != len(results) or signature.count() != sum(n.op == "placeholder" for n in graph.nodes):
            raise ValueError("its inputs or results are not those of its operations")
        sizes = tuple(Guard.of_json(guard) for guard in data["guards"])
        where = (str(data["name"]), graph, tensors, signature, outputs, str(data["batch"]), int(data["samples"]))
        return Captured(*where, guards=sizes)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BundleError(f"the saved graph cannot be read: {type(error).__name__}: {error}") from None


def require_plain(path: str) -> None:
    """Raise ValueError where a name could end the text of a name: programs are written as Python."""
    if not path or any(character in "\"'\\" or ord(character) < 32 for character in path):
        raise ValueError(f"the name {path!r}")


def _node(
    graph: fx.Graph, data: Mapping[str, Any], known: Mapping[str, fx.Node], tensors: Mapping[str, Tensor]
) -> fx.Node:
    """One operation of a saved graph."""
    op, target = data["op"], data["target"]
    args = tuple(_read(value, known) for value in data["args"])
    kwargs = {str(key): _read(value, known) for key, value in data.get("kwargs", {}).items()}
    if op == "call_function":
        target = operation(target)
        schema = getattr(target, "_schema", None)
        if set(kwargs) - {argument.name for argument in (schema.arguments if schema is not None else ())}:
            raise KeyError(f"arguments {sorted(kwargs)}")
    elif op == "placeholder":
        if not str(target).isidentifier() or keyword.iskeyword(target) or args or kwargs:
            raise ValueError(f"the input {target!r}")
    elif op == "get_attr":
        if target not in tensors or args or kwargs:
            raise KeyError(target)
    elif op == "output":
        args = (tuple(args[0]),)
    else:
        raise KeyError(op)
    node = graph.create_node(op, target, args, kwargs, str(data["name"]))
    node.meta = {key: _meta(_read(data["meta"][key], known)) for key in KEPT}
    require_plain(str(node.meta["path"]))
    return node


def _meta(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def operation(name: str) -> Any:
    """An operation by its name, among those that have a rule and the elementary ones of ATen.

    Raises:
        BundleError: it is neither.
    """
    if name in SIZES:
        return SIZES[name]
    if name == "operator.getitem":
        return operator.getitem
    if name == "spikeplug.affine":
        return affine
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    known = name in registry()
    if known or namespace == "aten":
        found = getattr(getattr(getattr(torch.ops, namespace, None), packet, None), overload, None)
        if isinstance(found, torch._ops.OpOverload) and (known or packet in MAKERS or _computes(found)):
            return found
    raise BundleError(
        f"operation '{name}' is not known: a plugin that brings it is missing, or the file is no graph of ours"
    )


MAKERS = ("arange", "zeros", "ones", "full", "eye", "linspace", "scalar_tensor", "empty")
"""Operations that make tensors of numbers alone."""


def _computes(op: torch._ops.OpOverload) -> bool:
    """Whether an operation makes tensors or sizes of tensors, changes none, and draws no numbers."""
    schema = op._schema
    kinds = [str(argument.type) for argument in schema.arguments]
    results = [str(value.type) for value in schema.returns]
    return (
        not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in op.tags
        and any("Tensor" in kind for kind in kinds)
        and bool(results)
        and all("Tensor" in kind or kind in ("int", "SymInt", "bool", "float") for kind in results)
    )


def storable(node: fx.Node) -> bool:
    """Whether a saved network can name an operation."""
    try:
        return node.op != "call_function" or operation(name_of(node)) is node.target
    except BundleError:
        return False


def _value(value: Any) -> Any:
    """A value of a graph as JSON."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (tuple, list)):
        return [_value(each) for each in value]
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"type": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise BundleError(f"a graph holds {value!r}, which has no form in a file")


def _read(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(each, known) for each in value]
    if isinstance(value, dict):
        ((kind, what),) = value.items()
        if kind == "node":
            return known[what]
        if kind == "type":
            return TYPES[what]
        return torch.device(what) if kind == "device" else {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[what]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(type(value).__name__)
