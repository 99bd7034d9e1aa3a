"""Capture of a network by `torch.export`: its operations in order, as a functional graph of ATen operations.

The network is not changed and not copied: the graph holds the very tensors of its parameters and buffers. What does
not depend on the input is computed once, here: parametrized weights, masks, position embeddings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from spikeplug.coding.site import evaluating
from spikeplug.errors import ConversionError, OptionError

from .guards import Guard, guards_of, squeezing
from .structure import Signature, Structure
from .trials import ones, takes_few, unchanged

DROPPED_CHECKS = ("_assert", "sym_constrain", "_guards", "_check_")
"""Beginnings of the names of operations that check what was seen while capturing, and compute nothing."""

RANDOM = ("rand", "bernoulli", "normal", "multinomial", "poisson")


@dataclasses.dataclass
class Captured:
    """A captured network.

    Every node's `meta` says: `path`, its unique name; `type`, what its module or function is called; `shape`, that of
    the example, None of what is no tensor; `dims`, its sizes as text, in which `batch` is the number of samples;
    `dtype`; and `line`, where in the source it stands.

    Attributes:
        name: class of the network.
        graph: its operations. `get_attr` nodes name tensors.
        tensors: parameters, buffers and constants by those names; the first two are the network's own.
        signature: how its inputs are called. outputs: how its results are put together.
        batch: text of the number of samples, as in `dims`; a number where the network fixes it.
        samples: in the example.
        mutated: buffers that it changes when it runs.
        guards: what its sizes must be like for the graph to hold.
    """

    name: str
    graph: fx.Graph
    tensors: dict[str, Tensor]
    signature: Signature
    outputs: Structure
    batch: str
    samples: int
    mutated: tuple[str, ...] = ()
    guards: tuple[Guard, ...] = ()

    @property
    def inputs(self) -> list[fx.Node]:
        """Its inputs, in the order of the signature."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def drop_unread(self) -> None:
        """Leave out operations and tensors that nothing reads any more."""
        self.graph.eliminate_dead_code()
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `DataParallel`, `torch.compile` and the like.

    Raises:
        ConversionError: it is a TorchScript module.
    """
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise ConversionError("a TorchScript module cannot be captured: give the network that it was made of")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """The operations of a network for inputs like these; sizes that it does not fix may differ later.

    Raises:
        ConversionError: it cannot be captured; the message says why, and where in its source.
        OptionError: it does not take such inputs.
    """
    from .describe import describe
    from .normalize import normalize

    model = unwrapped(model)
    name = type(model).__name__
    signature = Signature.of(model, args, kwargs)
    # A graph takes its inputs in the order in which they are given here.
    kwargs = {
        key: kwargs[key] for key in dict.fromkeys([*(name for name, _ in signature.given), *kwargs]) if key in kwargs
    }
    if any(isinstance(each, Tensor) and each.ndim and not len(each) for each in pytree.tree_leaves((args, kwargs))):
        raise OptionError("the example has no samples: give one that has some")
    args, kwargs = _at_least_two(args), _at_least_two(kwargs)
    with _written_out(model), unchanged(model):
        program = _exported(model, name, args, kwargs)
    captured = _read(model, name, program, signature)
    normalize(captured)
    describe(captured, model)
    with _written_out(model), unchanged(model):
        if not takes_few(model, captured, args, kwargs):  # a capture does not see every dtype that does not fit
            _refuse_unfit(model, name, args, kwargs)
        captured.guards += ones(model, captured, args, kwargs)
    # A rewrite that asks for a size fixes it: better refused than another network for another number of samples.
    captured.batch = next(each.meta["dims"] for each in captured.inputs if each.meta["dims"])[0]
    return captured


def _silent(record: logging.LogRecord) -> bool:
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, PyTorch logs and prints nothing: what goes wrong in a capture is said by our own errors."""
    known = [logger for name, logger in logging.root.manager.loggerDict.items() if name.partition(".")[0] == "torch"]
    handlers = {each for logger in known if isinstance(logger, logging.Logger) for each in logger.handlers}
    for handler in handlers:
        handler.addFilter(_silent)
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_silent)


