"""Codes whose trains stream: a layer's spikes reach the next layer's neurons step by step, and no window is decoded.

A train is a tensor `[T * B, ...]`, step by step, of spikes or of the currents that they cause. Between two sites
everything is linear, so a layer works on all steps at once. Currents are in amplitudes of the neuron that they reach:
amplitudes, and a bias's share of every step, are absorbed into the weights of the layers (CSS, Algorithm 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spikeplug.coding.layers import mapped
from spikeplug.coding.site import Coder, Mode, version
from spikeplug.coding.statistics import ActivationStats
from spikeplug.coding.types import CodeParams, Encoder, Neuron, State
from spikeplug.errors import CalibrationError

from .operations import Kind


class Stream:
    """What all parts of one network share.

    Attributes:
        mode: of all parts; `dense`: plain activations pass in the place of trains.
        weights: d(t) of every site `[T]`.
        sites: all of them.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.mode: Mode = "stepped"
        self.sites: list[StreamingSite] = []
        unit = CodeParams(torch.ones(()), torch.zeros(()))
        self.weights = [float(d) for d in encoder.weights(unit)]

    @property
    def dense(self) -> bool:
        """Whether the network runs as the dense one."""
        return self.mode == "dense"

    @property
    def steps(self) -> int:
        """T."""
        return len(self.weights)

    @property
    def total(self) -> float:
        """Sum of d(t)."""
        return sum(self.weights)

    @property
    def accumulates(self) -> bool:
        """Whether d(t) falls by one factor from step to step, so that input accumulates."""
        ratios = [now / later for now, later in zip(self.weights, self.weights[1:], strict=False)]
        return all(abs(ratio - ratios[0]) <= 1e-9 * ratios[0] for ratio in ratios)

    @property
    def ratio(self) -> float:
        """`d(t) / d(t + 1)`, what accumulated input grows by in a step."""
        return self.weights[0] / self.weights[1] if self.steps > 1 else 1.0

    def split(self, x: Tensor) -> Tensor:
        """`[T * B, ...] -> [T, B, ...]`, a view."""
        return x.reshape(self.steps, -1, *x.shape[1:])


class StreamingSite(Coder):
    """Neurons that turn currents into spikes; or, at the network's input, the code of an activation.

    Args:
        kind: `image` for the network's input, `value` for what was computed on decoded values: their code is that of
            an activation; `relu`, `clip`; `sum` where signed sums become spikes anew.
        activation: what the neurons apply to their accumulated input.
    """

    def __init__(
        self, name: str, kind: str, encoder: Encoder, neuron: Neuron, activation: Kind, stream: Stream
    ) -> None:
        super().__init__(name, channels=())
        self.kind, self.encoder, self.stream, self.activation = kind, encoder, stream, activation
        stream.sites.append(self)
        # Without its own activation a neuron may exist all the same: this says now that this one does not.
        self._neuron = neuron
        if not self.encodes:
            self._neuron = neuron.activated(activation.op or "identity", activation.top, stream.steps)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.encoder}, {self._neuron}"

    @property
    def mode(self) -> Mode:
        """That of the whole network, all parts of which run alike."""
        return self.stream.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self.stream.mode = mode

    @property
    def neuron(self) -> Neuron:
        """The neuron, its largest value in amplitudes."""
        if self.activation.op != "clip":
            return self._neuron
        top = self.activation.top / float(self.amplitude)
        return self._neuron.activated("clip", top, self.stream.steps)

    @property
    def amplitude(self) -> Tensor:
        """What a decoded sum of 1 stands for."""
        self.require_calibrated()
        scale: Tensor = self.scale  # type: ignore[assignment]
        return scale

    @property
    def encodes(self) -> bool:
        """Whether it codes an activation, and no neurons answer currents."""
        return self.kind in ("image", "value")

    @property
    def latency(self) -> int:
        """Steps that its spikes come behind its input."""
        return 0 if self.encodes else self._neuron.latency

    def fit(self, stats: ActivationStats | None) -> Mapping[str, Tensor]:
        assert stats is not None
        found = self.encoder.fit(stats).tensors()
        if found["scale"].numel() != 1:
            raise CalibrationError(
                f"code '{self.encoder.name}' streams with one scale per site, not with one per channel"
            )
        return found

    def params(self) -> CodeParams:
        """Parameters of its code."""
        self.require_calibrated()
        return CodeParams.from_tensors({name: each for name, each in self._buffers.items() if each is not None})

    def residual(self, currents: Tensor) -> Tensor:
        """Potential left after a window of currents `[T, B, ...]`, in amplitudes, `[B, ...]`."""
        neuron = self.neuron
        state = neuron.init(currents[0])
        silence = torch.zeros_like(currents[0])
        for current in [*currents, *[silence] * neuron.latency]:
            _, state = neuron.step(current, state)
        return neuron.residual(state)

    def activate(self, x: Tensor) -> Tensor:
        """What the dense network has here."""
        if self.activation.op == "relu":
            return torch.relu(x)
        return x.clamp(0, self.activation.top) if self.activation.op == "clip" else x

    def forward(self, x: Tensor) -> Tensor:
        """Spikes `[T * B, ...]` of currents `[T * B, ...]`, or of an image `[B, ...]`."""
        with self.named():
            if self.stream.dense:
                x = self.activate(x)
                self.tell("activation", x)
                return x
            if self.encodes:
                spikes = self.encoder.encode(x, self.params())
                currents = spikes
            else:
                currents = self.stream.split(x)
                spikes = _in_storage_order(self.neuron.window, currents)
        if self.heard("fired"):
            # One pass; the sum of magnitudes would take two.
            dims = tuple(range(spikes.ndim - self.spatial)) if self.spatial else None
            self.tell("fired", torch.count_nonzero(spikes, dim=dims), spikes[0].numel(), spikes.numel())
        self.tell("window", currents, spikes)
        return spikes.flatten(0, 1)


