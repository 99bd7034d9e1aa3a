"""Nonlinear operations: which ones there are, and the approximator that leaves them as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from spikeplug.config import ConversionConfig
from spikeplug.errors import OptionError, listed, nearest

from .capture import operands
from .draft import Draft
from .operations import labels_of

OPS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
    nn.Hardswish: "hardswish",
    nn.Mish: "mish",
    nn.Softmax: "softmax",
    nn.LayerNorm: "layernorm",
    nn.RMSNorm: "rmsnorm",
}
"""Module of PyTorch -> the operation, as `ConversionConfig.approximators` names it."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """Keeps every nonlinear operation in floating point; the report lists it as dense."""

    name: ClassVar[str] = "exact"
    static: ClassVar[bool] = False

    def build(self, op: str, original: nn.Module, name: str) -> nn.Module:
        """Return `original`."""
        return original


def within(name: str, replaced: Iterable[str]) -> bool:
    """Whether a module is a part of one that was replaced."""
    return any(name.startswith(f"{each}.") for each in replaced)


def approximate(model: nn.Module, config: ConversionConfig, ops: Mapping[str, str]) -> dict[str, str]:
    """Replace the modules of `ops` (name -> operation) as the configuration says; return those that were.

    Raises:
        OptionError: the configuration names an operation that the model does not have, or one that has no form.
    """
    approximators = config.build_approximators()
    replaced = {}
    for name, op in ops.items():
        if config.approximator(op) == "exact" or config.excludes(name, *labels_of(op)):
            continue
        original = model.get_submodule(name)
        new = approximators[config.approximator(op)].build(op, original, name)
        if new is not original:
            model.set_submodule(name, new)
            replaced[name] = op
    return replaced


def check_names(config: ConversionConfig, known: Collection[str]) -> None:
    """Raise OptionError where the configuration names an operation that a model does not have."""
    for op in config.approximators:
        if op != "*" and op not in known:
            raise OptionError(f"approximators: no operation '{op}'{nearest(op, known)} Here: {listed(known)}")


class Operation(nn.Module):
    """An operation of a captured graph as a module: a function of one activation, and its fixed arguments."""

    def __init__(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.target, self.kwargs = target, dict(kwargs)
        self.args: list[Any] = []
        for index, value in enumerate(args):
            if isinstance(value, Tensor):
                name = f"argument_{index}"
                if isinstance(value, nn.Parameter):
                    self.register_parameter(name, value)
                else:
                    self.register_buffer(name, value)
                self.args.append(name)
            else:
                self.args.append(value)

    def forward(self, x: Tensor) -> Tensor:
        """The operation's value."""
        held = {**self._parameters, **self._buffers}
        args = [held.get(value, value) if isinstance(value, str) else value for value in self.args]
        y: Tensor = self.target(x, *args, **self.kwargs)
        return y


def original_of(draft: Draft, node: fx.Node) -> nn.Module:
    """A nonlinear operation of a captured graph as the module that approximators know."""
    name, args = str(node.target).split(".")[1], operands(node)
    if name in ("softmax", "_safe_softmax"):
        return nn.Softmax(dim=args[1])
    if name in ("layer_norm", "rms_norm"):
        eps = args[4] if name == "layer_norm" else args[3]
        norm: Any = nn.LayerNorm(args[1], eps) if name == "layer_norm" else nn.RMSNorm(args[1], eps)
        for key, value in zip(("weight", "bias"), args[2:4] if name == "layer_norm" else args[2:3], strict=False):
            norm.register_parameter(key, None if value is None else draft.parameter(str(value.target)))
        return norm  # type: ignore[no-any-return]
    fixed = [draft.parameter(str(each.target)) if isinstance(each, fx.Node) else each for each in node.args[1:]]
    return Operation(node.target, fixed, node.kwargs)


def approximate_graph(draft: Draft, activations: bool) -> dict[str, str]:
    """Replace the nonlinear operations of a graph as the configuration says; return path and operation of those.

    An operation that the approximator for all (`*`) has no form of is left exact, and the report lists it as dense.

    Args:
        activations: ReLUs and clips too, which otherwise are neurons.

    Raises:
        OptionError: the configuration names an operation that the network does not have, or one that has no form.
    """
    config = draft.config
    ops = {node: _op(draft, node, activations) for node in draft.graph.nodes}
    check_names(config, [op for op in ops.values() if op])
    approximators = config.build_approximators()
    replaced = {}
    for node, op in ops.items():
        path = draft.path(node)
        if not op or config.approximator(op) == "exact" or config.excludes(path, *labels_of(op)):
            continue
        original = original_of(draft, node)
        try:
            new = approximators[config.approximator(op)].build(op, original, path)
        except OptionError:
            if op in config.approximators:
                raise
            continue
        if new is not original:
            draft.swap(node, new, (node.args[0],))
            replaced[path] = op
    return replaced


def _op(draft: Draft, node: fx.Node, activations: bool) -> str:
    """The operation, as approximators call it; empty where it is none of one activation."""
    kind, inputs = draft.kinds[node], draft.activations(node)
    if len(inputs) != 1 or node.args[0] is not inputs[0] or any(
        isinstance(each, fx.Node) and draft.tensor(each) is None for each in node.args[1:]
    ):  # fmt: skip
        return ""
    if kind.kind == "nonlinear":
        return kind.op
    if kind.kind == "activation" and activations:
        return "relu" if kind.op == "relu" else "relu6" if kind.top == 6 else "clip"
    return ""
