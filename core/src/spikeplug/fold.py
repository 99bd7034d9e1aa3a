"""Batch-normalisation folding: a frozen BN merged into the convolution or linear layer before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from spikeplug.errors import ConversionError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm:
    """Folds every BN that directly follows a convolution or a linear layer whose output nothing else reads.

    A folded BN becomes `nn.Identity`, so that names stay. A BN elsewhere is left, and the report lists it as dense.
    """

    name: ClassVar[str] = "fold-bn"

    def skeleton(self, model: nn.Module) -> None:
        """A stored model of transformers has no BN to fold."""

    def apply(self, model: nn.Module, batches: Sequence[Any] = ()) -> list[str]:
        """Fold in place; return the names of the BN modules that were folded away.

        Raises:
            ConversionError: the model has BN but cannot be traced, or BN is in training mode.
        """
        if not any(isinstance(module, NORMS) for module in model.modules()):
            return []
        try:
            graph = fx.symbolic_trace(model).graph
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            raise ConversionError(f"{type(model).__name__} cannot be traced to fold its BN: {error}") from error
        modules = dict(model.named_modules())
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        folded = []
        for node in graph.nodes:
            before = node.args[0] if node.op == "call_module" and node.args else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
                continue
            layer, norm = modules[str(before.target)], modules[str(node.target)]
            once = calls.count(node.target) == calls.count(before.target) == 1
            if once and isinstance(norm, NORMS) and _fits(layer, norm):
                _fold(layer, norm, str(node.target))
                model.set_submodule(str(node.target), nn.Identity())
                folded.append(str(node.target))
        return folded


def _fits(layer: nn.Module, norm: Any) -> bool:
    """Whether the norm's features are the layer's outputs. A linear layer's input must be `[B, F]`."""
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return isinstance(layer, (*CONVOLUTIONS, nn.Linear)) and outputs == norm.num_features


def norm_line(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C]` of a frozen BN: `y = scale * x + shift`."""
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
        return scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale


def fold_pair(first: nn.Module, second: nn.Module) -> bool:
    """Merge two layers, one of them a frozen BN, into the other one in place; return whether that is possible.

    A BN ahead of a convolution with padding cannot be merged: its shift is not what is padded.
    """
    if isinstance(second, NORMS):
        if not _fits(first, second):
            return False
        _fold(first, second, "")
        return True
    if isinstance(second, nn.Linear) and second.in_features == first.num_features:
        scale, shift = norm_line(first)
        moved = shift @ second.weight.detach().T
        weight = second.weight.detach() * scale
    elif isinstance(second, CONVOLUTIONS) and second.in_channels == first.num_features and not any(second.padding):
        scale, shift = norm_line(first)
        groups = second.weight.shape[0] // second.groups
        by_output = [scale.reshape(second.groups, -1)[index // groups] for index in range(second.weight.shape[0])]
        shifts = [shift.reshape(second.groups, -1)[index // groups] for index in range(second.weight.shape[0])]
        extra = [1] * (second.weight.ndim - 2)
        moved = (
            (second.weight.detach() * torch.stack(shifts).reshape(*second.weight.shape[:2], *extra)).flatten(1).sum(1)
        )
        weight = second.weight.detach() * torch.stack(by_output).reshape(*second.weight.shape[:2], *extra)
    else:
        return False
    second.weight = nn.Parameter(weight, requires_grad=second.weight.requires_grad)
    bias = moved if second.bias is None else second.bias.detach() + moved
    second.bias = nn.Parameter(bias, requires_grad=second.weight.requires_grad)
    return True


def _fold(layer: Any, norm: Any, name: str) -> None:
    if norm.training or norm.running_mean is None:
        raise ConversionError(f"BN '{name}' uses statistics of the batch: call model.eval() before converting")
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    with torch.no_grad():
        layer.weight, layer.bias = fuse(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, scale, shift
        )