def _in_storage_order(window: Callable[[Tensor], Tensor], xs: Tensor) -> Tensor:
    """Run neurons, which are independent, on `[T, N]` in the order in which they lie in memory."""
    strides = xs.stride()
    order = sorted(range(1, xs.ndim), key=lambda dim: (-strides[dim], dim))
    flat = xs.permute(0, *order).reshape(len(xs), -1)
    spikes = window(flat).reshape([len(xs), *(xs.shape[dim] for dim in order)])
    return spikes.permute(0, *(1 + order.index(dim) for dim in range(1, xs.ndim)))


class StreamingLayer(nn.Module):
    """A layer on trains: linear, its weights in amplitudes of where currents come from and go to.

    Attributes:
        sites: whose spikes it receives.
        source: the one in whose amplitudes they are, None: they are in the dense network's units.
        feeds: the site whose neurons it feeds, in whose amplitudes its currents are; None: no site alone.
        pooled: whether what it receives are averages of spikes.
    """

    weight: Tensor
    bias: Tensor | None

    def attach(
        self,
        stream: Stream,
        sites: tuple[StreamingSite, ...],
        source: StreamingSite | None,
        to: StreamingSite | None,
        pooled: bool,
    ) -> None:
        """Say where currents come from and go to."""
        # In tuples, which hide the sites from nn.Module's registration.
        self.stream, self.sites, self.pooled = stream, sites, pooled
        for site in sites:
            site.spatial = max(site.spatial, len(getattr(self, "kernel_size", ())))
        self.source, self.feeds = (source,), (to,)
        self._kept: tuple[list[tuple[Tensor, int]], Tensor, Tensor | None] | None = None

    def line(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's map with the given parameters."""
        return mapped(self, x, weight, bias)

    def absorbed(self) -> tuple[Tensor, Tensor | None]:
        """Weights, and the bias of one step."""
        sites = [site for site in (*self.source, *self.feeds) if site is not None]
        tensors = [self.weight, self.bias, *(site.amplitude for site in sites)]
        training = torch.is_grad_enabled() and self.weight.requires_grad
        # The tensors themselves are kept: another one could come to lie where one of them was.
        key = [(each, version(each)) for each in tensors if each is not None]
        if self._kept is not None and not training and _same(self._kept[0], key):
            return self._kept[1:]
        dtype = self.weight.dtype
        up = 1.0 if self.source[0] is None else self.source[0].amplitude.to(dtype)
        down = 1.0 if self.feeds[0] is None else self.feeds[0].amplitude.to(dtype)
        weight = self.weight * (up / down)
        bias = None if self.bias is None else self.bias / down / self.stream.total
        if not training:
            if weight.ndim == 4 and weight.shape[1] > 1:
                weight = weight.detach().contiguous(memory_format=torch.channels_last)
            self._kept = (key, weight.detach(), None if bias is None else bias.detach())
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Currents of a train; or the dense layer's output."""
        if self.stream.dense:
            return self.line(x, self.weight, self.bias)
        return self.line(x, *self.absorbed())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _same(one: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    return all(x is y and now == then for (x, now), (y, then) in zip(one, other, strict=True))


class StreamingLinear(StreamingLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` on trains."""


class StreamingConv1d(StreamingLayer, nn.Conv1d):
    """`nn.Conv1d` on trains."""


class StreamingConv2d(StreamingLayer, nn.Conv2d):
    """`nn.Conv2d` on trains."""


class StreamingConv3d(StreamingLayer, nn.Conv3d):
    """`nn.Conv3d` on trains."""


class Affine(nn.Module):
    """`weight * x + bias` by constants that broadcast."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        for name, tensor in (("weight", weight), ("bias", bias)):
            held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, held)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class StreamingAffine(StreamingLayer, Affine):  # type: ignore[misc]
    """A scale and a shift by constants, on trains."""

    def line(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x * weight if bias is None else x * weight + bias


class StreamingConvTranspose1d(StreamingLayer, nn.ConvTranspose1d):  # type: ignore[misc]
    """`nn.ConvTranspose1d` on trains."""


class StreamingConvTranspose2d(StreamingLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` on trains."""


class StreamingConvTranspose3d(StreamingLayer, nn.ConvTranspose3d):  # type: ignore[misc]
    """`nn.ConvTranspose3d` on trains."""


STREAMING: dict[type[nn.Module], type[StreamingLayer]] = {
    nn.Linear: StreamingLinear,
    nn.Conv1d: StreamingConv1d,
    nn.Conv2d: StreamingConv2d,
    nn.Conv3d: StreamingConv3d,
    nn.ConvTranspose1d: StreamingConvTranspose1d,
    nn.ConvTranspose2d: StreamingConvTranspose2d,
    nn.ConvTranspose3d: StreamingConvTranspose3d,
    Affine: StreamingAffine,
}
"""Weighted layers, and what each becomes."""


class Rescale(nn.Module):
    """Spikes of one site in amplitudes of another: on the way past the layers, and into concatenations."""

    def __init__(self, stream: Stream, source: StreamingSite | None, to: StreamingSite | None) -> None:
        super().__init__()
        self.stream, self.source, self.feeds = stream, (source,), (to,)

    @property
    def factor(self) -> Tensor:
        """What currents are multiplied by."""
        up = torch.ones(()) if self.source[0] is None else self.source[0].amplitude
        return up if self.feeds[0] is None else up / self.feeds[0].amplitude

    def forward(self, x: Tensor) -> Tensor:
        return x if self.stream.dense else x * self.factor.to(x.dtype)


@dataclasses.dataclass(frozen=True)
class PooledInput(Neuron):
    """Max pooling of accumulated input: `h <- r h + z`, out goes `p(t) - r p(t-1)` with p(t) = pool(h(t)).

    What comes out accumulates to p(t). It fires nothing: currents come out.

    Args:
        pool: the dense network's pooling.
        ratio: r, what accumulated input grows by in a step.
    """

    pool: Callable[[Tensor], Tensor]
    ratio: float

    name = "pooled-input"

    def init(self, x: Tensor) -> State:
        return (torch.zeros_like(x), None)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, last = state
        h = self.ratio * h + x
        p = self.pool(h)
        return (p if last is None else p - self.ratio * last), (h, p)

    def window(self, xs: Tensor) -> Tensor:
        """All steps are pooled at once; only what accumulates goes step by step."""
        h = [xs[0]]
        for x in xs[1:]:
            h.append(self.ratio * h[-1] + x)
        p = self.pool(torch.cat(h))
        p = p.reshape(len(xs), -1, *p.shape[1:])
        return torch.cat([p[:1], p[1:] - self.ratio * p[:-1]])


class StreamingMaxPool(nn.Module):
    """Max pooling on trains, of accumulated input; see PooledInput."""

    def __init__(self, stream: Stream, pool: nn.Module) -> None:
        super().__init__()
        self.stream, self.pool = stream, pool
        self.neuron = PooledInput(pool, stream.ratio)

    def forward(self, x: Tensor) -> Tensor:
        """`[T * B, ...]` to the pooled shape."""
        if self.stream.dense:
            pooled: Tensor = self.pool(x)
            return pooled
        return self.neuron.window(self.stream.split(x)).flatten(0, 1)


class Readout(nn.Module):
    """The value of a train, at the output or ahead of what works on values: `[T * B, ...] -> [B, ...]`."""

    def __init__(self, stream: Stream, source: StreamingSite | None = None) -> None:
        super().__init__()
        self.stream, self.source = stream, (source,)

    def forward(self, x: Tensor) -> Tensor:
        if self.stream.dense:
            return x
        value: Tensor = torch.tensordot(x.new_tensor(self.stream.weights), self.stream.split(x), dims=1)
        return value if self.source[0] is None else value * self.source[0].amplitude.to(x.dtype)
