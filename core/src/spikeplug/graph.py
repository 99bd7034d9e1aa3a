"""Tracing of a network: its operations in order, each of a kind that says what it does to trains of spikes.

Nothing is passed over: what cannot be traced, or is of no known kind, is an error that names it.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spikeplug.errors import ConversionError
from spikeplug.fold import NORMS, fold_ahead, fold_behind, norm_line, require_frozen
from spikeplug.nonlinear import OPS

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
REMOVED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
LINEAR_MODULES = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.Flatten,
    nn.Unflatten,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.Upsample,
    nn.ChannelShuffle,
    nn.PixelShuffle,
)
LINEAR_CALLS: frozenset[Any] = frozenset(
    {
        *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk),
        *(torch.split, torch.narrow, torch.mean, torch.sum, operator.getitem, F.interpolate, F.pixel_shuffle, F.pad),
        *("flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split"),
        *("mean", "sum", "narrow"),
    }
)
"""Functions, and names of methods, that are linear in their first argument and do not mix samples."""
POOLING = (torch.mean, torch.sum, "mean", "sum", F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool2d)
ADD: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
CAT: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate})
ARITHMETIC: frozenset[Any] = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
        *(torch.add, torch.sub, torch.mul, torch.div),
        *("add", "sub", "mul", "div"),
    }
)
SCALING: frozenset[Any] = frozenset({operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"})
SIZES: frozenset[Any] = frozenset({"size", "dim", builtins.getattr, "numel"})
DROPPED: frozenset[Any] = frozenset({F.dropout, F.dropout2d, torch.dropout, "detach", "clone"})
RELUS: frozenset[Any] = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"})
CLIPS: frozenset[Any] = frozenset(
    {F.hardtanh, F.hardtanh_, torch.clamp, torch.clip, torch.clamp_min, "clamp", "clip", "clamp_min"}
)
MAX_POOL_CALLS: frozenset[Any] = frozenset(
    {F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool2d, F.adaptive_max_pool2d}
)


def fed(node: fx.Node) -> fx.Node:
    """The node that gives a node its first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


