"""Codes whose spike trains stream: where trains begin and end in a captured network, and in whose amplitudes they are.

Between two sites everything is linear. What is not (norms, softmax, GELU, products) works on values: trains that reach
it are decoded there, and values that a weighted layer reads become trains anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from spikeplug.errors import ConversionError, OptionError

from .draft import Draft, keeps_rows
from .folding import is_arithmetic
from .operations import Kind
from .streaming import STREAMING, Affine, Readout, Rescale, Stream, StreamingLayer, StreamingMaxPool, StreamingSite
from .windows import labels_of_operand, operand_kinds, sequence_of

PASSING = ("affine", "linear", "cat", "maxpool", "activation")
"""Kinds of operations that pass a train on."""


def reshape_rows(x: Tensor, sizes: list[int]) -> Tensor:
    """`reshape` to sizes of which the first is that of `x`, whatever is said in its place."""
    return x.reshape(len(x), *sizes[1:])


class Called(nn.Module):
    """A function and its fixed arguments, as a module."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, dict(kwargs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x, *self.args, **self.kwargs)
        return y


class Router:
    """Puts sites, layers on trains and rescaling in place."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.stream = Stream(draft.config.build()[0])
        self.trains: set[fx.Node] = set()
        self.spikes: set[fx.Node] = set()
        """Of the trains, those that carry spikes, or averages and the like of them."""
        self.coded: dict[fx.Node, fx.Node] = {}
        """Currents or a value -> its spikes."""
        self.decoded: dict[fx.Node, fx.Node] = {}
        """A train -> its value."""
        self.products: list[fx.Node] = []

    def run(self) -> tuple[Stream, int]:
        """The shared state, and the steps to the result.

        Raises:
            ConversionError: a neuron has no form with an activation; the message names it.
            OptionError: sites differ in their number of steps.
        """
        _pool_first(self.draft)
        for node in self.draft.of_kind("weighted"):
            self.draft.weigh(node)
        self._code_input()
        for node in list(self.draft.graph.nodes):
            kind = self.draft.kinds[node].kind
            if kind == "size" and node.meta["shape"] is not None:
                for each in list(node.all_input_nodes):  # masks and indices are made of values
                    node.replace_input_with(each, self._value_of(each))
            elif kind not in ("input", "size", "site", "value"):
                self._place(node)
        self._count_rows_of_values()
        units = _Units(self)
        units.run()
        for node in self.products:
            sites = (site for each in node.args for site in units.fired[each.args[0]])  # type: ignore[union-attr,index]
            self.draft.decoded[self.draft.path(node)] = tuple(dict.fromkeys(site.name for site in sites))
        return self.stream, self._delay()

    def _count_rows_of_values(self) -> None:
        """What asks how many rows a train `[T * B, ...]` has means B: it asks the value that the train is of."""
        for node in self.draft.graph.nodes:
            if str(node.target) == "aten.sym_size.int" and node.args[1] in (0, -len(node.args[0].meta["dims"])):
                source = node.args[0]
                while source in self.trains:
                    source = next(each for each in source.all_input_nodes if each.op != "get_attr")
                node.args = (source, 0)

    def _code_input(self) -> None:
        """Images become spikes once, for all that read them but arithmetic that is done ahead of the code."""
        raw: set[fx.Node] = set()
        for node in self.draft.graph.nodes:
            kind, inputs = self.draft.kinds[node].kind, self.draft.activations(node)
            if kind == "input" or (is_arithmetic(node, kind) and inputs and all(each in raw for each in inputs)):
                raw.add(node)
        for node in [each for each in self.draft.graph.nodes if each in raw]:
            if any(user not in raw and self._reaches_layer(user) for user in node.users):
                new = self._coded(node, "image", self.draft.free("image"))
                self._reread(node, new, {new, *raw})

    def _reaches_layer(self, node: fx.Node) -> bool:
        """Whether an operation is a layer on spikes, or passes trains on to one."""
        kind = self.draft.kinds[node].kind
        if kind == "weighted":
            return not self.draft.excluded(node)
        return kind in PASSING and any(self._reaches_layer(user) for user in node.users)

    def _reread(self, node: fx.Node, new: fx.Node, but: set[fx.Node]) -> None:
        """Let all that read a node, but some, and but what asks for its sizes, read another."""
        sizes = {user for user in node.users if self.draft.kinds[user].kind == "size" and user.meta["shape"] is None}
        kept = but | sizes
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)

    def _place(self, node: fx.Node) -> None:
        draft, kind = self.draft, self.draft.kinds[node]
        inputs = draft.activations(node)
        if kind.kind == "weighted" and not draft.excluded(node):
            node.args = (self._spikes_of(inputs[0]), *node.args[1:])
            self.trains.add(node)
        elif kind.kind == "product" and not self._product_excluded(node):
            for index in (0, 1):
                spikes = self._spikes_of(node.args[index])  # type: ignore[arg-type]
                node.update_arg(index, self._value_of(spikes))
            self.products.append(node)
        elif inputs and all(each in self.trains for each in inputs) and self._streams(node):
            self._stream(node, inputs)
        else:
            for each in inputs:
                node.replace_input_with(each, self._value_of(each, kind.kind == "output"))

    def _product_excluded(self, node: fx.Node) -> bool:
        names = operand_kinds(self.draft, node)
        labels = (labels_of_operand(self.draft, node, name) for name in names)
        return any(self.draft.config.excludes(self.draft.path(node), *each) for each in labels)

    def _streams(self, node: fx.Node) -> bool:
        """Whether an operation works on all steps at once."""
        kind = self.draft.kinds[node]
        # What is no train has no steps: a constant may say places or factors, and nothing else may be added or joined.
        others = [each for each in node.all_input_nodes if each not in self.trains and each.meta["shape"] is not None]
        if any(each.op != "get_attr" or kind.kind in ("add", "cat") for each in others):
            return False
        if kind.kind == "maxpool":
            return self.stream.accumulates and keeps_rows(node, self.draft)
        if kind.kind == "affine":
            return keeps_rows(node, self.draft)
        if kind.kind == "activation":
            return True
        return kind.kind in ("linear", "add", "cat") and not self.draft.excluded(node) and keeps_rows(node, self.draft)

    def _stream(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        draft, kind = self.draft, self.draft.kinds[node]
        if kind.kind == "activation":
            site = self._site(draft.path(node), "clip" if kind.op == "clip" else "relu", kind)
            new = draft.swap(node, site, tuple(inputs), dataclasses.replace(kind, kind="site"))
            self.trains.add(new)
            self.spikes.add(new)
            return
        if kind.kind == "affine":
            tensors = [draft.parameter(str(each.target)) for each in node.args[1:3]]  # type: ignore[union-attr]
            node = draft.swap(node, Affine(tensors[0], tensors[1]), tuple(inputs))
        elif kind.kind == "maxpool":
            pool = Called(node.target, node.args[1:], node.kwargs)  # type: ignore[arg-type]
            node = draft.swap(node, StreamingMaxPool(self.stream, pool), tuple(inputs))
        elif str(node.target) == "aten.reshape.default":
            with draft.graph.inserting_before(node):
                new = draft.graph.call_function(reshape_rows, node.args)
            draft.kinds[new], new.meta = kind, dict(node.meta)
            draft.replace(node, new)
            node = new
        elif str(node.target) == "aten.expand.default":
            node.args = (node.args[0], [-1, *node.args[1][1:]])  # type: ignore[index, misc]
        self.trains.add(node)
        if kind.kind in ("linear", "cat") and all(each in self.spikes for each in inputs):
            self.spikes.add(node)

    def _site(self, path: str, kind: str, activation: Kind) -> StreamingSite:
        encoder, neuron = self.draft.config.build(path, kind)
        assert neuron is not None
        if encoder.steps != self.stream.steps:
            raise OptionError(
                f"'{path}' has {encoder.steps} steps, the network {self.stream.steps}: streamed trains have one T"
            )
        try:
            return StreamingSite(path, kind, encoder, neuron, activation, self.stream)
        except OptionError as error:
            raise ConversionError(f"'{path}' ({activation.type}): {error}") from None

    def _coded(self, source: fx.Node, kind: str, path: str) -> fx.Node:
        """Put a site behind an activation."""
        draft, plain = self.draft, Kind("site", "signed sum" if kind == "sum" else "input")
        site = self._site(path, kind, plain)
        site.sequence = sequence_of(draft, source)
        draft.add(path, site)
        with draft.graph.inserting_after(source):
            new = draft.call(path, (source,), plain, source)
        self.coded[source] = new
        self.trains.add(new)
        self.spikes.add(new)
        return new

    def _spikes_of(self, source: fx.Node) -> fx.Node:
        """The spikes that carry an activation: its own, or those of a site behind it, which all read then."""
        if source in self.spikes:
            return source
        if source not in self.coded:
            currents = source in self.trains
            path = self.draft.free(f"{self.draft.path(source)}_spikes")
            new = self._coded(source, "sum" if currents else "value", path)
            read = new
            if not currents and len(source.users) > 1:
                read = self._value_of(new)
                self.coded[read] = new
            self._reread(source, read, {new})
        return self.coded[source]

    def _value_of(self, source: fx.Node, result: bool = False) -> fx.Node:
        """What works on values reads of a train."""
        if source not in self.trains:
            return source
        if source not in self.decoded:
            draft = self.draft
            path = draft.free("readout" if result else f"{draft.path(source)}_value")
            draft.add(path, Readout(self.stream))
            with draft.graph.inserting_after(source):
                self.decoded[source] = draft.call(path, (source,), Kind("value", "readout"), source)
        return self.decoded[source]

    def _delay(self) -> int:
        """Steps to the result: silent steps add up along the longest path, and so does every window that is decoded."""
        known: dict[fx.Node, int] = {}
        for node in self.draft.graph.nodes:
            begun = max((known[each] for each in node.all_input_nodes), default=0)
            module = self.draft.module(node)
            if isinstance(module, StreamingSite):
                begun += module.latency
            elif isinstance(module, Readout):
                begun += self.stream.steps
            known[node] = begun + (0 if isinstance(module, StreamingSite) else int(getattr(module, "delay", 0)))
        return known[self.draft.end]


def _pool_first(draft: Draft) -> None:
    """Let max pooling act on the input of the activation ahead of it: both are monotone, so the result is the same."""
    moved = True
    while moved:
        moved = False
        for pool in draft.of_kind("maxpool"):
            before = pool.args[0]
            assert isinstance(before, fx.Node)
            if draft.kinds[before].kind == "activation" and len(before.users) == 1:
                pool.replace_all_uses_with(before)
                pool.args = (before.args[0], *pool.args[1:])
                before.args = (pool, *before.args[1:])
                before.prepend(pool)
                before.meta, pool.meta = (
                    {**before.meta, "shape": pool.meta["shape"], "dims": pool.meta["dims"]},
                    dict(pool.meta),
                )
                moved = True


class _Units:
    """Says of every train in whose amplitudes it is; layers absorb the change, elsewhere a Rescale makes it."""

    def __init__(self, router: Router) -> None:
        self.draft, self.stream, self.trains = router.draft, router.stream, router.trains
        self.unit: dict[fx.Node, StreamingSite | None] = {}
        self.pooled: dict[fx.Node, bool] = {}
        self.fired: dict[fx.Node, tuple[StreamingSite, ...]] = {}
        self.wanted = self._wanted()

    def run(self) -> None:
        for node in list(self.draft.graph.nodes):
            module = self.draft.module(node)
            inputs = self._trains(node)
            if isinstance(module, Readout):
                module.source = (self.unit[inputs[0]],)
            elif node in self.trains:
                self._fit(node, module, inputs)

    def _trains(self, node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if each in self.trains]

    def _fit(self, node: fx.Node, module: nn.Module | None, inputs: list[fx.Node]) -> None:
        kind = self.draft.kinds[node]
        layer = type(module) in STREAMING
        site = module if isinstance(module, StreamingSite) else None
        averaged = kind.pools or any(self.pooled[each] for each in inputs)
        self.pooled[node] = site is None and not layer and averaged
        self.fired[node] = tuple(dict.fromkeys(each for train in inputs for each in self.fired[train]))
        if site is not None:
            self.fired[node] = (site,)
            if not site.encodes:
                self._express(node, site)
            self.unit[node] = site
        elif layer:
            assert module is not None
            module.__class__ = STREAMING[type(module)]
            assert isinstance(module, StreamingLayer)
            first = inputs[0]
            module.attach(self.stream, self.fired[first], self.unit[first], self.wanted[node], self.pooled[first])
            self.unit[node] = self.wanted[node]
        elif kind.kind in ("add", "cat"):
            shared = {self.unit[each] for each in inputs}
            self.unit[node] = shared.pop() if len(shared) == 1 else self.wanted[node]
            self._express(node, self.unit[node])
        else:
            self.unit[node] = self.unit[inputs[0]]

    def _wanted(self) -> dict[fx.Node, StreamingSite | None]:
        """The site that a train feeds, where it feeds one only: its currents are then in that one's amplitudes."""
        wanted: dict[fx.Node, StreamingSite | None] = {}
        for node in reversed(list(self.draft.graph.nodes)):
            found: set[StreamingSite | None] = set()
            for user in node.users:
                module = self.draft.module(user)
                if isinstance(module, StreamingSite):
                    found.add(module)
                elif user in self.trains and type(module) not in STREAMING:
                    found.add(wanted[user])
                else:
                    found.add(None)
            wanted[node] = found.pop() if len(found) == 1 else None
        return wanted

    def _express(self, node: fx.Node, to: StreamingSite | None) -> None:
        """Rescale those inputs of a node that are not in the amplitudes of `to`."""
        draft = self.draft
        for index, train in enumerate(self._trains(node)):
            if self.unit[train] is to:
                continue
            path = draft.free(f"{draft.path(node)}_scale{index or ''}")
            draft.add(path, Rescale(self.stream, self.unit[train], to))
            with draft.graph.inserting_before(node):
                scaled = draft.call(path, (train,), Kind("linear", "rescale"), train)
            self.trains.add(scaled)
            self.unit[scaled], self.pooled[scaled], self.fired[scaled] = to, self.pooled[train], self.fired[train]
            node.replace_input_with(train, scaled)


def route(draft: Draft) -> tuple[Stream, int]:
    """Put what a streaming code needs in place; return the shared state and the steps to the result."""
    return Router(draft).run()
