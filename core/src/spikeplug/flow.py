"""Codes whose trains flow: a layer's spikes reach the next layer's neurons step by step, and no window is decoded.

A train is a tensor `[T * B, ...]`, step by step, of spikes or of the currents that they cause. Between two sites
everything is linear, so a layer works on all steps at once. Currents are in amplitudes of the neuron that they reach:
amplitudes, and a bias's share of every step, are absorbed into the weights of the layers (CSS, Algorithm 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikeplug.config import ConversionConfig
from spikeplug.errors import CalibrationError, ConversionError, OptionError
from spikeplug.graph import Affine, Kind, Traced, clipped, fed
from spikeplug.site import Coder, version
from spikeplug.stats import ActivationStats
from spikeplug.types import CodeParams, Encoder, Neuron, State


class Flow:
    """What all parts of one network share.

    Attributes:
        dense: whether plain activations pass in the place of trains.
        weights: d(t) of every site `[T]`.
        watch: called by every site with its currents and spikes `[T, B, ...]`, where it is set.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.dense = False
        unit = CodeParams(torch.ones(()), torch.zeros(()))
        self.weights = [float(d) for d in encoder.weights(unit)]
        self.watch: Callable[[FlowSite, Tensor, Tensor], None] | None = None

    @property
    def steps(self) -> int:
        """T."""
        return len(self.weights)

    @property
    def total(self) -> float:
        """Sum of d(t)."""
        return sum(self.weights)

    @property
    def ratio(self) -> float:
        """`d(t) / d(t + 1)`, what accumulated input grows by in a step.

        Raises:
            ConversionError: it is not the same at every step, so that input does not accumulate.
        """
        ratios = [now / later for now, later in zip(self.weights, self.weights[1:], strict=False)]
        if any(abs(ratio - ratios[0]) > 1e-9 * ratios[0] for ratio in ratios):
            raise ConversionError("max pooling needs a code whose weights d(t) fall by one factor from step to step")
        return ratios[0] if ratios else 1.0

    def split(self, x: Tensor) -> Tensor:
        """`[T * B, ...] -> [T, B, ...]`, a view."""
        return x.reshape(self.steps, -1, *x.shape[1:])