class Affine(nn.Module):
    """`weight * x + bias` per channel: a batch normalization that no weighted layer could take in."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x, self.weight, self.bias)

    def line(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The map with the given parameters `[C]`; channels are dimension 1."""
        shape = [1, -1, *[1] * (x.ndim - 2)]
        return x * weight.reshape(shape) + bias.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an operation is.

    Attributes:
        kind: one of
            `input`, `output`;
            `weighted`: a layer that receives spikes;
            `affine`: a scale and a shift per channel;
            `activation`: `op` is `relu` or `clip`, to 0 .. `top`;
            `maxpool`;
            `linear`: linear and the same for every sample, `pools` where it averages;
            `add`, `cat`;
            `preprocessing`: arithmetic of the input and constants, before anything else;
            `nonlinear`: an operation that approximators know;
            `size`: no tensor, or a constant;
            `other`;
            and of what a conversion puts in: `site`, neurons of trains that flow; `value`, what a window decodes to.
        type: the dense operation, as a report calls it.
    """

    kind: str
    type: str
    op: str = ""
    top: float = float("inf")
    pools: bool = False


class Traced:
    """A traced network.

    Attributes:
        root: holds the modules that the graph calls, by their paths.
        kinds, paths: of every node; a path is unique and names the operation in messages and reports.
        folded: path -> what was merged into another layer, or does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = type(model).__name__
        self.graph = _trace(model)
        self.root = _copied(model, self.graph)
        self.folded: dict[str, str] = {}
        self._fold()
        self.paths = dict(zip(self.graph.nodes, _paths(self.graph), strict=True))
        self._separate()
        self._remove()
        self.kinds: dict[fx.Node, Kind] = {}
        for node in self.graph.nodes:  # in order: a kind may depend on those of the inputs
            self.kinds[node] = self._kind(node)
        self._mark_preprocessing()
        outputs = [node for node in self.graph.nodes if node.op == "output"]
        if not isinstance(outputs[0].args[0], fx.Node):
            raise ConversionError(f"{self.model} returns {outputs[0].args[0]!r}: one tensor is needed")
        if sum(kind.kind == "input" for kind in self.kinds.values()) != 1:
            raise ConversionError(f"{self.model}.forward takes several tensors: one is needed")

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.root.get_submodule(str(node.target))

    def of_kind(self, *kinds: str) -> list[fx.Node]:
        """Nodes of these kinds, in order."""
        return [node for node in self.graph.nodes if self.kinds[node].kind in kinds]

    def insert(self, after: fx.Node, path: str, module: nn.Module, kind: Kind) -> fx.Node:
        """Call a new module on the result of a node."""
        self.root.add_submodule(path, module)
        with self.graph.inserting_after(after):
            node = self.graph.call_module(path, (after,))
        self.kinds[node], self.paths[node] = kind, path
        return node

    def free(self, path: str) -> str:
        """A path for a module of ours: this one, with `_` behind it where the network has a module there."""
        while hasattr(self.root, path):
            path += "_"
        return path

    def _fold(self) -> None:
        for node in list(self.graph.nodes):
            norm = self._called(node)
            if not isinstance(norm, NORMS):
                continue
            require_frozen(norm, str(node.target))
            before, users = node.args[0], list(node.users)
            layer = self._called(before) if isinstance(before, fx.Node) and len(before.users) == 1 else None
            behind = self._called(users[0]) if len(users) == 1 else None
            merged = layer is not None and self._once(before) and fold_behind(layer, norm)
            if merged or (behind is not None and self._once(users[0]) and fold_ahead(norm, behind)):
                self.folded[str(node.target)] = "BatchNorm"
                node.replace_all_uses_with(before)
                self.graph.erase_node(node)
            else:
                scale, shift = norm_line(norm)
                self.root.set_submodule(str(node.target), Affine(scale, shift))

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.module(node) if node.op == "call_module" else None

    def _once(self, node: Any) -> bool:
        calls = [each for each in self.graph.nodes if each.op == "call_module" and each.target == node.target]
        return len(calls) == 1

    def _separate(self) -> None:
        """Give every call of a module that is called several times a module of its own; parameters stay shared."""
        seen = set()
        for node in self.graph.nodes:
            if node.op != "call_module":
                continue
            if node.target in seen:
                original = self.module(node)
                twin = copy.copy(original)
                twin._parameters, twin._buffers = dict(original._parameters), dict(original._buffers)
                twin._modules = dict(original._modules)
                node.target = self.paths[node]
                self.root.add_submodule(node.target, twin)
            seen.add(node.target)

    def _remove(self) -> None:
        for node in list(self.graph.nodes):
            # The same where memory lies in order, as it does in dense networks and does not in trains.
            if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
                node.target = "reshape"
            if isinstance(self._called(node), REMOVED) or node.target in DROPPED:
                if node.target not in self.folded:
                    self.folded[self.paths[node]] = _type(self._called(node), node)
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _kind(self, node: fx.Node) -> Kind:
        if node.op == "placeholder":
            used = bool(node.users)
            return Kind("input" if used else "size", "input")
        if node.op == "output":
            return Kind("output", "output")
        if node.op == "get_attr":
            return Kind("size", "constant")
        module = self._called(node)
        if module is None:
            return self._of_call(node)
        plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        return _of_module(module) if plain else Kind("other", f"{type(module).__name__} of other than one tensor")

    def _of_call(self, node: fx.Node) -> Kind:
        called, name = node.target, _type(None, node)
        tensors = [each for each in node.all_input_nodes if self.kinds[each].kind != "size"]
        sizes = called in SIZES and not (called is getattr and node.args[1] not in ("shape", "ndim", "dtype", "device"))
        if sizes or not tensors:
            return Kind("size", name)
        if called in ADD and len(tensors) == 2 and len(node.all_input_nodes) == 2:
            return Kind("add", "add")
        if called in CAT:
            return Kind("cat", "cat")
        return _of_function(node) if tensors == [*node.args[:1]] else Kind("other", name)

    def _mark_preprocessing(self) -> None:
        """Arithmetic of the input with constants comes before the code, as it does for any network."""
        raw = {node for node in self.graph.nodes if self.kinds[node].kind == "input"}
        for node in self.graph.nodes:
            tensors = [each for each in node.all_input_nodes if self.kinds[each].kind != "size"]
            if node.target in ARITHMETIC and tensors and all(each in raw for each in tensors):
                self.kinds[node] = dataclasses.replace(self.kinds[node], kind="preprocessing")
                raw.add(node)


def _trace(model: nn.Module) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            ours = type(m).__module__.startswith("spikeplug.") or hasattr(m, "spikeplug_linear")
            return ours or super().is_leaf_module(m, module_qualified_name)

    try:
        return Tracer().trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{type(model).__name__} cannot be traced: {first}; its forward may not branch on values"
        ) from error


