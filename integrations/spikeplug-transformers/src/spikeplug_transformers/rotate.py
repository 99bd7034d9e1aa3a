"""The pass `rotate`: an orthogonal rotation spreads outliers over all features, and the network's function stays.

Sources: QuaRot and SpinQuant (R1, R2 and the online R4), as PrefixQuant uses them, which MGPC and QC-A2S start from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spikeplug.errors import ConversionError

from .family import ROTATION, refuse_strangers


@dataclasses.dataclass(frozen=True)
class Rotate:
    """Rotates the residual stream and the heads' values within the weights, and the input of `down_proj` at run time.

    Norms' weights move into the layers that read them; tied embeddings are untied first. A size that is no power of two
    has a Hadamard matrix for its power of two and a random orthogonal one for the odd rest.

    Args:
        random: random signs before the Hadamard matrix of the residual stream.
        heads: rotate the values of every attention head.
        online: rotate the input of `down_proj`.
        seed: of signs and orthogonal matrices.
    """

    random: bool = True
    heads: bool = True
    online: bool = True
    seed: int = 0

    name: ClassVar[str] = "rotate"

    def apply(self, model: Any, batches: Sequence[Any] = ()) -> dict[str, Any]:
        """Rotate in place.

        Raises:
            ConversionError: the model is not of the family, or is rotated already.
        """
        refuse_strangers(model)
        if any(hasattr(layer.mlp, ROTATION) for layer in model.model.layers):
            raise ConversionError("the model is rotated already")
        untie(model)
        size = model.config.hidden_size
        rotation = orthogonal(size, self.seed)
        if self.random:
            generator = torch.Generator().manual_seed(self.seed)
            rotation = (torch.randint(2, (size, 1), generator=generator).double() * 2 - 1) * rotation
        body = model.model
        with torch.no_grad():
            for layer in body.layers:
                attention, mlp = layer.self_attn, layer.mlp
                for name, readers in {
                    "input_layernorm": (attention.q_proj, attention.k_proj, attention.v_proj),
                    "post_attention_layernorm": (mlp.gate_proj, mlp.up_proj),
                }.items():
                    _fold_norm(getattr(layer, name), readers)
                    for reader in readers:
                        _multiply(reader, right=rotation)
                for writer in (attention.o_proj, mlp.down_proj):
                    _multiply(writer, left=rotation.T)
                if self.heads:
                    _rotate_heads(attention, orthogonal(attention.head_dim, self.seed))
                if self.online:
                    matrix = orthogonal(mlp.down_proj.in_features, self.seed)
                    _multiply(mlp.down_proj, right=matrix)
            _fold_norm(body.norm, (model.lm_head,))
            _multiply(model.lm_head, right=rotation)
            weight = body.embed_tokens.weight
            rewrite(body.embed_tokens, "weight", weight.double() @ rotation.to(weight.device))
        self.skeleton(model)
        return {}

    def skeleton(self, model: Any) -> None:
        """Put the online rotations in place, which no weight holds."""
        if self.online:
            for layer in model.model.layers:
                rotation = OnlineRotation(layer.mlp.down_proj.in_features, self.seed)
                setattr(layer.mlp, ROTATION, rotation)
                layer.mlp.down_proj.register_forward_pre_hook(_RotateInput(rotation))


class OnlineRotation(nn.Module):
    """Rotates the last dimension, `[..., n] -> [..., n]`, as a Kronecker product: two small products."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.size, self.seed = size, seed
        first, second = _factors(size, seed)
        self.macs = size * (first.shape[0] + second.shape[0])
        self._ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def extra_repr(self) -> str:
        return f"{self.size}"

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype; computed in float32 at the least."""
        key = (x.device, torch.promote_types(x.dtype, torch.float32))
        if key not in self._ready:
            first, second = _factors(self.size, self.seed)
            self._ready[key] = first.to(*key), second.to(*key)
        first, second = self._ready[key]
        y = x.to(key[1]).reshape(*x.shape[:-1], first.shape[0], second.shape[0])
        y = first.T @ (y @ second)
        return y.reshape(x.shape).to(x.dtype)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ready": {}}


class _RotateInput:
    """Forward pre-hook of the layer whose input is rotated; an object, so that copies of a model have their own."""

    def __init__(self, rotation: OnlineRotation) -> None:
        self.rotation = rotation

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.rotation(given[0]), *given[1:])


def untie(model: Any) -> None:
    """Give the output layer weights of its own where it shares those of the embedding."""
    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def orthogonal(size: int, seed: int) -> Tensor:
    """Orthogonal matrix `[n, n]`, float64: the Kronecker product of `_factors`."""
    first, second = _factors(size, seed)
    return torch.kron(first, second)


@functools.cache
def _factors(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two orthogonal matrices whose sizes multiply to n and are as near to each other as can be, float64."""
    # Models are built on the meta device, where these would hold no numbers.
    with torch.device("cpu"):
        odd = size
        while odd % 2 == 0:
            odd //= 2
        powers = (size // odd).bit_length() - 1
        first = min(range(powers + 1), key=lambda power: abs(2**power - size / 2**power))
        rest = _hadamard(powers - first)
        if odd > 1:
            generator = torch.Generator().manual_seed(seed)
            normal = torch.randn(odd, odd, dtype=torch.float64, generator=generator)
            q, r = torch.linalg.qr(normal)
            rest = torch.kron(rest, (q * r.diagonal().sign()).contiguous())
        return _hadamard(first), rest


def _hadamard(power: int) -> Tensor:
    """Sylvester's Hadamard matrix of size 2^power, scaled to be orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / 2 ** (power / 2)


def _fold_norm(norm: Any, readers: tuple[nn.Linear, ...]) -> None:
    for reader in readers:
        rewrite(reader, "weight", reader.weight.double() * norm.weight.double())
    rewrite(norm, "weight", torch.ones_like(norm.weight))


def rewrite(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a new parameter; the old one may be that of another model and stays as it is."""
    old: Any = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def _multiply(layer: nn.Linear, left: Tensor | None = None, right: Tensor | None = None) -> None:
    """`W <- left W right`, in float64; the bias goes with the left factor."""
    weight = layer.weight.double()
    if right is not None:
        weight = weight @ right.to(weight.device)
    if left is not None:
        weight = left.to(weight.device) @ weight
        if layer.bias is not None:
            rewrite(layer, "bias", left.to(weight.device) @ layer.bias.double())
    rewrite(layer, "weight", weight)


def _rotate_heads(attention: Any, matrix: Tensor) -> None:
    """Values of every head are rotated, and the output projection rotates them back."""
    size = matrix.shape[0]
    values = torch.eye(attention.v_proj.out_features // size, dtype=torch.float64)
    outputs = torch.eye(attention.o_proj.in_features // size, dtype=torch.float64)
    _multiply(attention.v_proj, left=torch.kron(values, matrix.T.contiguous()))
    _multiply(attention.o_proj, right=torch.kron(outputs, matrix))
