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
                require_frozen(norm, str(node.target))
                _fold(layer, norm)
                model.set_submodule(str(node.target), nn.Identity())
                folded.append(str(node.target))
        return folded


def _fits(layer: nn.Module, norm: Any) -> bool:
    """Whether the norm's features are the layer's outputs. A linear layer's input must be `[B, F]`."""
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return isinstance(layer, (*CONVOLUTIONS, nn.Linear)) and outputs == norm.num_features


def require_frozen(norm: Any, name: str) -> None:
    """Raise ConversionError where a BN uses statistics of the batch."""
    if norm.training or norm.running_mean is None:
        raise ConversionError(f"BN '{name}' uses statistics of the batch: call model.eval() before converting")


def norm_line(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C]` of a frozen BN: `y = scale * x + shift`."""
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
        return scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale


def fold_behind(layer: nn.Module, norm: Any) -> bool:
    """Merge a frozen BN into the layer before it, in place; return whether it fits."""
    if not _fits(layer, norm):
        return False
    _fold(layer, norm)
    return True


def fold_ahead(norm: Any, layer: Any) -> bool:
    """Merge a frozen BN into the layer behind it, in place; return whether it fits.

    A linear layer's input must be `[B, F]`. Ahead of a convolution with padding it cannot: its shift is not what is
    padded.
    """
    if isinstance(layer, nn.Linear):
        fits = isinstance(norm, nn.BatchNorm1d) and layer.in_features == norm.num_features
        groups = 1
    else:
        fits = isinstance(layer, CONVOLUTIONS) and layer.in_channels == norm.num_features and not any(layer.padding)
        groups = getattr(layer, "groups", 1)
    if not fits:
        return False
    with torch.no_grad():
        # Of every output and every input that it reads: [O, I / groups, 1, ...]
        by_output = [
            each.reshape(groups, -1).repeat_interleave(len(layer.weight) // groups, 0) for each in norm_line(norm)
        ]
        scale, shift = (each.reshape(*layer.weight.shape[:2], *[1] * (layer.weight.ndim - 2)) for each in by_output)
        moved = (layer.weight * shift).flatten(1).sum(1)
        bias = moved if layer.bias is None else layer.bias + moved
        layer.weight = nn.Parameter(layer.weight * scale, layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias, layer.weight.requires_grad)
    return True


def _fold(layer: Any, norm: Any) -> None:
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    with torch.no_grad():
        layer.weight, layer.bias = fuse(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, scale, shift
        )