@contextlib.contextmanager
def _written_out(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and attention written out: its fast path is one operation of no known role."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad(), _quiet():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _refuse_unfit(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the network once, since its own errors say more than those of a capture."""
    try:
        model(*args, **kwargs)
    except Exception as error:  # it is the user's code, which may raise anything
        shapes = [list(each.shape) for each in pytree.tree_leaves((args, dict(kwargs))) if isinstance(each, Tensor)]
        said = (str(error).splitlines() or [type(error).__name__])[0]
        given = ", ".join(map(str, shapes)) or "no tensor"
        raise OptionError(f"{name} does not take a batch of shape {given}: {said}") from error


def _at_least_two(inputs: Any) -> Any:
    """Inputs of one sample twice, since a size of 1 would be fixed."""
    tensors = [each for each in pytree.tree_leaves(inputs) if isinstance(each, Tensor)]
    if not tensors or any(each.ndim == 0 or len(each) != 1 for each in tensors):
        return inputs
    return pytree.tree_map(lambda each: torch.cat([each, each]) if isinstance(each, Tensor) else each, inputs)


def _exported(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """The exported network; with as many sizes free as can be."""

    def export(every: bool, strict: bool) -> ExportedProgram:
        def free(each: Any) -> Any:
            dims = each.ndim if isinstance(each, Tensor) else 0
            return dict.fromkeys(range(dims if every else min(1, dims)), Dim.AUTO) if dims else None

        given = Signature.named(model, args, kwargs)
        shapes = {key: pytree.tree_map(free, value) for key, value in given.items()}
        with _simple_sizes() if every and not strict else contextlib.nullcontext():
            program = torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=strict)
        decomposed: ExportedProgram = program.run_decompositions({})
        return decomposed

    failure: Exception | None = None
    fixed: ExportedProgram | None = None
    # len(x) fixes the number of samples, except in a strict capture. Some networks take sizes that are free badly.
    for every, strict in ((True, False), (False, False), (True, True)):
        try:
            program = export(every, strict)
        except Exception as error:  # capturing runs the network's own code, which may raise anything
            if fixed is not None:
                break
            failure = failure or error
            continue
        if not _fixed(program):
            return program
        fixed = fixed or program
    if fixed is not None:
        return fixed
    assert failure is not None
    _refuse_unfit(model, name, args, kwargs)
    raise ConversionError(f"{name} cannot be captured: {_reason(failure)}") from failure


LONGEST = 80
"""Characters of a size's formula above which the sizes of images are fixed: padding to
a multiple (TensorFlow's convolutions, Swin) makes them grow with every layer, and a capture takes minutes."""


class _TooComplexError(Exception):
    """A formula is too long."""


@contextlib.contextmanager
def _simple_sizes() -> Iterator[None]:
    """Inside, a capture ends as soon as the formulas of sizes grow too long."""

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        for each in args:
            if isinstance(each, Tensor) and any(len(str(size)) > LONGEST for size in each.shape):
                raise _TooComplexError

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _fixed(program: ExportedProgram) -> bool:
    """Whether the number of samples is a constant."""
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in names and isinstance(value, Tensor) and value.ndim:
            return str(value.shape[0]).isdigit()
    return False


def _reason(error: Exception) -> str:
    """An error of `torch.export` in plain words, with the line of the network's source."""
    text = str(error)
    where = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    line = next((f" ({file.rpartition('/')[2]}:{number})" for file, number, _ in reversed(where)), "")
    layers = "structure='layers' converts layer by layer, and what is computed between layers stays dense"
    if "data-dependent" in text or type(error).__name__ in ("GuardOnDataDependentSymNode", "UserError"):
        what = "its forward branches on values of tensors, or makes numbers of them"
        return f"{what}{line}. Choose by shapes or by torch.where instead; or {layers}"
    return f"torch.export says: {(text.splitlines() or [type(error).__name__])[0]}{line}. {layers}"


def _read(model: nn.Module, name: str, program: ExportedProgram, signature: Signature) -> Captured:
    tensors: dict[str, Tensor] = {}
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs.get(node.name)
            if spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                assert spec.target is not None
                tensors[spec.target] = _tensor(model, program, spec.target)
                copies[node] = graph.create_node("get_attr", spec.target, name=node.name)
            elif spec is None or spec.kind is InputKind.USER_INPUT:
                if not isinstance(node.meta.get("val"), Tensor):
                    copies[node] = node.meta.get("val")  # a constant, as which the operations have it already
                    continue
                copies[node] = graph.placeholder(node.name)
            else:
                raise ConversionError(f"{name} holds '{node.name}', which is no tensor and has no form here")
        elif node.op == "output":
            specs_out = program.graph_signature.output_specs
            results = [
                copies[value] if isinstance(value, fx.Node) else value
                for value, spec_out in zip(node.args[0], specs_out, strict=True)
                if spec_out.kind is OutputKind.USER_OUTPUT
            ]
            graph.output(tuple(results))
            continue
        elif node.op == "call_function":
            if any(part in _called(node) for part in DROPPED_CHECKS):
                continue
            copies[node] = graph.node_copy(node, lambda each: copies[each])
        else:
            raise ConversionError(f"{name}: {node.op} '{node.target}' has no form here")
        copies[node].meta = dict(node.meta)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    mutated = tuple(
        str(spec.target) for spec in program.graph_signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION
    )
    captured = Captured(name, graph, tensors, signature, Structure.of(out_spec), "", 1, mutated)
    first = next((each for each in captured.inputs if isinstance(each.meta.get("val"), Tensor)), None)
    if first is None or not first.meta["val"].ndim:
        raise ConversionError(f"{name} takes no tensor `[B, ...]`: at least one is needed")
    captured.guards = (*guards_of(captured.inputs), *squeezing(captured.graph.nodes))
    captured.batch, captured.samples = str(first.meta["val"].shape[0]), hint(first.meta["val"].shape[0])
    return captured


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _tensor(model: nn.Module, program: ExportedProgram, path: str) -> Tensor:
    """The network's own tensor of that name, or a constant of the capture."""
    place, _, last = path.rpartition(".")
    with contextlib.suppress(AttributeError):
        found = getattr(model.get_submodule(place), last)
        if isinstance(found, Tensor):
            return found
    known: Mapping[str, Any] = {**program.constants, **program.state_dict}
    found = known[path]
    assert isinstance(found, Tensor)
    return found.detach()


def hint(size: Any) -> int:
    """The number that a size has in the example."""
    if isinstance(size, int):
        return size
    if size.node.hint is None:
        raise ConversionError(
            "cannot be captured: a tensor has as many elements as values of others say (x[mask], nonzero): choose by "
            "torch.where instead; or structure='layers' converts layer by layer"
        )
    return int(size.node.hint)


def evaluate(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """The value of an operation all of whose inputs are known."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws numbers."""
    return any(word in _called(node) for word in RANDOM)


def operands(node: fx.Node) -> Sequence[Any]:
    """All positional arguments of an ATen operation, those left out with their defaults; keywords among them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.args
    found = []
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            found.append(node.args[index])
        else:
            found.append(node.kwargs.get(argument.name, argument.default_value))
    return found
