"""Nonlinear operations: which ones there are, and the approximator that leaves them as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from spikeplug import plugins
from spikeplug.config import ConversionConfig
from spikeplug.errors import OptionError, listed, nearest

OPS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softmax: "softmax",
    nn.LayerNorm: "layernorm",
    nn.RMSNorm: "rmsnorm",
}
"""Module of PyTorch -> the operation, as `ConversionConfig.approximators` names it."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """Keeps every nonlinear operation in floating point; the report lists it as dense."""

    name: ClassVar[str] = "exact"

    def build(self, op: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `original`."""
        return original


def replacement(config: ConversionConfig, op: str, original: Any) -> Any:
    """What the configuration puts in the place of an operation; `original` itself where that is the exact one."""
    name = config.approximators.get(op, config.approximators.get("*", "exact"))
    return plugins.get_approximator(name).build(op, original)


def within(name: str, replaced: Iterable[str]) -> bool:
    """Whether a module is a part of one that was replaced."""
    return any(name.startswith(f"{each}.") for each in replaced)


def approximate(model: nn.Module, config: ConversionConfig, ops: Mapping[str, str]) -> dict[str, str]:
    """Replace the modules of `ops` (name -> operation) as the configuration says; return those that were.

    Raises:
        OptionError: the configuration names an operation that the model does not have.
    """
    for op in config.approximators:
        if op != "*" and op not in ops.values():
            raise OptionError(
                f"approximators: no operation '{op}'{nearest(op, ops.values())} Here: {listed(ops.values())}"
            )
    replaced = {}
    for name, op in ops.items():
        original = model.get_submodule(name)
        new = replacement(config, op, original)
        if new is not original:
            model.set_submodule(name, new)
            replaced[name] = op
    return replaced
