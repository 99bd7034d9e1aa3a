"""A network and its capture, tried on parts of the example: what a capture takes for granted and does not say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .guards import Guard
from .structure import leaves

if TYPE_CHECKING:
    from .capture import Captured

Cut = Callable[[str], slice]
"""Of a size's name, what is taken of it."""


def _parts(
    captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Cut
) -> list[tuple[Tensor, Tensor]]:
    """Inputs of the example, each with a part of it."""
    inputs = captured.signature.tensors(args, kwargs)
    nodes = captured.inputs
    return [(x, x[tuple(map(cut, node.meta["dims"]))]) for x, node in zip(inputs, nodes, strict=True)]


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], parts: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """The network's results, tensors alone, with inputs replaced by their parts."""
    by_id = {id(whole): part for whole, part in parts}
    given = pytree.tree_map(lambda each: by_id.get(id(each), each), (args, dict(kwargs)))
    return [each for each in leaves(model(*given[0], **given[1])) if isinstance(each, Tensor)]


def takes_few(model: nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the network takes the first two samples of the example."""
    parts = _parts(captured, args, kwargs, lambda size: slice(2) if size == captured.batch else slice(None))
    try:
        _run(model, args, kwargs, parts)
    except Exception:  # it is the user's code, which may raise anything
        return False
    return True


def ones(model: nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Guard, ...]:
    """Conditions that a size is not 1, where the network is another one there.

    PyTorch captures as if no size were 1, and asks nothing: `if x.shape[1] == 1` leaves no trace. So every free size is
    tried, and where the network does not take 1 of it, its capture shall not either.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))
    program = fx.GraphModule(dict(captured.tensors), graph)
    names = dict.fromkeys(name for node in captured.inputs for name in node.meta["dims"] if name.isidentifier())
    found = []
    for name in names:
        parts = _parts(captured, args, kwargs, lambda size, name=name: slice(1 if size == name else None))  # type: ignore[misc]
        try:
            wanted = _run(model, args, kwargs, parts)
            given = [each for each in program(*(part for _, part in parts)) if isinstance(each, Tensor)]
            same = len(wanted) == len(given) and all(map(_alike, wanted, given))
        except Exception:  # as above
            same = False
        if not same:
            found.append(Guard(f"{name} is not 1", ("Unequality", name, 1)))
    return tuple(found)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-3, equal_nan=True)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What the modules of a network hold is the same behind it as ahead, also what a forward pass keeps on them."""
    known = [(module, dict(vars(module))) for module in model.modules()]
    held = [
        (value, value.copy())
        for _, attributes in known
        for value in attributes.values()
        if isinstance(value, (dict, list, set))
    ]
    try:
        yield
    finally:
        for module, attributes in known:
            vars(module).clear()
            vars(module).update(attributes)
        for value, before in held:
            if isinstance(value, list):
                value[:] = before
            else:
                value.clear()
                value.update(before)
