"""The layers that receive spikes, and how a dense layer becomes one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeplug.errors import ConversionError

from .site import Site
from .types import CodeParams


class SpikingLayer(nn.Module):
    """A weighted layer that receives spikes. Its parameters keep their names, so dense checkpoints load into it."""

    weight: Tensor
    bias: Tensor | None
    _source: tuple[Site]

    @property
    def source(self) -> Site:
        """The site whose spikes it receives; registered as its child `site` unless another layer registers it."""
        return self._source[0]

    def attach(self, site: Site, owner: bool) -> None:
        """Receive the spikes of `site`; the owner registers it as a child."""
        # A tuple hides the site from nn.Module's registration in the layers that only read it.
        self._source = (site,)
        if owner:
            self.site = site

    def synapse(self, s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's linear map with the given parameters."""
        return mapped(self, s, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same signature and result shape as the dense layer's."""
        site = self.source
        if site.steps_now:
            stepped: Tensor = site(x, receive=functools.partial(self._stepped, x))
            return stepped
        return self.synapse(site(x), self.weight, self.bias)

    def _stepped(self, x: Tensor, p: CodeParams, spikes: Iterator[Tensor]) -> Tensor:
        """Every step's spikes pass through the weights; d(t) is applied to the current that they cause."""
        dtype = torch.promote_types(x.dtype, p.scale.dtype)
        weight = self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        scale, offset = p.scale.to(dtype), p.offset.to(dtype)
        # A scale that all inputs of a sum share leaves the sum; any other scales the spikes themselves.
        shared = scale.numel() == 1 or (weight.ndim == 2 and scale.shape[-1] == 1)
        y = torch.zeros((), dtype=dtype, device=x.device)
        for d, s in zip(self.source.encoder.weights(p).tolist(), spikes, strict=True):
            s = s.to(dtype) if shared else s.to(dtype) * scale
            y = y + d * self.synapse(s, weight, None)
        y = y * scale if shared else y
        if torch.is_grad_enabled() and x.requires_grad:
            # Straight through: exactly zero, with the gradient of the dense layer for its input.
            y = y + self.synapse((x - x.detach()).to(dtype), weight.detach(), None)
        return (y + self.synapse(offset.expand(x.shape), weight, bias)).to(x.dtype)


class SpikingLinear(SpikingLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` on spikes."""


class CodedEmbedding(nn.Embedding):
    """`nn.Embedding` whose output is coded."""

    site: Site

    def forward(self, input: Tensor) -> Tensor:
        """Same signature and result shape as `nn.Embedding`'s."""
        coded: Tensor = self.site(super().forward(input))
        return coded


def mapped(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The map of a linear layer or of a convolution, transposed or not, with the given parameters."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if layer.transposed:
        given = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
        return transposed(x, weight, bias, *given)
    y: Tensor = layer._conv_forward(x, weight, bias)
    return y


class SpikingConv1d(SpikingLayer, nn.Conv1d):
    """`nn.Conv1d` on spikes. Padding is the value 0: no spike and no offset."""


class SpikingConv2d(SpikingLayer, nn.Conv2d):
    """`nn.Conv2d` on spikes. Padding is the value 0: no spike and no offset."""


class SpikingConv3d(SpikingLayer, nn.Conv3d):
    """`nn.Conv3d` on spikes. Padding is the value 0: no spike and no offset."""


class SpikingConvTranspose1d(SpikingLayer, nn.ConvTranspose1d):  # type: ignore[misc]
    """`nn.ConvTranspose1d` on spikes."""


class SpikingConvTranspose2d(SpikingLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` on spikes."""


class SpikingConvTranspose3d(SpikingLayer, nn.ConvTranspose3d):  # type: ignore[misc]
    """`nn.ConvTranspose3d` on spikes."""


SPIKING: dict[type[nn.Module], type[SpikingLayer]] = {
    nn.Linear: SpikingLinear,
    nn.Conv1d: SpikingConv1d,
    nn.Conv2d: SpikingConv2d,
    nn.Conv3d: SpikingConv3d,
    nn.ConvTranspose1d: SpikingConvTranspose1d,
    nn.ConvTranspose2d: SpikingConvTranspose2d,
    nn.ConvTranspose3d: SpikingConvTranspose3d,
}
"""The weighted layers that can receive spikes, and what each becomes."""


def channels_of(layer: Any) -> tuple[int, ...]:
    """The dimension of a weighted layer's input that makes up a channel; counted from the end, batch or not."""
    return (-1,) if isinstance(layer, nn.Linear) else (-(layer.weight.ndim - 1),)


def make_spiking(layer: nn.Module, site: Site, owner: bool = True) -> None:
    """Turn a dense weighted layer into the same layer on spikes, in place: parameters, hooks and name stay.

    Raises:
        ConversionError: the layer is not one of `SPIKING`.
    """
    spiking = SPIKING.get(type(layer))
    if spiking is None:
        raise ConversionError(f"{type(layer).__name__} cannot receive spikes: {', '.join(t.__name__ for t in SPIKING)}")
    layer.__class__ = spiking
    assert isinstance(layer, SpikingLayer)
    site.spatial = max(site.spatial, len(getattr(layer, "kernel_size", ())))
    layer.attach(site, owner)
