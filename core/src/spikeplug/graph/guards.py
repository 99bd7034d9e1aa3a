"""What the sizes of inputs must be like for a captured graph to hold, which took branches on them while capturing."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch._guards import detect_fake_mode

COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "Equality": operator.eq, "Unequality": operator.ne, "StrictLessThan": operator.lt, "LessThan": operator.le,
    "StrictGreaterThan": operator.gt, "GreaterThan": operator.ge,
}  # fmt: skip
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": lambda *each: sum(each),
    "Mul": lambda *each: _product(each),
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Max": max,
    "Min": min,
    "Not": operator.not_,
    "And": lambda *each: all(each),
    "Or": lambda *each: any(each),
}
KNOWN = {**COMPARED, **ARITHMETIC}
"""Functions of sizes, by the names of their classes in sympy."""

Expression = int | str | tuple[Any, ...]
"""A number, a size by its name, or a function's name and its arguments."""


def _product(values: Sequence[Any]) -> Any:
    result = 1
    for value in values:
        result = result * value
    return result


@dataclasses.dataclass(frozen=True)
class Guard:
    """A condition on sizes.

    Attributes:
        said: as a message says it.
        expression: the condition.
    """

    said: str
    expression: Expression

    @property
    def sizes(self) -> set[str]:
        """Names of the sizes that it is about."""
        return set(_names(self.expression))

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true of sizes by their names."""
        return bool(_value(self.expression, sizes))

    def to_json(self) -> list[Any]:
        """What `of_json` reads."""
        return [self.said, _listed(self.expression)]

    @classmethod
    def of_json(cls, data: Sequence[Any]) -> Guard:
        """The inverse of `to_json`. Raises KeyError, TypeError, ValueError."""
        said, expression = data
        return cls(str(said), _read(expression))


def guards_of(inputs: Sequence[fx.Node]) -> tuple[Guard, ...]:
    """The conditions under which a capture took the branches that it took.

    That a size is not 0 or 1 is left out: PyTorch takes it for granted of every size; see `trials.ones`.
    """
    mode = detect_fake_mode([node.meta.get("val") for node in inputs])
    if mode is None or mode.shape_env is None:
        return ()
    sizes = [size for node in inputs if isinstance(node.meta.get("val"), Tensor) for size in node.meta["val"].shape]
    known = {str(size): int(size.node.hint) for size in sizes if not isinstance(size, int)}
    found: dict[str, Guard] = {}
    for guard in mode.shape_env.guards:
        condition = mode.shape_env.replace(guard.expr)  # sizes that were found to be the same have one name
        expression = _read_sympy(condition, set(known))
        if expression is None:
            # A formula with functions that are not known here holds at least for the sizes of the example.
            named = [size for size in map(str, condition.free_symbols) if size in known]
            if not named:
                continue
            expression = ("And", *(("Equality", size, known[size]) for size in sorted(named)))
        if not _asks_for_one(expression) and not (_of_pytorch(guard) and _asks_for_order(expression, known)):
            found[str(condition)] = Guard(str(condition), expression)
    return tuple(found.values())


def squeezing(nodes: Iterable[fx.Node]) -> tuple[Guard, ...]:
    """Conditions of `squeeze`: a size that was not 1 in the example stays, and must not become 1 later."""
    found: dict[str, Guard] = {}
    for node in nodes:
        word, _, overload = str(node.target).removeprefix("aten.").partition(".")
        if word not in ("squeeze", "squeeze_copy"):
            continue
        shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        asked: Any = range(len(shape)) if overload == "default" else node.args[1]
        for dim in (asked,) if isinstance(asked, int) else asked:
            size = shape[dim] if len(shape) else 1
            if not isinstance(size, int) and size.node.expr.is_Symbol:
                found[str(size)] = Guard(
                    f"{size} is not 1, which squeeze() would leave out", ("Unequality", str(size), 1)
                )
    return tuple(found.values())


def _asks_for_one(expression: Expression) -> bool:
    if not isinstance(expression, tuple) or expression[0] not in COMPARED:
        return False
    name, *sides = expression
    if name == "Unequality":
        return 0 in sides or 1 in sides
    # `2 <= s` is how a range says that a size is not 0 or 1.
    return (name, sides[-1]) == ("GreaterThan", 2) or (name, sides[0]) == ("LessThan", 2)


def _of_pytorch(guard: Any) -> bool:
    """Whether PyTorch itself asked, in what it computes of shapes and strides, and not the network's code."""
    place = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    return "/torch/_" in str(getattr(place, "filename", "")).replace("\\", "/")


def _asks_for_order(expression: Expression, known: Mapping[str, int]) -> bool:
    """Whether it asks if memory is in order: `n < s n`, two strides, where a size s may be 1."""
    if not isinstance(expression, tuple) or expression[0] not in ("StrictLessThan", "StrictGreaterThan"):
        return False
    small, large = expression[1:] if expression[0] == "StrictLessThan" else reversed(expression[1:])
    if not isinstance(large, tuple) or large[0] != "Mul" or (isinstance(small, int) and small == 1):
        return False
    stride = _value(small, known)
    return any(isinstance(each, str) and _value(large, {**known, each: 1}) == stride for each in large[1:])


def _read_sympy(expression: Any, known: set[str]) -> Expression | None:
    """A formula of sympy; None where it has parts that are not known here."""
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return str(expression) if str(expression) in known else None
    name = type(expression).__name__
    if name == "Pow" and expression.args[1].is_Integer and 0 < int(expression.args[1]) < 5:
        base = _read_sympy(expression.args[0], known)
        return None if base is None else ("Mul", *[base] * int(expression.args[1]))
    parts = [_read_sympy(each, known) for each in expression.args]
    return None if name not in KNOWN or any(part is None for part in parts) else (name, *parts)


def _value(expression: Expression, sizes: Mapping[str, int]) -> Any:
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return sizes[expression]
    name, *parts = expression
    return KNOWN[name](*(_value(part, sizes) for part in parts))


def _names(expression: Expression) -> Iterator[str]:
    if isinstance(expression, str):
        yield expression
    elif isinstance(expression, tuple):
        for part in expression[1:]:
            yield from _names(part)


def _listed(expression: Expression) -> Any:
    return [expression[0], *map(_listed, expression[1:])] if isinstance(expression, tuple) else expression


def _read(data: Any) -> Expression:
    if isinstance(data, list):
        if data[0] not in KNOWN:
            raise KeyError(data[0])
        return (data[0], *map(_read, data[1:]))
    if isinstance(data, bool) or not isinstance(data, (int, str)):
        raise TypeError(type(data).__name__)
    return data