class _Root(nn.Module):
    """Holds modules at paths."""

    def add_submodule(self, path: str, module: nn.Module) -> None:
        """Put a module at a path; what is missing on the way is made."""
        *above, last = path.split(".")
        place: nn.Module = self
        for name in above:
            if name not in place._modules:
                place.add_module(name, _Root())
            place = place._modules[name]  # type: ignore[assignment]
        place.add_module(last, module)


def _copied(model: nn.Module, graph: fx.Graph) -> _Root:
    """A tree of what the graph calls. Modules are those of the model: it is converted, not copied."""
    root = _Root()
    for node in graph.nodes:
        if node.op == "call_module":
            root.add_submodule(node.target, model.get_submodule(node.target))
        elif node.op == "get_attr":
            *above, last = node.target.split(".")
            value = getattr(model.get_submodule(".".join(above)), last)
            node.target = node.target.replace(".", "_")
            root.register_buffer(node.target, value.detach())
    return root


def _paths(graph: fx.Graph) -> Iterator[str]:
    """A unique path for every node: the module's, or the function's name within the module that calls it."""
    seen: dict[str, int] = {}
    for node in graph.nodes:
        path = str(node.target) if node.op == "call_module" else _place(node) + _name(node)
        seen[path] = seen.get(path, 0) + 1
        yield path if seen[path] == 1 else f"{path}_{seen[path] - 1}"


def _place(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    inner = list(stack.values())[-1][0] if stack else ""
    return f"{inner}." if inner else ""


def _name(node: fx.Node) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return node.name
    return str(getattr(node.target, "__name__", node.target))


def _type(module: nn.Module | None, node: fx.Node) -> str:
    return type(module).__name__ if module is not None else _name(node)


def _of_module(module: nn.Module) -> Kind:
    name = type(module).__name__
    if type(module) in WEIGHTED:
        zero = getattr(module, "padding_mode", "zeros") == "zeros"
        return Kind("weighted", name) if zero else Kind("other", f"{name} with padding_mode={module.padding_mode!r}")
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return _clip(name, module.min_val, module.max_val)
    padding = isinstance(module, (nn.ConstantPad1d, nn.ConstantPad2d)) and module.value == 0
    if padding or isinstance(module, LINEAR_MODULES) or getattr(module, "spikeplug_linear", False):
        return Kind("linear", name, pools="Avg" in name)
    for classes, kind in (
        (Affine, Kind("affine", "BatchNorm")),
        (nn.ReLU, Kind("activation", name, op="relu")),
        (MAX_POOLS, Kind("maxpool", name)),
    ):
        if isinstance(module, classes):
            return kind
    return Kind("nonlinear", name, op=OPS[type(module)]) if type(module) in OPS else Kind("other", name)


def _of_function(node: fx.Node) -> Kind:
    """The kind of a function of one activation."""
    called, name = node.target, _name(node)
    if called in RELUS:
        return Kind("activation", "ReLU", op="relu")
    if called is F.relu6:
        return Kind("activation", "ReLU6", op="clip", top=6.0)
    if called in CLIPS:
        return _clip(name, *_limits(node))
    if called in MAX_POOL_CALLS:
        return Kind("maxpool", name)
    padded = called is F.pad and (node.kwargs.get("value") or (len(node.args) > 3 and node.args[3]))
    scaled = called in SCALING and _number(node.args[1])
    if scaled or (called in LINEAR_CALLS and not padded):
        return Kind("linear", name, pools=called in POOLING)
    return Kind("other", name)


def _clip(name: str, low: Any, high: Any) -> Kind:
    if low != 0 or not (high is None or high > 0):
        return Kind("other", f"{name} to [{low}, {high}]")
    top = float("inf") if high is None else float(high)
    return Kind("activation", name, op="relu" if high is None else "clip", top=top)


def _limits(node: fx.Node) -> tuple[Any, Any]:
    given = [*node.args[1:], None, None]
    default = (-1.0, 1.0) if node.target in (F.hardtanh, F.hardtanh_) else (None, None)
    low = node.kwargs.get("min", node.kwargs.get("min_val", given[0]))
    high = node.kwargs.get("max", node.kwargs.get("max_val", given[1]))
    return default[0] if low is None else low, default[1] if high is None else high


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def clipped(kind: Kind) -> Callable[[Tensor], Tensor]:
    """The activation of a kind as a function."""
    if kind.op == "relu":
        return torch.relu
    top = kind.top
    return (lambda x: x.clamp(0, top)) if kind.op == "clip" else (lambda x: x)
