"""What every operation of a captured graph is called, where it stands, and the shapes of what it gives."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, fx, nn

from .builder import function_of
from .capture import Captured, hint

COMPOSED = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
"""Layers of PyTorch that consist of several operations, each of which has a name of its own."""

KEPT = ("path", "type", "shape", "dims", "dtype", "line")
"""What is kept of an operation; a capture's own facts, such as stand-ins for tensors, are dropped."""


def describe(captured: Captured, model: nn.Module) -> None:
    """Fill the `meta` of every node as `Captured` says."""
    seen: dict[str, int] = {}
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        shaped = isinstance(value, Tensor)
        node.meta["shape"] = tuple(hint(size) for size in value.shape) if shaped else None
        node.meta["dims"] = tuple(str(size) for size in value.shape) if shaped else ()
        node.meta["dtype"] = value.dtype if shaped else None
        node.meta["line"] = _line(str(node.meta.get("stack_trace") or ""))
        path, node.meta["type"] = _name(captured, model, node)
        path = re.sub(r"[\"'\\\x00-\x1f]", "_", path)  # programs are written as Python
        seen[path] = seen.get(path, 0) + 1
        node.meta["path"] = path if seen[path] == 1 else f"{path}_{seen[path] - 1}"
    for node in captured.graph.nodes:
        node.meta = {key: node.meta[key] for key in KEPT}


def _name(captured: Captured, model: nn.Module, node: fx.Node) -> tuple[str, str]:
    """Path and type of an operation.

    One with a parameter is called as the module that owns it, else one that is all of a layer of PyTorch as that layer,
    else as its function within the module that calls it.
    """
    if node.op in ("placeholder", "output", "get_attr"):
        return str(node.name), node.op
    if node.meta.get("val") is None or not isinstance(node.meta["val"], (Tensor, tuple, list)):
        return f"size.{node.name}", "size"
    function = str(node.meta.get("function") or function_of(node))
    place, cls = _module(node)
    owner = next(_owners(captured, model, node), None)
    if owner is not None:
        path, kind = owner
        return path, kind or function
    leaf = _submodule(model, place) if cls.startswith("torch.nn.") else None
    kind = cls.rpartition(".")[2].removeprefix("Parametrized")
    works = any(each.op != "get_attr" and isinstance(each.meta.get("val"), Tensor) for each in node.all_input_nodes)
    if leaf is not None and kind not in COMPOSED and place and works:
        return place, kind
    return f"{place}.{function}" if place else function, function


def _owners(captured: Captured, model: nn.Module, node: fx.Node) -> Iterator[tuple[str, str]]:
    """Path and class of the module that owns the first parameter of an operation."""
    for each in node.all_input_nodes:
        if each.op != "get_attr":
            continue
        name = str(each.target).removesuffix(".transposed")
        if ".parametrizations." in name:
            name = name.partition(".parametrizations.")[0] + ".weight"
        place, _, last = name.rpartition(".")
        module = _submodule(model, place)
        if module is None or last not in {**module._parameters, **module._buffers}:
            continue
        if last in ("weight", "running_mean", "bias") and place:
            yield place, type(module).__name__
        elif last.endswith("_weight"):
            yield name.removesuffix("_weight"), ""
        elif module._parameters.get(last) is not None and _weighs(node):
            yield name, ""


def _weighs(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in ("linear", "conv"))


def _module(node: fx.Node) -> tuple[str, str]:
    stack = [each for each in (node.meta.get("nn_module_stack") or {}).values() if not each[0].startswith("_empty")]
    if not stack:
        return "", ""
    path, cls = stack[-1]
    cls = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
    path = re.sub(r"@\d+", "", path).partition(".parametrizations.")[0]
    return path, cls


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _line(trace: str) -> str:
    """The last line of a stack that is not PyTorch's own, `file.py:12`."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    own = [(file, number) for file, number in frames if "/torch/" not in file]
    return "" if not own else f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}"
