"""How the inputs of a network are called and how its results are put together, as data that JSON can hold."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spikeplug.errors import OptionError


class Outputs(dict[str, Any]):
    """Results by name, `found["logits"]`, `found.logits` or `found[0]`, where a network returns a class of its own."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no result '{name}'; results: {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)


class NamedOutputs(tuple[Any, ...]):
    """Results in order and by name, where a network returns a named tuple."""

    _fields: tuple[str, ...]

    def __new__(cls, names: Sequence[str], values: Sequence[Any]) -> NamedOutputs:
        found = super().__new__(cls, values)
        found._fields = tuple(names)
        return found

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"no result '{name}'")
        return self[self._fields.index(name)]


pytree.register_pytree_node(
    NamedOutputs,
    lambda found: (list(found), found._fields),
    lambda values, names: NamedOutputs(names, list(values)),
    serialized_type_name="spikeplug.graph.structure.NamedOutputs",
)
pytree.register_pytree_node(
    Outputs,
    lambda found: (list(found.values()), list(found)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    serialized_type_name="spikeplug.graph.structure.Outputs",
)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A nest of tuples, lists and mappings whose leaves are tensors or constants.

    Attributes:
        kind: `tensor`, `constant`, `tuple`, `list`, `dict`, `fields` (a class of the network's own) or `named` (a named
            tuple).
        keys: of a mapping, in order.
        parts: what it holds.
        value: of a constant.
    """

    kind: str
    parts: tuple[Structure, ...] = ()
    keys: tuple[Any, ...] = ()
    value: Any = None

    @classmethod
    def of(cls, spec: Any) -> Structure:
        """That of a `TreeSpec`, all of whose leaves are tensors."""
        if spec.is_leaf():
            return cls("tensor")
        parts = tuple(cls.of(each) for each in spec.children())
        if spec.type in (tuple, list):
            return cls(spec.type.__name__, parts)
        context = spec.context
        if spec.type is dict:
            return cls("dict", parts, tuple(context))
        names = context[0] if isinstance(context, tuple) and context and isinstance(context[0], list) else context
        if isinstance(names, (list, tuple)) and len(names) == len(parts) and all(isinstance(n, str) for n in names):
            return cls("fields", parts, tuple(names))
        fields = getattr(context, "_fields", None)  # a named tuple
        return cls("named" if fields else "tuple", parts, tuple(fields or ()))

    @classmethod
    def like(cls, value: Any) -> Structure:
        """That of an input: what is no tensor is a constant."""
        if isinstance(value, Tensor):
            return cls("tensor")
        if isinstance(value, Mapping):
            return cls("dict", tuple(cls.like(each) for each in value.values()), tuple(value))
        if isinstance(value, (tuple, list)):
            return cls("tuple" if isinstance(value, tuple) else "list", tuple(cls.like(each) for each in value))
        if value is None or isinstance(value, (bool, int, float, str)):
            return cls("constant", value=value)
        raise OptionError(f"an input of type {type(value).__name__}: tensors, and nests of them, can be captured")

    def pack(self, leaves: Iterator[Any]) -> Any:
        """The nest that holds these leaves, in order."""
        if self.kind == "tensor":
            return next(leaves)
        if self.kind == "constant":
            return self.value
        parts = [part.pack(leaves) for part in self.parts]
        if self.kind == "dict":
            return dict(zip(self.keys, parts, strict=True))
        if self.kind == "fields":
            return Outputs(zip(self.keys, parts, strict=True))
        if self.kind == "named":
            return NamedOutputs(self.keys, parts)
        return tuple(parts) if self.kind == "tuple" else parts

    def unpack(self, value: Any, name: str) -> Iterator[Tensor]:
        """The tensors of a nest, in order.

        Raises:
            OptionError: it is another nest, or holds other constants.
        """
        if self.kind == "tensor":
            if not isinstance(value, Tensor):
                raise OptionError(f"input '{name}' is of type {type(value).__name__}: a tensor is needed")
            yield value
        elif self.kind == "constant":
            if value != self.value or type(value) is not type(self.value):
                raise OptionError(
                    f"input '{name}' is {value!r}: the network was converted for {self.value!r} and cannot take another"
                )
        else:
            given = [value[key] for key in self.keys] if self.kind == "dict" and _has(value, self.keys) else value
            if not isinstance(given, Sequence) or len(given) != len(self.parts):
                raise OptionError(
                    f"input '{name}' is of type {type(value).__name__} with other parts than in the example"
                )
            for index, (part, each) in enumerate(zip(self.parts, given, strict=True)):
                yield from part.unpack(each, f"{name}[{self.keys[index] if self.keys else index}]")

    def names(self, name: str) -> Iterator[str]:
        """What the tensors of a nest of that name are called, in order."""
        if self.kind == "tensor":
            yield name
        for index, part in enumerate(self.parts):
            yield from part.names(f"{name}[{self.keys[index] if self.keys else index}]")

    def to_json(self) -> Any:
        """What `of_json` reads."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.parts:
            found["parts"] = [part.to_json() for part in self.parts]
        if self.keys:
            found["keys"] = list(self.keys)
        return found | ({"value": self.value} if self.kind == "constant" else {})

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Structure:
        """The inverse of `to_json`. Raises KeyError, TypeError."""
        if data["kind"] not in ("tensor", "constant", "tuple", "list", "dict", "fields", "named"):
            raise KeyError("kind")
        parts, keys = tuple(cls.of_json(part) for part in data.get("parts", ())), tuple(data.get("keys", ()))
        if any(not isinstance(key, (str, int)) for key in keys) or (keys and len(keys) != len(parts)):
            raise KeyError("keys")
        return cls(data["kind"], parts, keys, data.get("value"))

    def count(self) -> int:
        """Tensors in it."""
        return int(self.kind == "tensor") + sum(part.count() for part in self.parts)


def _has(value: Any, keys: Sequence[str]) -> bool:
    return isinstance(value, Mapping) and set(value) == set(keys)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs that a network was captured with.

    Attributes:
        parameters: names of the forward method's parameters that can be given by position, in order.
        given: those that were given, with the structure of each.
        rest: name of the parameter that takes all further ones, `*args`; empty: there is none.
    """

    parameters: tuple[str, ...]
    given: tuple[tuple[str, Structure], ...]
    rest: str = ""

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
        """Raises OptionError: the forward method does not take them."""
        bound = cls.named(model, args, kwargs)
        known = inspect.signature(model.forward).parameters.items()
        parameters = [name for name, each in known if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        rest = next((name for name, each in known if each.kind is each.VAR_POSITIONAL), "")
        given = tuple((name, Structure.like(value)) for name, value in bound.items())
        return cls(tuple(parameters), given, rest)

    @staticmethod
    def named(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by the names of the forward method's parameters. Raises OptionError."""
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise OptionError(f"{type(model).__name__}.forward does not take such a batch: {error}") from None
        found: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            else:
                found[name] = value
        return found

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order in which the graph takes them.

        Raises:
            OptionError: it is called otherwise than in the example.
        """
        known = dict(self.given)
        named = dict(zip(self.parameters, args, strict=False))
        for name in kwargs:
            if name in named:
                raise OptionError(f"input '{name}' is given twice, by position and by name")
        named |= dict(kwargs)
        if len(args) > len(self.parameters):
            named[self.rest or "(further inputs)"] = tuple(args[len(self.parameters) :])
        for name, value in named.items():
            if name not in known and value is not None:
                raise OptionError(
                    f"input '{name}' was not in the example that the network was converted with: convert it with one "
                    f"that has it. Inputs: {', '.join(known)}"
                )
        found: list[Tensor] = []
        for name, structure in self.given:
            if name not in named and structure.kind != "constant":
                raise OptionError(f"input '{name}' is missing: the network was converted with it")
            found.extend(structure.unpack(named.get(name, structure.value), name))
        return found

    def names(self) -> list[str]:
        """What the tensors are called that it takes, in order."""
        return [each for name, structure in self.given for each in structure.names(name)]

    def count(self) -> int:
        """Tensors that it takes."""
        return sum(structure.count() for _, structure in self.given)

    def to_json(self) -> dict[str, Any]:
        """What `of_json` reads."""
        given = [[name, structure.to_json()] for name, structure in self.given]
        return {"parameters": list(self.parameters), "given": given, "rest": self.rest}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Signature:
        """The inverse of `to_json`. Raises KeyError, TypeError, ValueError."""
        given = tuple((str(name), Structure.of_json(structure)) for name, structure in data["given"])
        return cls(tuple(map(str, data["parameters"])), given, str(data["rest"]))


def leaves(value: Any) -> list[Tensor]:
    """The tensors of any nest, in order."""
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]
