"""The pass `quantize-weights`: rounds the weights of linear layers to few bits, by torchao's primitives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from spikeplug.errors import OptionError

from .rotate import rewrite


@dataclasses.dataclass(frozen=True)
class QuantizeWeights:
    """Symmetric round-to-nearest of every `nn.Linear` but the output layer; weights stay floating-point numbers.

    What a spiking layer accumulates is then a whole number times the scale of its row, or of a group of its row.

    Args:
        bits: 8 or 4.
        group: weights of a row that share a scale; 0: the whole row.

    Raises:
        OptionError: an option is out of range.
    """

    bits: int = 8
    group: int = 0

    name: ClassVar[str] = "quantize-weights"
    keeps_function: ClassVar[bool] = False
    distributions: ClassVar[tuple[str, ...]] = ("torchao",)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(f"bits={self.bits}: choose one of 4, 8")
        if self.group < 0:
            raise OptionError(f"group={self.group}: a whole number of at least 0 is needed")

    def check(self, model: nn.Module) -> None:
        """Raises as `apply`, ahead of it: a row is no multiple of the group."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head" and module.in_features % (self.group or 1):
                raise OptionError(f"group={self.group}: the rows of '{name}' have {module.in_features} weights")

    def apply(self, model: nn.Module, batches: Sequence[Any] = ()) -> dict[str, Any]:
        """Round in place.

        Raises:
            OptionError: torchao is not installed, or a row is no multiple of the group.
        """
        try:
            from torchao.quantization.quant_primitives import (
                MappingType,
                choose_qparams_affine,
                dequantize_affine,
                quantize_affine,
            )
        except ImportError as error:
            raise OptionError(
                f"quantize-weights needs torchao ({error}): pip install spikeplug-transformers[weights]"
            ) from None
        self.check(model)
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or name == "lm_head":
                continue
            size = self.group or module.in_features
            block = (1, size)
            weight = module.weight.detach().float()
            scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8, low, high, eps=1e-9)
            whole = quantize_affine(weight, block, scale, zero, torch.int8, low, high)
            rounded = dequantize_affine(whole, block, scale, zero, torch.int8, low, high)
            rewrite(module, "weight", rounded)
        return {}

    def skeleton(self, model: nn.Module) -> None:
        """Nothing: the weights that are stored are the rounded ones."""
