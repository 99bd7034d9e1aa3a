"""Plans: what a conversion would make of a network, and everything that speaks against it, before anything is made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from spikeplug.coding.layers import SpikingLayer
from spikeplug.config import ConversionConfig
from spikeplug.errors import ConversionError, NonFiniteError, OptionError
from spikeplug.graph.capture import Captured, capture, operands, unwrapped
from spikeplug.graph.draft import STRUCTURAL, Draft
from spikeplug.graph.folding import fold
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.nonlinear import approximate_graph
from spikeplug.graph.operations import Kind, kinds
from spikeplug.graph.products import Product
from spikeplug.graph.routing import route
from spikeplug.graph.streaming import StreamingLayer, StreamingSite
from spikeplug.graph.windows import labels_of_operand, operand_kinds, place_windows

from .record import Conversion
from .report import ConversionReport, Op, dynamic_note

ABSORBED = "absorbed into the next layer's neurons"
HIDDEN = (*STRUCTURAL, "value")
"""Kinds of nodes that no report lists."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What keeps an operation from being converted.

    Attributes:
        operation: its path; empty where the whole network is meant.
        line: where in the source it stands, `file.py:12`.
        remedy: what to do, in words that the command line and Python share.
    """

    operation: str
    type: str
    line: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        where = f" at {self.line}" if self.line else ""
        what = f"operation '{self.operation}' ({self.type}{where}) " if self.operation else ""
        return f"{what}{self.reason}: {self.remedy}"


def refuse(problems: Sequence[Problem], head: str) -> None:
    """Raises ConversionError where there are problems; the message has the head and all of them."""
    few = [str(each) for each in problems]
    if len(few) == 1:
        raise ConversionError(f"{head}: {few[0]}")
    if few:
        raise ConversionError("\n".join([f"{head}, {len(few)} problems:", *(f"  {each}" for each in few)]))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion would make of a network. Nothing of the network is changed or copied by it.

    Attributes:
        network: class of the network.
        report: every operation with its role, and the delay.
        problems: everything that speaks against the conversion; `apply` refuses where there is any.
        make: makes the converted network.
    """

    network: str
    config: ConversionConfig
    report: ConversionReport
    problems: tuple[Problem, ...]
    make: Callable[[], nn.Module] = dataclasses.field(repr=False)

    def check(self) -> None:
        """Raises ConversionError: there are problems; the message has all of them."""
        refuse(self.problems, f"{self.network} cannot be converted by '{self.config.recipe}'")

    def apply(self) -> nn.Module:
        """The converted network, not yet calibrated: a new module, which shares the tensors that no rewrite changed.

        Raises:
            ConversionError: there are problems.
        """
        self.check()
        return self.make()

    def summary(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        problems = [dataclasses.asdict(each) for each in self.problems]
        return {"network": self.network, **self.report.to_dict(), "problems": problems}

    def __str__(self) -> str:
        rows = [f"  problem: {each}" for each in self.problems]
        return "\n".join([f"{self.network}, {self.report}", *rows])


def plan_network(model: nn.Module, config: ConversionConfig, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
    """Plan the conversion of a network of any kind for inputs like these.

    Raises:
        ConversionError: it cannot be captured, or there is nothing in it to convert.
        OptionError: it does not take such inputs, or the configuration names what is not there.
    """
    model = unwrapped(model)
    captured = capture(model, args, kwargs)
    folded = {**fold(captured), **_removed(captured, model)}
    problems = tuple(_problems(captured, model, config))
    draft = Draft(captured, config)
    _check_patterns(draft, config)
    network = build(captured, folded, config.model_copy(update={"exclude": (*config.exclude, *_named(problems))}))
    report = network.conversion.report
    return Plan(captured.name, config, report, problems, functools.partial(build, captured, folded, config))


def _named(problems: tuple[Problem, ...]) -> tuple[str, ...]:
    return tuple(each.operation for each in problems if each.operation)


def build(captured: Captured, folded: Mapping[str, str], config: ConversionConfig) -> SpikingGraph:
    """Put a converted network together. Raises ConversionError, OptionError."""
    draft = Draft(captured, config)
    macs = {draft.path(node): count for node, count in _counted(draft)}
    encoder, neuron = config.build()
    approximated = approximate_graph(draft, activations=not encoder.streams)
    if encoder.streams:
        if neuron is None:
            raise OptionError(f"code '{encoder.name}' streams: a neuron that answers currents is needed")
        stream, delay = route(draft)
    else:
        stream, delay = None, place_windows(draft)
    network = SpikingGraph(draft, stream)
    ops = tuple(_rows(network, draft, macs, approximated, folded))
    report = ConversionReport(config.recipe, ops, "sample", delay)
    network.conversion = Conversion(config, report, "network", dict(folded))
    return network


def _removed(captured: Captured, model: nn.Module) -> dict[str, str]:
    """Layers that do nothing in evaluation, and are gone."""
    left = {node.meta["path"] for node in captured.graph.nodes}
    gone = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and isinstance(module, gone) and name not in left
    }


def refuse_nonfinite(model: nn.Module) -> None:
    """Raise NonFiniteError where a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConversionError(f"parameter '{name}' has no shape yet: run the network once before it is converted")
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"parameter '{name}' holds NaN or infinity: the checkpoint is damaged")


def _problems(captured: Captured, model: nn.Module, config: ConversionConfig) -> Iterator[Problem]:
    known = kinds(captured)
    if not any(kind.kind in ("weighted", "product") for kind in known.values()):
        raise ConversionError(
            f"{captured.name} has no operation that can receive spikes: a linear layer, a convolution, or a product of "
            "activations"
        )
    norms = [name for name, module in model.named_modules() if _uses_batch(module)]
    if norms:
        yield Problem(
            "", "", "", f"BN '{norms[0]}' uses statistics of the batch", "call model.eval() before converting"
        )
    if captured.mutated:
        names = ", ".join(captured.mutated)
        yield Problem("", "", "", f"its forward changes its buffers ({names})", "a converted network keeps no state")
    if captured.batch.isdigit():
        fixed = f"its forward fixes the number of samples to {captured.batch}, or the example lacks its batch axis"
        yield Problem(
            "", "", "", fixed, "take it from x.shape[0], and convert with the size that is used if it must be fixed"
        )
    for node, kind in known.items():
        if kind.kind in ("other", "recurrent") and not config.excludes(node.meta["path"], kind.kind, kind.type):
            yield _unknown(node, kind)


def _uses_batch(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats


def _unknown(node: fx.Node, kind: Kind) -> Problem:
    path = node.meta["path"]
    recurrent = kind.kind == "recurrent"
    reason = "is recurrent, which has no spiking form" if recurrent else f"({node.target}) has no known role"
    remedy = f"exclude=['{path}'] leaves it dense, or a plugin's hook spikeplug_operations gives it a role"
    return Problem(path, kind.type, node.meta["line"], reason, remedy)


def _check_patterns(draft: Draft, config: ConversionConfig) -> None:
    streams = config.build()[0].streams
    words: dict[str, tuple[str, ...]] = {"": ("image", "value", "sum", "relu", "clip")} if streams else {}
    for node in draft.graph.nodes:
        kind = draft.kinds[node]
        if kind.kind in STRUCTURAL:
            continue
        words[draft.path(node)] = draft.labels(node)
        if streams and kind.kind == "activation":
            words[draft.path(node)] = ("clip" if kind.op == "clip" else "relu", *draft.labels(node))
        if kind.kind == "product":
            words |= {
                f"{draft.path(node)}.{name}": labels_of_operand(draft, node, name)
                for name in operand_kinds(draft, node)
            }
    config.check_patterns(words)


def _counted(draft: Draft) -> Iterator[tuple[fx.Node, tuple[int, int]]]:
    """Multiply-accumulates of every weighted operation and product, and elements of the others, for one sample."""
    samples = draft.captured.samples
    # What is computed from inputs without samples is computed once for all of them, and whole for one.
    inputs = [node for node in draft.graph.nodes if node.op == "placeholder"]
    of_samples = {node for node in inputs if draft.captured.batch in node.meta["dims"]}
    for node in draft.graph.nodes:
        if any(each in of_samples for each in node.all_input_nodes):
            of_samples.add(node)
        kind, shape = draft.kinds[node].kind, node.meta["shape"]
        if (shape is None and kind != "recurrent") or kind in STRUCTURAL:
            continue
        elements = math.prod(shape or ())
        per = 0
        if kind == "weighted":
            weight = draft.tensor(operands(node)[1])
            assert weight is not None
            turned = "conv_transpose" in str(node.target)
            places = math.prod(node.args[0].meta["shape"]) if turned else elements
            per = places * math.prod(weight.shape[1:])
        elif kind == "product" and draft.kinds[node].op == "matmul":
            per = elements * node.args[0].meta["shape"][-1]
        elif kind == "recurrent":
            matrices = [draft.tensor(each) for each in node.all_input_nodes]
            rows = math.prod(node.args[0].meta["shape"][:-1])
            per = rows * sum(each.numel() for each in matrices if each is not None and each.ndim == 2)
        parts = samples if node in of_samples else 1
        yield node, (per // parts, elements // parts)


def _rows(
    network: SpikingGraph,
    draft: Draft,
    macs: Mapping[str, tuple[int, int]],
    approximated: Mapping[str, str],
    folded: Mapping[str, str],
) -> Iterator[Op]:
    for node in draft.graph.nodes:
        kind, path = draft.kinds[node], draft.path(node)
        if kind.kind in HIDDEN:
            continue
        count, elements = macs.get(path, (0, 0))
        op = _row(network, node, kind, path, count, approximated)
        if path in draft.decoded:
            code = str(draft.config.build(path, *draft.labels(node))[0])
            op = Op(path, kind.type, "decoded", count, code, "", draft.decoded[path])
        yield dataclasses.replace(op, elements=0 if count else elements, line=node.meta["line"])
    for path, what in folded.items():
        yield Op(path, what, "folded")


def _row(
    network: SpikingGraph, node: fx.Node, kind: Kind, path: str, count: int, approximated: Mapping[str, str]
) -> Op:
    module = network.program.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, SpikingLayer):
        site = module.source
        return Op(path, kind.type, "spiking", count, str(site.encoder), dynamic_note(site.encoder), (site.name,))
    if isinstance(module, StreamingLayer):
        names = tuple(site.name for site in module.sites)
        role, note = ("decoded", "reads averages of spikes") if module.pooled else ("spiking", "")
        return Op(path, kind.type, role, count, str(module.sites[0].encoder), note, names)
    if isinstance(module, StreamingSite):
        return Op(path, kind.type, "neuron", 0, str(module.encoder), sites=(module.name,))
    if path in approximated:
        return Op(path, approximated[path], "approximated", 0, kind.type)
    if kind.kind == "product":
        return _product_row(network, node, kind, path, count, module)
    if kind.kind in ("nonlinear", "other", "weighted", "recurrent", "lookup"):
        note = "what it computes is not known and not counted" if kind.kind == "other" else ""
        return Op(path, kind.type, "dense", count, note=note)
    if network.stream is not None:
        return Op(path, kind.type, "neuron" if kind.kind == "maxpool" else "coded", 0)
    return Op(path, kind.type, "neuron", 0, note=ABSORBED)


def _product_row(
    network: SpikingGraph, node: fx.Node, kind: Kind, path: str, count: int, module: nn.Module | None
) -> Op:
    """A product of two activations: decoded where spikes carry both."""
    if isinstance(module, Product):
        sites = tuple(site for site in module.sites if site is not None)
        if len(sites) == 2:
            names = tuple(dict.fromkeys(site.name for site in sites))
            return Op(path, kind.type, "decoded", count, str(sites[0].encoder), dynamic_note(sites[0].encoder), names)
    return Op(path, kind.type, "dense", count)
