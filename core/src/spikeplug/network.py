"""Conversion of a traced network: one module that takes a batch and returns what the dense network returns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from spikeplug.architecture import Architecture
from spikeplug.config import ConversionConfig
from spikeplug.coverage import ConversionReport, Op, spiking_op
from spikeplug.errors import BundleError, ConversionError, OptionError
from spikeplug.flow import Flow, FlowLayer, FlowSite, route
from spikeplug.graph import Kind, Traced, fed
from spikeplug.layers import SpikingLayer, channels_of, make_spiking
from spikeplug.nonlinear import OPS, approximate, labels_of
from spikeplug.site import Coder, Site

WEIGHTS = "model.safetensors"
MACS = "macs.json"
ORIGIN = "origin.json"
"""What a command line needs to build the dense network again; written where a model has `spikeplug_origin`."""
MICRO_BATCH = 2**19
"""Values of the input's train, T times its samples, that flow at once: what passes between layers should stay in the
cache. 14 CIFAR images at T = 12; of ImageNet one."""

ON_POTENTIAL = "computed on the accumulated input of the neurons behind it"


class SpikingGraph(nn.Module):
    """A converted network. Its modules have the names of the dense network's; it takes a batch and returns a tensor.

    Attributes:
        flow: shared state of trains that flow; None where every activation is a window of its own.
        ops: every operation's path, type and role, in order, and the path of its module.
        delay: steps from the input to the result.
    """

    def __init__(self, traced: Traced, flow: Flow | None, delay: int) -> None:
        super().__init__()
        for node in reversed(list(traced.graph.nodes)):  # what only asked for sizes
            if not node.users and node.op not in ("placeholder", "output"):
                traced.graph.erase_node(node)
        program = fx.GraphModule(traced.root, traced.graph, "SpikingGraph")
        for name, child in program.named_children():
            self.add_module(name, child)
        for name, buffer in program.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._program = (program,)  # a tuple, so that its modules are not registered twice
        self.flow, self.delay = flow, delay
        self.dense_name = traced.model
        self.ops = [(traced.paths[node], traced.kinds[node], _target(node)) for node in traced.graph.nodes]
        self.folded = dict(traced.folded)
        self.approximated: dict[str, str] = {}
        self.macs: dict[str, int] = {}

    @property
    def program(self) -> fx.GraphModule:
        """The operations in order: `program.graph` and `program.code`."""
        return self._program[0]

    def forward(self, x: Tensor) -> Tensor:
        """The dense network's result for a batch, from spikes."""
        # Who watches sees the batch whole.
        if self.flow is not None and not self.flow.dense and self.flow.watch is None and len(x) > 1:
            size = max(1, MICRO_BATCH // (self.flow.steps * max(1, x[0].numel())))
            # Even parts: a small rest would cost as much a layer as a whole one.
            return torch.cat([self.program(part) for part in torch.tensor_split(x, -(-len(x) // size))])
        result: Tensor = self.program(x)
        return result

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Inside, sites pass on what comes in and trains are plain activations: the dense network."""
        coders = [module for module in self.modules() if isinstance(module, Coder)]
        before = [coder.passing for coder in coders]
        for coder in coders:
            coder.passing = True
            coder.forget()
        if self.flow is not None:
            was, self.flow.dense = self.flow.dense, True
        try:
            yield
        finally:
            for coder, passing in zip(coders, before, strict=True):
                coder.passing = passing
                coder.forget()
            if self.flow is not None:
                self.flow.dense = was


@contextlib.contextmanager
def watching(model: SpikingGraph, look: Callable[[FlowSite, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, every site of trains that flow shows its currents and spikes `[T, B, ...]` as they come.

    Raises:
        ConversionError: the code does not flow.
    """
    if model.flow is None:
        raise ConversionError("every activation of this network is a window of its own: there are no currents to watch")
    before, model.flow.watch = model.flow.watch, look
    try:
        yield
    finally:
        model.flow.watch = before


def prepare(model: nn.Module, config: ConversionConfig) -> SpikingGraph:
    """Trace a plain PyTorch model and put its spiking form in place; weights are those of the model.

    Raises:
        ConversionError: it cannot be traced, or an operation has no role; the message names it.
        OptionError: a pattern of the configuration matches nothing.
    """
    if config.passes and set(config.passes) - {"fold-bn"}:
        other = next(iter(set(config.passes) - {"fold-bn"}))
        raise OptionError(f"pass '{other}': a traced network is only folded, and always; or structure='modules'")
    traced = Traced(model)
    if not traced.of_kind("weighted"):
        raise ConversionError(f"{traced.model} has no layer that can receive spikes: nn.Linear, nn.Conv1d, 2d or 3d")
    labels = {traced.paths[node]: _labels(traced.kinds[node]) for node in traced.graph.nodes}
    encoder, neuron = config.build()
    if encoder.flows:
        if neuron is None:
            raise OptionError(f"code '{encoder.name}' flows: a neuron that answers currents is needed")
        _refuse(traced, config, ("weighted", "affine", "activation", "maxpool", "linear", "add", "cat"))
        if config.exclude or config.include != ("*",):
            key = "exclude" if config.exclude else "include"
            given = list(getattr(config, key))
            raise OptionError(f"{key}={given}: trains of '{encoder.name}' flow through every layer, none is left out")
        flow, delay = route(traced, config)
        model = SpikingGraph(traced, flow, delay)
    else:
        config.check_patterns({path: words for path, words in labels.items() if words})
        kinds = ("weighted", "affine", "activation", "maxpool", "linear", "add", "cat", "nonlinear")
        _refuse(traced, config, kinds)
        delay = _windows(traced, config)
        model = SpikingGraph(traced, None, delay)
        found = {_target(node): type(traced.module(node)) for node in traced.graph.nodes if _target(node)}
        ops = {path: OPS[cls] for path, cls in found.items() if cls in OPS}
        model.approximated = approximate(model, config, ops)
        for path in model.approximated:
            program_place, _, last = path.rpartition(".")
            setattr(model.program.get_submodule(program_place), last, model.get_submodule(path))
    return model


def _target(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else ""


def _labels(kind: Kind) -> tuple[str, ...]:
    if kind.kind == "weighted":
        return ("input",)
    if kind.kind == "nonlinear":
        return labels_of(kind.op)
    return () if kind.kind in ("input", "output", "size") else (kind.kind,)


def _refuse(traced: Traced, config: ConversionConfig, allowed: Iterable[str]) -> None:
    """Refuse operations without a role, unless they are excluded by name."""
    fine = {*allowed, "input", "output", "size", "preprocessing"}
    for node in traced.graph.nodes:
        kind, path = traced.kinds[node], traced.paths[node]
        if kind.kind not in fine and not config.excludes(path, *_labels(kind)):
            raise ConversionError(
                f"operation '{path}' ({kind.type}) of {traced.model} has no spiking form under '{config.encoder}'"
                + ("" if config.build()[0].flows else f": exclude=['{path}'] leaves it dense")
            )


def _windows(traced: Traced, config: ConversionConfig) -> int:
    """Code what weighted layers read, one window each, shared by all that read it; return the steps to the result."""
    found: dict[fx.Node, Site] = {}
    read_by: dict[fx.Node, list[fx.Node]] = {}
    for node in traced.of_kind("weighted"):
        if not config.excludes(traced.paths[node], "input"):
            read_by.setdefault(fed(node), []).append(node)
    for source, layers in read_by.items():
        path = str(layers[0].target)
        encoder, neuron = config.build(path, "input")
        others = [user for user in source.users if user not in layers and traced.kinds[user].kind != "size"]
        consumers = len(layers) + bool(others)
        site = Site(path, "input", encoder, neuron, channels_of(traced.module(layers[0])), consumers)
        for index, layer in enumerate(layers):
            make_spiking(traced.module(layer), site, owner=index == 0)
        if others:
            with traced.graph.inserting_after(source):
                value = traced.graph.call_module(f"{path}.site", (source,))
            traced.kinds[value], traced.paths[value] = Kind("value", "decode"), f"{path}.site"
            for user in others:
                user.replace_input_with(source, value)
        found[source] = site
    return _longest(traced, found)


def _longest(traced: Traced, found: Mapping[fx.Node, Site]) -> int:
    """Steps along the longest path: every window waits for the one before it."""
    until: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        before = [until[each] + (found[each].encoder.steps if each in found else 0) for each in node.all_input_nodes]
        until[node] = max(before, default=0)
    return max(until.values(), default=0)


class _Unmixed(fx.Interpreter):
    """Runs a dense batch and refuses operations that would mix samples: of a train they would mix the steps."""

    def __init__(self, model: SpikingGraph, size: int) -> None:
        super().__init__(model.program)
        self.size = size
        self.named = {node.name: path for node, (path, *_) in zip(model.program.graph.nodes, model.ops, strict=True)}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op != "get_attr" and result.shape[:1] != (self.size,):
            raise ConversionError(
                f"'{self.named[n.name]}' gives {list(result.shape)} for {self.size} samples: trains flow only "
                "through operations that keep samples apart"
            )
        return result


@contextlib.contextmanager
def counted_macs(found: dict[str, int], root: str, size: int) -> Iterator[None]:
    """Put the MACs of a sample of every module that runs inside into `found`, by path, and of all under ``.

    Args:
        root: class of the module that is called.
        size: samples in the batch.
    """
    with FlopCounterMode(display=False) as counter:
        yield
    for name, flops in counter.get_flop_counts().items():
        path = "" if name in ("Global", root) else name.removeprefix(f"{root}.")
        found[path] = sum(flops.values()) // 2 // max(1, size)


class GraphArchitecture(Architecture):
    """Converted networks that were traced."""

    target: ClassVar[str] = "module"

    def prepare(self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any] = ()) -> nn.Module:
        raise ConversionError(f"{model.dense_name} is a converted model already: convert a dense one")

    def feed(self, model: nn.Module, batch: Any) -> None:
        assert isinstance(model, SpikingGraph)
        observed = any(isinstance(module, Coder) and module.observer is not None for module in model.modules())
        batch = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch
        if not isinstance(batch, Tensor):
            raise OptionError(f"a batch of {type(batch).__name__}: a traced network takes one tensor `[B, ...]`")
        with model.observing() if observed else contextlib.nullcontext():
            if not observed or model.macs:
                self._run(model, batch)
                return
            with counted_macs(model.macs, type(model.program).__name__, len(batch)):
                self._run(model, batch)
            if model.flow is not None:
                _Unmixed(model, len(batch)).run(batch)

    def _run(self, model: SpikingGraph, batch: Tensor) -> None:
        try:
            model(batch)
        except RuntimeError as error:
            if model.macs:
                raise
            raise OptionError(
                f"{model.dense_name} does not take a batch of shape {list(batch.shape)}: {str(error).splitlines()[0]}"
            ) from error

    def units(self, batch: Any) -> int:
        batch = batch[0] if isinstance(batch, (tuple, list)) else batch
        return len(batch)

    def report(self, model: nn.Module) -> ConversionReport:
        assert isinstance(model, SpikingGraph)
        config: ConversionConfig = model.spikeplug_config  # type: ignore[assignment]
        return ConversionReport(config.recipe, tuple(_report(model)), "sample", model.delay)

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        assert isinstance(model, SpikingGraph)
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of save: a plain PyTorch model takes none")
        safetensors.torch.save_model(model, str(folder / WEIGHTS))
        (folder / MACS).write_text(json.dumps(model.macs, indent=1))
        if hasattr(model, "spikeplug_origin"):
            (folder / ORIGIN).write_text(json.dumps(model.spikeplug_origin, indent=1))

    def load(self, folder: Path, **options: Any) -> nn.Module:
        dense, config = options.pop("model", None), options.pop("config")
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of load: a plain PyTorch model takes model")
        if not isinstance(dense, nn.Module):
            raise BundleError(f"{folder} holds a plain PyTorch model: give the dense network as load(path, model=net)")
        model = prepare(dense, config)
        model.macs = json.loads((folder / MACS).read_text())
        restore(model, folder, type(dense).__name__)
        return model


def restore(model: nn.Module, folder: Path, name: str) -> None:
    """Read weights and parameters of sites from a saved model's file into a prepared one.

    Raises:
        BundleError: they are those of another network or of another dtype.
    """
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for path, module in model.named_modules():
        own = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
        if isinstance(module, Coder) and own:
            module.set_params(own)
    for path, tensor in model.state_dict().items():
        if path in tensors and tensors[path].dtype != tensor.dtype:
            wanted, found = tensors[path].dtype, tensor.dtype
            raise BundleError(f"{folder}: '{path}' is {wanted}, the given network's is {found}: convert it first")
    try:
        safetensors.torch.load_model(model, folder / WEIGHTS)
    except (RuntimeError, KeyError) as error:
        raise BundleError(f"{folder} does not fit the given {name}: {error}") from None


def _report(model: SpikingGraph) -> Iterator[Op]:
    macs = model.macs
    for path, kind, target in model.ops:
        count = macs.get(target, 0) if macs else None
        module = model.get_submodule(target) if target else None
        if kind.kind in ("input", "output", "size", "value"):
            continue
        if isinstance(module, SpikingLayer):
            yield spiking_op(path, kind.type, count, module.source)
        elif isinstance(module, FlowLayer):
            code, names = str(module.sites[0].encoder), tuple(site.name for site in module.sites)
            role, note = ("decoded", "reads averages of spikes") if module.pooled else ("spiking", "")
            yield Op(path, kind.type, role, count, code, note, names)
        elif isinstance(module, FlowSite):
            yield Op(path, kind.type, "neuron", 0, str(module.encoder), sites=(module.name,))
        elif target in model.approximated:
            yield Op(path, model.approximated[target], "approximated", 0, kind.type)
        elif kind.kind in ("preprocessing", "nonlinear", "other", "weighted"):
            yield Op(path, kind.type, "dense", count)
        elif model.flow is None:
            yield Op(path, kind.type, "neuron", 0, note=ON_POTENTIAL)
        else:
            yield Op(path, kind.type, "neuron" if kind.kind == "maxpool" else "coded", 0)
    for path, what in model.folded.items():
        yield Op(path, what, "folded")
