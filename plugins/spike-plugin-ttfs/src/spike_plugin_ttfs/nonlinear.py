"""The approximator `ttfs-kernels`: activations, softmax and RMSNorm by first-spike neurons (QC-A2S, appendix E).

A first-spike neuron with input kernel f and output kernel of h computes h(sum f) on its window's grid (Theorem 2), so
each operation here is exact but for the windows that it passes: what its neurons see, and what they tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spikeplug.coding.padding import without_padding
from spikeplug.coding.site import Coder
from spikeplug.coding.statistics import ActivationStats, require_finite
from spikeplug.coding.types import straight_through
from spikeplug.errors import CalibrationError, OptionError, listed

POINTWISE = {"silu": 1.0999, "swish": 1.0999, "gelu": 1.1290, "gelu_pytorch_tanh": 1.1290, "relu": 1.0, "sigmoid": 0.25}
"""Operations on one number, and the largest slope of each."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """First-spike neurons in the place of nonlinear operations.

    Args:
        steps: T of the windows inside an operation, 2 to 65536.
        margin: how much wider than what calibration saw a range is, as a share of it, half at each end.
        reach: softmax takes scores this far below the largest of their row for silent.
        keys: longest row of a softmax.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int = 4096
    margin: float = 0.1
    reach: float = 20.0
    keys: int = 8192

    name: ClassVar[str] = "ttfs-kernels"
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 65536:
            raise OptionError(f"steps={self.steps}: a whole number from 2 to 65536 is needed")
        if not 0 <= self.margin <= 10:
            raise OptionError(f"margin={self.margin}: a number from 0 to 10 is needed")
        if not 1 <= self.reach <= 80:
            raise OptionError(f"reach={self.reach}: a number from 1 to 80 is needed")
        if self.keys < 2:
            raise OptionError(f"keys={self.keys}: at least 2 are needed")

    def build(self, op: str, original: nn.Module, name: str) -> nn.Module:
        """The operation in spikes. Raises OptionError when there is no form of it."""
        if op in POINTWISE:
            return Pointwise(name, original, self)
        if op == "softmax":
            return Softmax(name, original, self)
        if op == "rmsnorm":
            return RMSNorm(name, original, self)
        raise OptionError(f"ttfs-kernels has no form of '{op}': {listed({*POINTWISE, 'softmax', 'rmsnorm'})}")


class Population(Coder):
    """First-spike neurons that tell a number to the next ones: the value of the nearest step of their window.

    Args:
        domain: range of the window, where it is known; None: that of calibration.
        log: the window is even in the logarithm of the number (h = log), and so are its two ends.
    """

    low: Tensor
    step: Tensor

    def __init__(
        self, name: str, options: Kernels, domain: tuple[float, float] | None = None, log: bool = False
    ) -> None:
        super().__init__(name, channels=())
        self.steps, self.margin, self.domain, self.log = options.steps, options.margin, domain, log

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.domain is None

    def fit(self, stats: ActivationStats | None) -> Mapping[str, Tensor]:
        if self.domain is not None:
            low, high = self.domain
        else:
            assert stats is not None
            low, high = float(stats.low.min()), float(stats.high.max())
            if self.log:
                low, high = math.log(max(low, 1e-30)), math.log(max(high, 1e-30))
            if not low < high:
                raise CalibrationError(f"every number seen is {low:g}: a range of no width has no code")
            low, high = low - (high - low) * self.margin / 2, high + (high - low) * self.margin / 2
        # Of float32 itself, so that fused and stepped execution have one grid in every dtype.
        return {"low": torch.tensor(low), "step": torch.tensor((high - low) / (self.steps - 1))}

    def forward(self, x: Tensor) -> Tensor:
        """What comes of `[*S]`: numbers, or their logarithms, as the window tells them; at least float32.

        Raises:
            NonFiniteError: `x` holds NaN or infinity; the message names the place.
            CalibrationError: it is not fitted yet.
        """
        with self.named():
            if self.mode == "dense":
                self.tell("activation", x)
                return x.log() if self.log else x
            self.require_calibrated()
            require_finite(x)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return straight_through(wide.clamp(min=1e-30).log() if self.log else wide, self._told)

    def _told(self, v: Tensor) -> Tensor:
        low, step = (buffer.to(v.device, v.dtype) for buffer in (self.low, self.step))
        # The neuron's ramp meets the threshold half a step early (`nearest`).
        potential = torch.sub(v, low).div_(step).add_(0.5).floor_()
        if self.mode == "stepped":
            code = self._stepped(potential)
        else:
            code = potential.clamp_(0, self.steps - 1)
            if self.heard("fired"):
                fired = without_padding(code > 0, self.sequence)
                self.tell("fired", fired, fired.numel(), 1)
        return code.mul_(step).add_(low)

    def _stepped(self, potential: Tensor) -> Tensor:
        """Codes of whole potentials, by every step of the emit phase."""
        last = self.steps - 1
        code, v = torch.zeros_like(potential), potential.clamp(-1, last)
        for t in range(last):
            s = (v >= last) & (code == 0)
            fired = without_padding(s, self.sequence)
            self.tell("fired", fired, fired.numel() if t == 0 else 0, 1)
            code.add_(s, alpha=last - t)
            v += 1
        return code


