"""What operations are: every ATen operation that the conversion knows, and how it acts on activations.

The registry is filled by the hook `spikeplug_operations`, core's own part of it through `CORE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from spikeplug import plugins

from .builder import affine
from .capture import Captured, operands


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an operation is.

    Attributes:
        kind: one of
            `input`, `output`;
            `weighted`: a linear layer or a convolution, which receives spikes;
            `affine`: a scale and a shift by constants;
            `activation`: `op` is `relu` or `clip`, to 0 .. `top`;
            `maxpool`;
            `linear`: linear in its first argument, without weights; `pools` where it averages or mixes;
            `add`: sums and differences of activations, with constants among them; `cat`: concatenation;
            `product`: of two activations, `op` is `matmul` or `mul`;
            `nonlinear`: an operation that approximators may know by the name `op`;
            `lookup`: rows of a table;
            `recurrent`;
            `size`: no activation: sizes, constants, masks, indices;
            `other`: of no known role;
            and of what a conversion puts in: `site`, neurons of spike trains; `value`, what a window decodes to.
        type: as a report calls it.
        elementwise: whether a nonlinear operation acts on every element for itself.
    """

    kind: str
    type: str = ""
    op: str = ""
    top: float = float("inf")
    pools: bool = False
    elementwise: bool = True


Rule = Kind | Callable[[fx.Node], Kind]
"""The kind of an operation, or what finds it for one call of it."""

WEIGHTED, LINEAR, POOL, MAXPOOL = Kind("weighted"), Kind("linear"), Kind("linear", pools=True), Kind("maxpool")
CAT, LOOKUP, RECURRENT, SIZE = Kind("cat"), Kind("lookup"), Kind("recurrent"), Kind("size")
RELU, RELU6 = Kind("activation", op="relu"), Kind("activation", op="clip", top=6.0)
AFFINE, ADD = Kind("affine"), Kind("add")
MATMUL = Kind("product", op="matmul")
PART = Kind("nonlinear", op="part", elementwise=False)
"""One of several results of an operation."""

SUBSYSTEMS = {
    "softmax": "attention",
    **dict.fromkeys(("layernorm", "rmsnorm", "groupnorm", "instancenorm", "batchnorm"), "norm"),
}


def labels_of(op: str) -> tuple[str, str]:
    """The words by which `include` and `exclude` name a nonlinear operation: itself and its subsystem."""
    return op, SUBSYSTEMS.get(op, "activation")


def registry() -> dict[str, Rule]:
    """Every known operation: `aten.relu.default` -> its rule."""
    found = plugins.registry()
    return {name: plugins.get_class("operation", name) for name in found.names("operation")}


def kinds(captured: Captured) -> dict[fx.Node, Kind]:
    """The kind of every operation, in order: it may depend on those of the inputs."""
    rules = registry()
    found: dict[fx.Node, Kind] = {}
    of_values: set[fx.Node] = set()
    for node in captured.graph.nodes:
        # Tensors that depend on the values of an input, and not on sizes alone.
        depends = any(each in of_values for each in node.all_input_nodes)
        if node.op == "placeholder" or (depends and node.meta["shape"] is not None):
            of_values.add(node)
        found[node] = dataclasses.replace(_kind(node, rules, found, depends), type=node.meta["type"])
    return found


def _kind(node: fx.Node, rules: dict[str, Rule], known: dict[fx.Node, Kind], depends: bool) -> Kind:
    if node.op == "output":
        return Kind("output")
    dtype = node.meta["dtype"]
    if node.op == "placeholder":
        # Images may come as bytes; whole numbers of other types are indices.
        image = dtype is not None and (dtype.is_floating_point or dtype is torch.uint8)
        return Kind("input") if image and node.users else SIZE
    if node.op == "get_attr":
        return SIZE
    rule = rules.get(name_of(node))
    kind = rule(node) if callable(rule) else rule
    if kind is not None and kind.kind in ("lookup", "size"):
        return kind
    acts = [each for each in node.all_input_nodes if known[each].kind != "size"]
    if not acts:
        # Numbers that are made of indices or masks are what layers may read.
        numbers = dtype is not None and dtype.is_floating_point and depends
        return Kind("nonlinear", op="numbers") if numbers else SIZE
    if dtype is not None and not dtype.is_floating_point and not _is_image(node, acts):
        return SIZE
    if node.meta["shape"] is None and kind is None:
        return SIZE if str(node.target).startswith("aten.sym") else Kind("other")
    return _checked(node, kind or Kind("other"), acts)


