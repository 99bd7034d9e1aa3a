"""A converted network's operations, run densely once on samples, and its linear ones in the words of the format."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikeplug.coding.site import in_mode
from spikeplug.errors import ConversionError
from spikeplug.graph.capture import operands
from spikeplug.graph.network import SpikingGraph

AVERAGES = ("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d")
ADAPTIVE = ("aten.adaptive_avg_pool", "aten._adaptive_avg_pool")
MEAN = "aten.mean.dim"


def fed(node: fx.Node) -> fx.Node:
    """The node that gives a node its first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


class Trace:
    """Nodes of a network's graph, with what each gives in the dense network.

    Args:
        samples: a batch of inputs `[B, ...]`.

    Raises:
        ConversionError: the network has several inputs or results.
    """

    def __init__(self, model: SpikingGraph, samples: Tensor) -> None:
        self.model = model
        nodes = list(model.program.graph.nodes)
        self.paths = {node: str(node.meta["path"]) for node in nodes}
        self.kinds = {node: model.kinds[node.name] for node in nodes}
        inputs = [node for node in nodes if node.op == "placeholder"]
        results = next(node for node in nodes if node.op == "output").args[0]
        if len(inputs) != 1 or len(results) != 1:
            raise ConversionError(f"{model.captured.name} has several inputs or results: one of each can be exported")
        recorder = _Recorder(model)
        with torch.no_grad(), in_mode(model, "dense"):
            recorder.run(samples)
        self.found = recorder.found

    def refuse(self, node: fx.Node, why: str) -> ConversionError:
        return ConversionError(f"'{self.paths[node]}' ({self.kinds[node].type}) cannot be exported: {why}")

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        if not isinstance(self.found[node], Tensor):
            raise self.refuse(node, "it gives several tensors")
        return tuple(self.found[node].shape[1:])

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.model.program.get_submodule(str(node.target)) if node.op == "call_module" else None

    def by_channel(self, node: fx.Node, tensor: Tensor) -> Tensor:
        """A constant that differs by channel only, as `[C]`."""
        shape = self.shape(node)
        plain = (
            tensor.expand(shape[:1] + (1,) * (len(shape) - 1))
            if tensor.ndim < len(shape) or tensor.ndim == 0
            else tensor
        )
        if any(size != 1 for size in plain.shape[1:]):
            raise self.refuse(node, "its constants differ by more than the channel")
        return plain.reshape(-1)

    def linear_form(self, node: fx.Node, module: nn.Module | None) -> tuple[list[dict[str, Any]], float]:
        """A linear operation in the format's words, and what its result is to be multiplied by."""
        given, shape = self.shape(fed(node)), self.shape(node)
        pooled = self._pooling(node, module, given, shape)
        if pooled is not None:
            kernel, stride, padding = pooled
            ops = [{"op": "sum_pool", "kernel": kernel, "stride": stride, "padding": padding}]
            reduced = tuple(
                (size + 2 * p - k) // s + 1 for size, k, s, p in zip(given[1:], kernel, stride, padding, strict=True)
            )
            if (given[0], *reduced) != shape:
                ops.append({"op": "reshape", "shape": list(shape)})
            return ops, 1 / math.prod(kernel)
        if self.kinds[node].pools:
            raise self.refuse(node, "of poolings only averages with equal windows can be")
        return self._selection(node, given, shape)

    def _pooling(
        self, node: fx.Node, module: nn.Module | None, given: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[list[int], list[int], list[int]] | None:
        dims, name = len(given) - 1, str(node.target)
        if name.startswith(AVERAGES):
            _, size, stride_, padding_, ceil, include, *rest = operands(node)
            kernel = _tuple(size, dims)
            stride, padding = _tuple(stride_ or size, dims), _tuple(padding_, dims)
            plain = include or not any(padding)
            if ceil or any(rest) or not plain:
                raise self.refuse(node, "its windows are not all divided by the same number")
            return kernel, stride, padding
        if name.startswith(ADAPTIVE):
            sizes = shape[1:]
            if any(size % to for size, to in zip(given[1:], sizes, strict=True)):
                raise self.refuse(node, "its windows are not all of one size")
            kernel = [size // to for size, to in zip(given[1:], sizes, strict=True)]
            return kernel, kernel, [0] * dims
        if name == MEAN:
            over = sorted(dim % (dims + 2) for dim in _tuple(node.args[1] or [], 1))
            if over != list(range(2, dims + 2)):
                raise self.refuse(node, f"a mean over dimensions {over} has no form in the format")
            return list(given[1:]), list(given[1:]), [0] * dims
        return None

    def _selection(
        self, node: fx.Node, given: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[list[dict[str, Any]], float]:
        """What a linear operation does to a numbered plane: where it only moves values, their numbers say how."""
        numbers = torch.arange(1, math.prod(given) + 1, dtype=torch.float64).reshape(1, *given)
        moved, ones = self._apply(node, numbers)[0], self._apply(node, torch.ones_like(numbers))[0]
        factor = float(ones.flatten()[ones.abs().argmax()])
        index = (moved / factor if factor else moved).round().clamp(0, numbers.numel())
        # Averages of numbers may be numbers too: only what holds of any values is a move.
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(numbers.shape, dtype=torch.float64, generator=generator)
        wanted = torch.cat([values.new_zeros(1), values.flatten()])[index.long()] * factor
        if not torch.allclose(self._apply(node, values)[0], wanted, rtol=1e-9, atol=1e-12):
            raise self.refuse(node, "it mixes values in a way that has no form in the format")
        if index.numel() == numbers.numel() and bool((index.flatten() == numbers.flatten()).all()):
            return ([] if given == shape else [{"op": "reshape", "shape": list(shape)}]), factor
        return [{"op": "gather", "index": index.to(torch.int32), "shape": list(shape)}], factor

    def _apply(self, node: fx.Node, x: Tensor) -> Tensor:
        """A node's operation on another tensor of one sample."""
        size = len(self.found[fed(node)])

        def value(argument: fx.Node) -> Any:
            if argument is fed(node):
                return x.expand(size, *x.shape[1:])
            return self.found[argument]

        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node.op == "call_module":
            result = self.model.program.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(result, Tensor):
            raise self.refuse(node, "it gives several tensors")
        return result[:1]


class _Recorder(fx.Interpreter):
    """Runs the dense network and keeps what every node gives."""

    def __init__(self, model: SpikingGraph) -> None:
        super().__init__(model.program)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = result = super().run_node(n)
        return result


def _tuple(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(each) for each in (values * dims if len(values) == 1 else values)]
