"""A converted network: one module that takes what the dense network takes and returns what it returns."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from spikeplug.coding.padding import real_positions
from spikeplug.errors import OptionError

from .capture import Captured
from .draft import Draft
from .operations import Kind
from .streaming import Stream
from .structure import leaves
from .windows import MASK

if TYPE_CHECKING:
    from spikeplug.conversion.record import Conversion

MICRO_BATCH = 2**19
"""Values of the input's train, T times its samples, that stream at once: what passes between layers should stay in the
cache. 14 CIFAR images at T = 12; of ImageNet one."""


class SpikingGraph(nn.Module):
    """A converted network. Its modules have the names of the dense network's.

    Attributes:
        conversion: what was asked for and what became of every operation, a `spikeplug.conversion.Conversion`.
        captured: the graph that it was made of, without its tensors.
        stream: shared state of streamed trains; None where every activation is a window of its own.
        kinds: of every node of its program, by name. stored: where each tensor of the graph lies.
    """

    conversion: Conversion

    def __init__(self, draft: Draft, stream: Stream | None) -> None:
        super().__init__()
        draft.finish()
        program = fx.GraphModule(draft.root, draft.graph, "SpikingGraph")
        for name, child in program.named_children():
            self.add_module(name, child)
        for name, parameter in program.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in program.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._program = (program,)  # a tuple, so that its modules are not registered twice
        self.stream, self.stored = stream, dict(draft.stored)
        self.captured = Captured(**{**vars(draft.captured), "tensors": {}})
        self.kinds: dict[str, Kind] = {node.name: draft.kinds[node] for node in draft.graph.nodes}
        self._fitting: set[tuple[torch.Size, ...]] = set()
        names = self.captured.signature.names()
        self._inputs = [
            (name, node.meta["dims"], node.meta["shape"])
            for name, node in zip(names, self.captured.inputs, strict=True)
        ]
        ends = next(node for node in draft.captured.graph.nodes if node.op == "output").args[0]
        first = [node.meta["dims"][:1] for node in ends if isinstance(node, fx.Node)]
        by_sample = [dims[:1] for _, dims, _ in self._inputs] + first
        alone = all(dims == (self.captured.batch,) for dims in by_sample) and len(first) == len(ends)
        self._splits = alone and draft.by_sample
        self.eval()  # as the network that it was made of: what training does there was left out

    @property
    def any_samples(self) -> bool:
        """Whether it takes any number of samples."""
        size = self.captured.batch
        return not size.isdigit() and not any(size in guard.sizes for guard in self.captured.guards)

    @property
    def program(self) -> fx.GraphModule:
        """The operations in order: `program.graph` and `program.code`."""
        return self._program[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense network's results for a batch, from spikes.

        Raises:
            OptionError: it is called otherwise than in the example that it was converted with.
        """
        inputs = self.captured.signature.tensors(args, kwargs)
        for x, (name, dims, shape) in zip(inputs, self._inputs, strict=True):
            if x.ndim != len(dims) or any(size.isdigit() and int(size) != x.shape[d] for d, size in enumerate(dims)):
                raise OptionError(self._misfit(name, x, dims, shape))
        self._check_sizes(inputs)
        mask = next((x for x, node in zip(inputs, self.captured.inputs, strict=True) if node.name == MASK), None)
        with real_positions(mask if mask is not None and mask.ndim == 2 else None):
            # Sites keep things on activations; the caller's tensors shall not carry them.
            return self.captured.outputs.pack(iter(self._run([x.view_as(x) for x in inputs])))

    def _check_sizes(self, inputs: list[Tensor]) -> None:
        """Refuse sizes for which the network takes another way than it took while it was captured."""
        given = tuple(x.shape for x in inputs)
        if given in self._fitting:
            return
        shapes = ", ".join(str(list(shape)) for shape in given)
        sizes: dict[str, int] = {}
        for x, (_, dims, _) in zip(inputs, self._inputs, strict=True):
            for name, size in zip(dims, x.shape, strict=True):
                if sizes.setdefault(name, size) != size:
                    raise OptionError(
                        f"{self.captured.name} was converted with inputs of which two sizes are the same; in inputs of "
                        f"shape {shapes} they are {sizes[name]} and {size}"
                    )
        for guard in self.captured.guards:
            if not guard.holds(sizes):
                named = ", ".join(f"{name} = {sizes[name]}" for name in sorted(guard.sizes))
                raise OptionError(
                    f"{self.captured.name} branches on sizes, and was converted with such that {guard.said}; for "
                    f"inputs of shape {shapes} ({named}) it is another network: convert it with such an example"
                )
        if len(self._fitting) < 1024:
            self._fitting.add(given)

    def _misfit(self, name: str, x: Tensor, dims: tuple[str, ...], shape: tuple[int, ...]) -> str:
        wanted = ", ".join(
            size if size.isdigit() else "B" if size == self.captured.batch else str(known)
            for size, known in zip(dims, shape, strict=True)
        )
        one = "; one sample is a batch of one: x.unsqueeze(0)" if x.ndim == len(dims) - 1 else ""
        return f"input '{name}' of {self.captured.name} has shape {list(x.shape)}, [{wanted}] is needed{one}"

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        stream = self.stream
        if self._splits and len(inputs[0]) > 1 and self._streams_in_parts():
            assert stream is not None
            values = sum(x[0].numel() for x in inputs)
            size = max(1, MICRO_BATCH // (stream.steps * max(1, values)))
            # Even parts: a small rest would cost as much a layer as a whole one.
            count = -(-len(inputs[0]) // size)
            if count > 1:
                parts = zip(*(torch.tensor_split(x, count) for x in inputs), strict=True)
                return tuple(torch.cat(each) for each in zip(*(self.program(*part) for part in parts), strict=True))
        found: tuple[Tensor, ...] = self.program(*inputs)
        return found

    def _streams_in_parts(self) -> bool:
        """Whether a batch may be split: trains stream, and nobody listens to windows, each of which has all samples."""
        stream = self.stream
        return stream is not None and not stream.dense and not any(site.heard("window") for site in stream.sites)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpikingGraph:
        # As any module's: `copy` would else build it anew, from its description.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpikingGraph:
        """Move the network; what its operations make anew is made where it is then."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next((each.device for each in itertools.chain(self.parameters(), self.buffers())), None)
        program, changed = self.program, False
        for node in program.graph.nodes:
            if node.kwargs.get("device") not in (None, device):
                node.kwargs, changed = {**node.kwargs, "device": device}, True
        if changed:
            program.recompile()
        for name, tensor in itertools.chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False)):
            # The program's own root holds what this module holds.
            if name in program._parameters:
                program._parameters[name] = tensor  # type: ignore[assignment]
            elif name in program._buffers:
                program._buffers[name] = tensor
        return self


def samples_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    return next((len(each) for each in leaves(batch) if each.ndim), 1)