def _is_image(node: fx.Node, acts: list[fx.Node]) -> bool:
    """Whether bytes of an image are passed on."""
    return node.meta["dtype"] is torch.uint8 and all(each.meta["dtype"] is torch.uint8 for each in acts)


def _checked(node: fx.Node, kind: Kind, acts: list[fx.Node]) -> Kind:
    """The kind, where the activations stand in those places in which it is known."""
    first = next(iter(node.args), None)
    if kind.kind in ("linear", "activation", "maxpool", "affine", "weighted") and (
        acts != [first] or first not in acts
    ):
        return Kind("other")
    if kind.kind == "weighted" and any(each.op != "get_attr" for each in node.all_input_nodes if each is not first):
        return Kind("other")
    if kind.kind == "product" and kind.op == "mul" and len(acts) < 2 and first is not (operands(node)[1]):
        return Kind("linear")
    return kind  # of a matrix product a constant operand, as learned queries are, is coded as an activation is


def name_of(node: fx.Node) -> str:
    """Name of an operation in the registry."""
    if node.target is affine:
        return "spikeplug.affine"
    return str(node.target) if hasattr(node.target, "_schema") else f"operator.{getattr(node.target, '__name__', '?')}"


def activations(node: fx.Node, known: dict[fx.Node, Kind]) -> list[fx.Node]:
    """The activations among the inputs of an operation."""
    return [each for each in node.all_input_nodes if known[each].kind != "size"]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def multiplication(node: fx.Node) -> Kind:
    """A multiplication or division: by a number, of two activations, or by what is no activation."""
    left, right = node.args[:2]
    if _number(right) or _number(left):
        division = str(node.target).startswith("aten.div")
        return Kind("nonlinear", op="reciprocal") if division and _number(left) else LINEAR
    if str(node.target).startswith("aten.div"):
        return Kind("nonlinear", op="div")
    return Kind("product", op="mul")


def rounded_division(node: fx.Node) -> Kind:
    """A division that rounds."""
    return Kind("nonlinear", op="round") if node.kwargs.get("rounding_mode") else multiplication(node)


def clip(node: fx.Node) -> Kind:
    """`clamp`, `hardtanh`, `clamp_min`: an activation where it cuts at 0."""
    args = operands(node)
    low, high = args[1], args[2] if len(args) > 2 else None
    if low != 0 or isinstance(low, bool) or not (high is None or (_number(high) and high > 0)):
        return Kind("nonlinear", op="clip")
    return RELU if high is None else Kind("activation", op="clip", top=float(high))


def threshold(node: fx.Node) -> Kind:
    """`threshold(x, 0, 0)` is the ReLU."""
    return RELU if tuple(node.args[1:3]) == (0, 0) else Kind("nonlinear", op="threshold")


def padding(node: fx.Node) -> Kind:
    """Padding with zeros, or with values of the activation."""
    args = operands(node)
    constant = len(args) < 4 or args[2] == "constant"
    value = args[-1] if constant else None
    return Kind("nonlinear", op="pad") if value not in (None, 0, 0.0) else LINEAR


def pointwise(node: fx.Node) -> Kind:
    """An operation on single elements that is not linear; approximators know it by ATen's name."""
    return Kind("nonlinear", op=_op(node))


def reduction(node: fx.Node) -> Kind:
    """An operation on rows, channels or whole maps that is not linear."""
    return Kind("nonlinear", op=_op(node), elementwise=False)


NAMES = {
    "layer_norm": "layernorm", "rms_norm": "rmsnorm", "group_norm": "groupnorm", "instance_norm": "instancenorm",
    "native_batch_norm_legit": "batchnorm", "safe_softmax": "softmax",
}  # fmt: skip
"""ATen's name of an operation -> that of approximators, where they differ."""


def _op(node: fx.Node) -> str:
    name = str(node.target).split(".")[1].lstrip("_")
    return NAMES.get(name, name)