class FlowSite(Coder):
    """Neurons that turn currents into spikes; or, at the network's input, the code of an activation.

    Args:
        kind: `image` for the network's input; `relu`, `clip`; `sum` where signed values become spikes anew.
        activation: what the neurons apply to their accumulated input.
    """

    def __init__(self, name: str, kind: str, encoder: Encoder, neuron: Neuron, activation: Kind, flow: Flow) -> None:
        super().__init__(name, channels=())
        self.kind, self.encoder, self.flow, self.activation = kind, encoder, flow, activation
        # Without its own activation a neuron may exist all the same: this says now that this one does not.
        self._neuron = neuron
        if kind != "image":
            self._neuron = neuron.activated(activation.op or "identity", activation.top, flow.steps)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.encoder}, {self._neuron}"

    @property
    def neuron(self) -> Neuron:
        """The neuron, its largest value in amplitudes."""
        if self.activation.op != "clip":
            return self._neuron
        top = self.activation.top / float(self.amplitude)
        return self._neuron.activated("clip", top, self.flow.steps)

    @property
    def amplitude(self) -> Tensor:
        """What a decoded sum of 1 stands for."""
        self.require_calibrated()
        scale: Tensor = self.scale  # type: ignore[assignment]
        return scale

    @property
    def latency(self) -> int:
        """Steps that its spikes come behind its input."""
        return 0 if self.kind == "image" else self._neuron.latency

    def fit(self, stats: ActivationStats | None) -> Mapping[str, Tensor]:
        assert stats is not None
        found = self.encoder.fit(stats).tensors()
        if found["scale"].numel() != 1:
            raise CalibrationError(
                f"code '{self.encoder.name}' flows with one scale per site, not with one per channel"
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
        return clipped(self.activation)(x)

    def forward(self, x: Tensor) -> Tensor:
        """Spikes `[T * B, ...]` of currents `[T * B, ...]`, or of an image `[B, ...]`."""
        with self.named():
            if self.flow.dense:
                x = self.activate(x)
                if self.observer is not None:
                    self.observer.update(x)
                return x
            if self.kind == "image":
                spikes = self.encoder.encode(x, self.params())
                currents = spikes
            else:
                currents = self.flow.split(x)
                spikes = _in_storage_order(self.neuron.window, currents)
        if self.counters:
            # One pass; the sum of magnitudes would take two.
            dims = tuple(range(spikes.ndim - self.spatial)) if self.spatial else None
            self.count(torch.count_nonzero(spikes, dim=dims), spikes[0].numel(), spikes.numel())
        if self.flow.watch is not None:
            self.flow.watch(self, currents, spikes)
        return spikes.flatten(0, 1)


def _in_storage_order(window: Callable[[Tensor], Tensor], xs: Tensor) -> Tensor:
    """Run neurons, which are independent, on `[T, N]` in the order in which they lie in memory."""
    strides = xs.stride()
    order = sorted(range(1, xs.ndim), key=lambda dim: (-strides[dim], dim))
    flat = xs.permute(0, *order).reshape(len(xs), -1)
    spikes = window(flat).reshape([len(xs), *(xs.shape[dim] for dim in order)])
    return spikes.permute(0, *(1 + order.index(dim) for dim in range(1, xs.ndim)))


class FlowLayer(nn.Module):
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
        self, flow: Flow, sites: tuple[FlowSite, ...], source: FlowSite | None, to: FlowSite | None, pooled: bool
    ) -> None:
        """Say where currents come from and go to."""
        # In tuples, which hide the sites from nn.Module's registration.
        self.flow, self.sites, self.pooled = flow, sites, pooled
        for site in sites:
            site.spatial = max(site.spatial, len(getattr(self, "kernel_size", ())))
        self.source, self.feeds = (source,), (to,)
        self._kept: tuple[list[tuple[Tensor, int]], Tensor, Tensor | None] | None = None

    def line(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's map with the given parameters."""
        raise NotImplementedError

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
        bias = None if self.bias is None else self.bias / down / self.flow.total
        if not training:
            if weight.ndim == 4 and weight.shape[1] > 1:
                weight = weight.detach().contiguous(memory_format=torch.channels_last)
            self._kept = (key, weight.detach(), None if bias is None else bias.detach())
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Currents of a train; or the dense layer's output."""
        if self.flow.dense:
            return self.line(x, self.weight, self.bias)
        return self.line(x, *self.absorbed())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _same(one: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    return all(x is y and now == then for (x, now), (y, then) in zip(one, other, strict=True))


class FlowLinear(FlowLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` on trains."""

    def line(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)


class _FlowConv(FlowLayer):
    def line(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return y


class FlowConv1d(_FlowConv, nn.Conv1d):
    """`nn.Conv1d` on trains."""


class FlowConv2d(_FlowConv, nn.Conv2d):
    """`nn.Conv2d` on trains."""


class FlowConv3d(_FlowConv, nn.Conv3d):
    """`nn.Conv3d` on trains."""


class FlowAffine(FlowLayer, Affine):  # type: ignore[misc]
    """A scale and a shift per channel, on trains."""

    def line(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return Affine.line(self, x, weight, bias)


FLOWING: dict[type[nn.Module], type[FlowLayer]] = {
    nn.Linear: FlowLinear,
    nn.Conv1d: FlowConv1d,
    nn.Conv2d: FlowConv2d,
    nn.Conv3d: FlowConv3d,
    Affine: FlowAffine,
}
"""Weighted layers, and what each becomes."""


class Rescale(nn.Module):
    """Spikes of one site in amplitudes of another: on the way past the layers, and into concatenations."""

    def __init__(self, flow: Flow, source: FlowSite | None, to: FlowSite | None) -> None:
        super().__init__()
        self.flow, self.source, self.feeds = flow, (source,), (to,)

    @property
    def factor(self) -> Tensor:
        """What currents are multiplied by."""
        up = torch.ones(()) if self.source[0] is None else self.source[0].amplitude
        return up if self.feeds[0] is None else up / self.feeds[0].amplitude

    def forward(self, x: Tensor) -> Tensor:
        return x if self.flow.dense else x * self.factor.to(x.dtype)


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


class FlowMaxPool(nn.Module):
    """Max pooling on trains, of accumulated input; see PooledInput."""

    def __init__(self, flow: Flow, pool: nn.Module) -> None:
        super().__init__()
        self.flow, self.pool = flow, pool
        self.neuron = PooledInput(pool, flow.ratio)

    def forward(self, x: Tensor) -> Tensor:
        """`[T * B, ...]` to the pooled shape."""
        if self.flow.dense:
            pooled: Tensor = self.pool(x)
            return pooled
        return self.neuron.window(self.flow.split(x)).flatten(0, 1)


class Called(nn.Module):
    """A function and its fixed arguments, as a module."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, dict(kwargs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x, *self.args, **self.kwargs)
        return y


class Readout(nn.Module):
    """The value of the output's train: `[T * B, ...] -> [B, ...]`."""

    def __init__(self, flow: Flow, source: FlowSite | None) -> None:
        super().__init__()
        self.flow, self.source = flow, (source,)

    def forward(self, x: Tensor) -> Tensor:
        if self.flow.dense:
            return x
        value: Tensor = torch.tensordot(x.new_tensor(self.flow.weights), self.flow.split(x), dims=1)
        return value if self.source[0] is None else value * self.source[0].amplitude.to(x.dtype)


def route(traced: Traced, config: ConversionConfig) -> tuple[Flow, int]:
    """Put sites, layers on trains and rescaling in place, in the traced graph; return the shared state and the delay.

    Raises:
        ConversionError: an operation cannot be done on trains; the message names it.
    """
    flow = Flow(config.build()[0])
    _pool_first(traced)
    _place_sites(traced, config, flow)
    _fit_units(traced, flow)
    return flow, flow.steps + max(_starts(traced).values(), default=0)


def _pool_first(traced: Traced) -> None:
    """Let max pooling act on the input of the activation ahead of it: both are monotone, so the result is the same."""
    moved = True
    while moved:
        moved = False
        for pool in traced.of_kind("maxpool"):
            before = fed(pool)
            if traced.kinds[before].kind == "activation" and len(before.users) == 1:
                pool.replace_all_uses_with(before)
                pool.args = (fed(before), *pool.args[1:])
                before.args = (pool, *before.args[1:])
                before.prepend(pool)
                moved = True


def _place_sites(traced: Traced, config: ConversionConfig, flow: Flow) -> None:
    def site(path: str, kind: str, activation: Kind) -> FlowSite:
        encoder, neuron = config.build(path, kind)
        assert neuron is not None
        if encoder.steps != flow.steps:
            raise OptionError(
                f"'{path}' has {encoder.steps} steps, the network {flow.steps}: trains that flow have one T"
            )
        try:
            return FlowSite(path, kind, encoder, neuron, activation, flow)
        except OptionError as error:
            raise ConversionError(f"'{path}' ({activation.type}): {error}") from None

    first = next(
        node for node in reversed(list(traced.graph.nodes)) if traced.kinds[node].kind in ("input", "preprocessing")
    )
    plain = Kind("site", "input")
    path = traced.free("image")
    image = traced.insert(first, path, site(path, "image", plain), plain)
    first.replace_all_uses_with(image, delete_user_cb=lambda user: user is not image)
    spikes = {image}  # what carries spikes, or averages and the like of them
    for node in list(traced.graph.nodes):
        kind = traced.kinds[node]
        if kind.kind == "activation":
            path = traced.paths[node]
            traced.root.add_submodule(path, site(path, "clip" if kind.op == "clip" else "relu", kind))
            with traced.graph.inserting_before(node):
                new = traced.graph.call_module(path, (node.args[0],))
            traced.kinds[new], traced.paths[new] = dataclasses.replace(kind, kind="site"), path
            node.replace_all_uses_with(new)
            traced.graph.erase_node(node)
            spikes.add(new)
        elif kind.kind in ("linear", "cat") and all(each in spikes for each in _trains(traced, node)):
            spikes.add(node)
        elif kind.kind == "weighted":
            before = fed(node)
            if before not in spikes:
                path = f"{traced.paths[before]}_spikes"
                signed = Kind("site", "signed sum")
                new = traced.insert(before, path, site(path, "sum", signed), signed)
                before.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)  # type: ignore[misc]
                spikes.add(new)


def _trains(traced: Traced, node: fx.Node) -> list[fx.Node]:
    return [each for each in node.all_input_nodes if traced.kinds[each].kind != "size"]


def _site(traced: Traced, node: fx.Node) -> FlowSite | None:
    module = traced.module(node) if node.op == "call_module" else None
    return module if isinstance(module, FlowSite) else None


def _fit_units(traced: Traced, flow: Flow) -> None:
    """Say of every train in whose amplitudes it is; layers absorb the change, elsewhere a Rescale makes it."""
    wanted = _wanted(traced)
    unit: dict[fx.Node, FlowSite | None] = {}
    pooled: dict[fx.Node, bool] = {}
    fired: dict[fx.Node, tuple[FlowSite, ...]] = {}
    for node in list(traced.graph.nodes):
        kind = traced.kinds[node].kind
        trains = _trains(traced, node)
        if kind in ("input", "size", "preprocessing"):
            continue
        site = _site(traced, node)
        pooled[node] = (
            site is None
            and kind not in ("weighted", "affine")
            and (traced.kinds[node].pools or any(pooled.get(each, False) for each in trains))
        )
        fired[node] = tuple(dict.fromkeys(each for train in trains for each in fired.get(train, ())))
        if site is not None:
            fired[node] = (site,)
            if site.kind != "image":
                _express(traced, flow, node, unit, site)
            unit[node] = site
        elif kind in ("weighted", "affine"):
            layer = traced.module(node)
            layer.__class__ = FLOWING[type(layer)]
            assert isinstance(layer, FlowLayer)
            layer.attach(flow, fired[trains[0]], unit[trains[0]], wanted[node], pooled[trains[0]])
            unit[node] = wanted[node]
        elif kind == "linear":
            unit[node] = unit[trains[0]]
        elif kind == "maxpool":
            unit[node] = unit[trains[0]]
            _pool(traced, flow, node, unit, pooled, fired)
        elif kind in ("add", "cat"):
            shared = {unit[each] for each in trains}
            unit[node] = shared.pop() if len(shared) == 1 else wanted[node]
            _express(traced, flow, node, unit, unit[node])
        elif kind == "output":
            with traced.graph.inserting_before(node):
                path = traced.free("readout")
                traced.root.add_submodule(path, Readout(flow, unit[trains[0]]))
                read = traced.graph.call_module(path, (trains[0],))
            traced.kinds[read], traced.paths[read] = Kind("output", "readout"), path
            node.args = (read,)


def _wanted(traced: Traced) -> dict[fx.Node, FlowSite | None]:
    """The site that a train feeds, where it feeds one only: its currents are then in that one's amplitudes."""
    wanted: dict[fx.Node, FlowSite | None] = {}
    for node in reversed(list(traced.graph.nodes)):
        found = set()
        for user in node.users:
            kind = traced.kinds[user].kind
            if kind == "size":
                continue
            found.add(_site(traced, user) or (None if kind in ("weighted", "affine", "output") else wanted[user]))
        wanted[node] = found.pop() if len(found) == 1 else None
    return wanted


def _express(
    traced: Traced, flow: Flow, node: fx.Node, unit: dict[fx.Node, FlowSite | None], to: FlowSite | None
) -> None:
    """Rescale those inputs of a node that are not in the amplitudes of `to`."""
    for index, train in enumerate(_trains(traced, node)):
        if unit[train] is to:
            continue
        path = f"{traced.paths[node]}_scale{index or ''}"
        traced.root.add_submodule(path, Rescale(flow, unit[train], to))
        with traced.graph.inserting_before(node):
            scaled = traced.graph.call_module(path, (train,))
            traced.kinds[scaled], traced.paths[scaled], unit[scaled] = Kind("linear", "rescale"), path, to
        node.replace_input_with(train, scaled)


def _pool(traced: Traced, flow: Flow, node: fx.Node, *found: dict[fx.Node, Any]) -> None:
    """Pool accumulated input in the place of a node; what is known of the node holds of what stands for it."""
    pool = traced.module(node) if node.op == "call_module" else Called(node.target, node.args[1:], node.kwargs)  # type: ignore[arg-type]
    path = f"{traced.paths[node]}_trains"
    traced.root.add_submodule(path, FlowMaxPool(flow, pool))
    with traced.graph.inserting_before(node):
        new = traced.graph.call_module(path, (node.args[0],))
    for known in (traced.kinds, traced.paths, *found):
        known[new] = known[node]
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


def _starts(traced: Traced) -> dict[fx.Node, int]:
    """Step of the network's clock at which a train begins: silent steps add up along the longest path."""
    starts: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        site = _site(traced, node)
        begun = max((starts[each] for each in node.all_input_nodes), default=0)
        starts[node] = begun + (site.latency if site is not None else 0)
    return starts
