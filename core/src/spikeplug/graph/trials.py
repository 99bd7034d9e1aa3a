"""A network and its capture, tried on parts of the example: what a capture takes for granted and does not say."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .guards import Guard
from .structure import leaves

if TYPE_CHECKING:
    from .capture import Captured

MOST = 3
"""Sizes that are tried together, of few; of many one less."""

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
    """Conditions that sizes are not 1, where the network is another one there.

    PyTorch captures as if no size were 1, and asks nothing: `if x.shape[1] == 1` leaves no trace. So every free size is
    tried, alone and with others, and where the network does not take 1 of them, its capture shall not either.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))
    program = fx.GraphModule(dict(captured.tensors), graph)

    def same(names: Collection[str]) -> bool:
        parts = _parts(captured, args, kwargs, lambda size: slice(1 if size in names else None))
        try:
            wanted = _run(model, args, kwargs, parts)
            given = [each for each in program(*(part for _, part in parts)) if isinstance(each, Tensor)]
        except Exception:  # as above
            return False
        return len(wanted) == len(given) and all(map(_alike, wanted, given))

    free = tuple(dict.fromkeys(name for node in captured.inputs for name in node.meta["dims"] if name.isidentifier()))
    most = min(len(free), MOST if len(free) <= 2 * MOST else MOST - 1)
    tried = (names for count in range(1, most + 1) for names in itertools.combinations(free, count))
    return tuple(_not_one(names, free, exactly=len(names) < most) for names in tried if not same(names))


def _not_one(names: tuple[str, ...], free: tuple[str, ...], exactly: bool) -> Guard:
    """The condition that not all of these sizes are 1; or, `exactly`, that not they and no others are."""
    others = [name for name in free if name not in names] if exactly else []
    parts = (*(("Unequality", name, 1) for name in names), *(("Equality", name, 1) for name in others))
    said = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not "
    said += "1" if not others else "the only size of 1" if len(names) == 1 else "the only sizes of 1"
    return Guard(said, ("Or", *parts))


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether results are the same but for rounding."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return difference(one, other) <= math.sqrt(torch.finfo(one.dtype).eps)


def difference(wanted: Tensor, found: Tensor) -> float:
    """Largest difference of two tensors over the largest value of the first."""
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(found)) or not torch.equal(wanted[~finite], found[~finite]):
        return float("inf")
    one, other = (each[finite].double() for each in (wanted, found))
    if not one.numel():
        return 0.0
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))


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
        # Only what has changed is touched: others may be running the network.
        for module, attributes in known:
            _restore(vars(module), attributes)
        for value, before in held:
            if isinstance(value, dict):
                _restore(value, dict(before))
            elif list(map(id, value)) != list(map(id, before)):
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(before)


def _restore(now: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value
