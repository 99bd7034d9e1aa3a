"""Nonlinear operations: which ones there are, and the approximator that leaves them as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import nn

from spikeplug.config import ConversionConfig
from spikeplug.errors import OptionError, listed, nearest

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


def labels_of(op: str) -> tuple[str, str]:
    """The words by which `include` and `exclude` name an operation: itself and its subsystem."""
    return op, {"softmax": "attention", "layernorm": "norm", "rmsnorm": "norm"}.get(op, "activation")


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
    for op in config.approximators:
        if op != "*" and op not in ops.values():
            raise OptionError(
                f"approximators: no operation '{op}'{nearest(op, ops.values())} Here: {listed(ops.values())}"
            )
    replaced = {}
    for name, op in ops.items():
        if config.excludes(name, *labels_of(op)):
            continue
        original = model.get_submodule(name)
        new = approximators[config.approximator(op)].build(op, original, name)
        if new is not original:
            model.set_submodule(name, new)
            replaced[name] = op
    return replaced
