"""The approximator `asnc`: activations, softmax and norms whose scalar functions are spiking codecs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spikeplug.errors import OptionError, listed

from .codec import Codec
from .segments import Fit

POINTWISE = (
    "elu", "exp", "gelu", "gelu_new", "gelu_pytorch_tanh", "hardswish", "leaky_relu", "mish", "quick_gelu",
    "reciprocal", "relu", "relu6", "rsqrt", "sigmoid", "silu", "softplus", "swish", "tanh",
)  # fmt: skip
"""Operations on one number. `exp`, `reciprocal` and `rsqrt` have their range reduced first; the others are fitted to
the inputs that calibration saw."""


@dataclasses.dataclass(frozen=True)
class ASNC(Fit):
    """Approximates nonlinear operations by adaptive spiking neural codecs, with BSE output in the same window."""

    name: ClassVar[str] = "asnc"
    static: ClassVar[bool] = True

    def build(self, op: str, original: nn.Module, name: str) -> nn.Module:
        """The operation in spikes. Raises OptionError when there is no form of it."""
        form = FORMS.get(op, Pointwise if op in POINTWISE else None)
        if form is not None:
            return form(name, original, self)
        raise OptionError(f"asnc has no form of '{op}': {listed({*POINTWISE, *FORMS})}")


class Pointwise(nn.Module):
    """A function of one number, fitted to the inputs that calibration saw."""

    def __init__(self, name: str, original: nn.Module, options: Fit) -> None:
        super().__init__()
        self.codec = Codec(name, original, options)
        self.delay = self.codec.delay

    def forward(self, x: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        y: Tensor = self.codec(x)
        return y


class Exp(nn.Module):
    """`exp(x) = 2^k 2^f` with whole k and f in [0, 1): the codec has 2^f, and k shifts. No input is out of its range.

    A codec's error is then one of the value itself, however small that is, so long rows of a softmax sum rightly.
    """

    def __init__(self, name: str, original: nn.Module | None, options: Fit) -> None:
        super().__init__()
        self.codec = Codec(f"{name}.exp", torch.exp2, _inside(options), (0.0, 1.0))
        self.delay = self.codec.delay

    def forward(self, x: Tensor) -> Tensor:
        """`[*S] -> [*S]`; 0 below 2^-126, the smallest ordinary number of float32, and limited to below 2^127."""
        z = torch.mul(x, math.log2(math.e)).clamp(-127.0, 127.0 - 2**-16)
        k = z.detach().floor()
        # 2^k by its bits: 0 for k = -127.
        power = k.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
        y: Tensor = self.codec(z - k) * power
        return y


class Reciprocal(nn.Module):
    """`1 / x = 2^-k (1 / m)` for positive x = 2^k m with m in [0.5, 1): the codec has 1/m."""

    def __init__(self, name: str, original: nn.Module | None, options: Fit) -> None:
        super().__init__()
        self.codec = Codec(f"{name}.reciprocal", torch.reciprocal, _inside(options), (0.5, 1.0))
        self.delay = self.codec.delay

    def forward(self, x: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        k = torch.frexp(x.detach())[1]
        y: Tensor = torch.ldexp(self.codec(torch.ldexp(x, -k)), -k)
        return y


class Rsqrt(nn.Module):
    """`x^(-1/2) = 2^-k m^(-1/2)` for positive x = 4^k m with m in [0.25, 1): the codec has m^(-1/2)."""

    def __init__(self, name: str, original: nn.Module | None, options: Fit) -> None:
        super().__init__()
        self.codec = Codec(f"{name}.rsqrt", torch.rsqrt, _inside(options), (0.25, 1.0))
        self.delay = self.codec.delay

    def forward(self, x: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        k = (torch.frexp(x.detach())[1] + 1) >> 1
        y: Tensor = torch.ldexp(self.codec(torch.ldexp(x, -2 * k)), -k)
        return y


class Softmax(nn.Module):
    """Softmax in float32: the largest score is taken off, exp in spikes, their sum, its reciprocal in spikes."""

    def __init__(self, name: str, original: nn.Module, options: Fit) -> None:
        super().__init__()
        self.dim = getattr(original, "dim", -1)
        if self.dim is None:
            raise OptionError(f"'{name}' is a softmax without dim: give it one")
        # PyTorch's own gives back the dtype that came; that of language models is at least float32.
        self.least = None if isinstance(original, nn.Softmax) else torch.float32
        self.exp, self.reciprocal = Exp(name, None, options), Reciprocal(name, None, options)
        self.delay = self.exp.delay + self.reciprocal.delay

    def forward(self, scores: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        x = scores.float().clamp(min=torch.finfo(torch.float32).min)  # masks of float64 go beyond it
        e = self.exp(x - x.detach().amax(self.dim, keepdim=True))
        y: Tensor = e * self.reciprocal(e.sum(self.dim, keepdim=True))
        return y.to(scores.dtype if self.least is None else torch.promote_types(scores.dtype, self.least))


class RMSNorm(nn.Module):
    """`w x / sqrt(mean(x²) + eps)` in float32, the inverse root in spikes. The weight keeps its name."""

    def __init__(self, name: str, original: Any, options: Fit) -> None:
        super().__init__()
        self.weight = original.weight
        eps = getattr(original, "variance_epsilon", getattr(original, "eps", None))
        self.eps = torch.finfo(torch.float32).eps if eps is None else eps
        self.dims = tuple(range(-len(getattr(original, "normalized_shape", (1,))), 0))
        self.rsqrt = Rsqrt(name, None, options)
        self.delay = self.rsqrt.delay

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        x = hidden_states.float()
        y = x * self.rsqrt(x.square().mean(self.dims, keepdim=True) + self.eps)
        y = y.to(hidden_states.dtype)
        return y if self.weight is None else torch.mul(self.weight, y)


class LayerNorm(nn.Module):
    """`w (x - mean) / sqrt(var + eps) + b` in float32, the inverse root in spikes. Parameters keep their names."""

    def __init__(self, name: str, original: nn.LayerNorm, options: Fit) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps
        self.dims = tuple(range(-len(original.normalized_shape), 0))
        self.rsqrt = Rsqrt(name, None, options)
        self.delay = self.rsqrt.delay

    def forward(self, input: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        x = input.float()
        x = x - x.mean(self.dims, keepdim=True)
        y = (x * self.rsqrt(x.square().mean(self.dims, keepdim=True) + self.eps)).to(input.dtype)
        y = y if self.weight is None else self.weight * y
        return y if self.bias is None else torch.add(y, self.bias)


def _inside(options: Fit) -> Fit:
    """The options for a function whose domain is known: nothing lies beyond it."""
    return dataclasses.replace(options, margin=0.0)


FORMS: dict[str, Callable[..., nn.Module]] = {
    "exp": Exp,
    "reciprocal": Reciprocal,
    "rsqrt": Rsqrt,
    "softmax": Softmax,
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
}
"""Operations that are more than one function of one number, or whose range is reduced."""