class Pointwise(nn.Module):
    """A function of one number (Corollaries 2 and 3): f is the function and h the identity.

    With input step λ, output step μ and largest slope L, `|y - f(x)| <= L λ / 2 + μ / 2` within the input's range.
    """

    def __init__(self, name: str, original: nn.Module, options: Kernels) -> None:
        super().__init__()
        self.delay = 2 * options.steps
        self.function = original
        self.input, self.output = Population(f"{name}.input", options), Population(f"{name}.output", options)

    def forward(self, x: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        y: Tensor = self.output(self.function(self.input(x)))
        return y.to(x.dtype)


class Softmax(nn.Module):
    """Softmax by log-sum-exp (Corollary 4): `exp(x_i - log sum_j exp(x_j))`, x less the largest of its row.

    One window tells x (step λ) and one the log-sum-exp (f = exp, h = log, step μ); the last exponential's own window is
    that of the site that codes the probabilities. For rows of K scores, and scores no further than `reach` below the
    largest, `|log y - log softmax(x)| <= λ + μ / 2 + K exp(-reach)`. Scores further off are 0.
    """

    def __init__(self, name: str, original: nn.Module, options: Kernels) -> None:
        super().__init__()
        self.delay = 2 * options.steps
        self.dim = getattr(original, "dim", -1)
        if self.dim is None:
            raise OptionError(f"'{name}' is a softmax without dim: give it one")
        # PyTorch's own gives back the dtype that came; that of language models is at least float32.
        self.least = None if isinstance(original, nn.Softmax) else torch.float32
        self.reach, self.keys = options.reach, options.keys
        self.score = Population(f"{name}.score", options, (-options.reach, 0.0))
        self.total = Population(f"{name}.total", options, (0.0, math.log(options.keys)), log=True)

    def forward(self, scores: Tensor) -> Tensor:
        """`[..., K] -> [..., K]`. Raises OptionError for rows longer than `keys`."""
        if scores.shape[self.dim] > self.keys:
            raise OptionError(f"a row of {scores.shape[self.dim]} scores: give ttfs-kernels keys of so many or more")
        x = scores.to(torch.promote_types(scores.dtype, torch.float32))
        x = (x - x.detach().amax(self.dim, keepdim=True)).clamp(min=-self.reach)
        told = self.score(x)
        total = self.total(told.exp().sum(self.dim, keepdim=True))
        # A neuron that never fired sends nothing on.
        y: Tensor = (told - total).exp() * (told > -self.reach)
        return y.to(scores.dtype if self.least is None else torch.promote_types(scores.dtype, self.least))


class RMSNorm(nn.Module):
    """`w x / sqrt(mean(x²) + eps)` in two neurons (Corollary 5). The weight keeps its name.

    The first is told x (step λ) and tells the mean square on a window even in its logarithm (f = square, h = log, step
    μ); the second makes of it the inverse root (f = exp(-./2)), which multiplies x in floating point. The paper's
    window, even in the mean square itself, would lose the small ones. With r the root mean square of x, within both
    ranges, and `δ = λ / r + λ² / (4 r²)` below 1, `|log y - log(w x / r)| <= μ / 4 + δ / (2 - 2 δ)`.
    """

    def __init__(self, name: str, original: Any, options: Kernels) -> None:
        super().__init__()
        # The second neuron's window is as even in the logarithm as the first one's, and tells the same.
        self.delay = 3 * options.steps
        self.weight = original.weight
        eps = getattr(original, "variance_epsilon", getattr(original, "eps", None))
        self.eps = torch.finfo(torch.float32).eps if eps is None else eps
        self.dims = tuple(range(-len(getattr(original, "normalized_shape", (1,))), 0))
        self.input = Population(f"{name}.input", options)
        self.mean = Population(f"{name}.mean", options, log=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[*S] -> [*S]`."""
        told = self.input(hidden_states)
        logarithm = self.mean(told.square().mean(self.dims, keepdim=True) + self.eps)
        y = (hidden_states.to(told.dtype) * (-0.5 * logarithm).exp()).to(hidden_states.dtype)
        return y if self.weight is None else torch.mul(self.weight, y)
