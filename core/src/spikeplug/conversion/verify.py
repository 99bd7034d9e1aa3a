"""Verification: a converted network without its codes is the dense one, and stepped layers equal fused ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikeplug.coding.layers import SpikingLayer
from spikeplug.coding.site import Coder, Site, evaluating, in_mode, sites
from spikeplug.errors import ConversionError
from spikeplug.graph.capture import unwrapped
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.structure import leaves
from spikeplug.graph.trials import difference

from .architecture import Architecture
from .record import conversion_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference of a result, over its largest value, by dtype: folded norms are rounded otherwise."""

SAMPLES, TOKENS = 4, 64
"""Samples of a batch, and tokens of a text, that are compared."""


def verify_conversion(
    dense: nn.Module, spiking: nn.Module, example: Any, architecture: Architecture, *, changed: bool = False
) -> None:
    """Compare a converted network with the dense one on a batch.

    Args:
        changed: the dense model was changed in place, so that only the layers are compared.

    Raises:
        ConversionError: they differ; the message names the first operation at which they part.
    """
    approximated = [op.name for op in conversion_of(spiking).report.ops if op.role == "approximated"]
    # Approximated operations left out compute in float32, whatever the network does.
    least = TOLERANCE[torch.float32] if approximated else 0.0
    if conversion_of(spiking).config.passes and architecture.computes is not None:
        least = max(least, TOLERANCE[architecture.computes])
    with torch.no_grad(), evaluating(dense, spiking):
        if not changed and _has_dense_mode(spiking, approximated):
            _compare_outputs(unwrapped(dense), spiking, example, architecture, least)
        _compare_layers(spiking, example, architecture)


def _on_first(spiking: nn.Module, example: Any, count: int, run: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The first samples of a batch, and what they give; all where they are not taken alone, as edges need nodes."""
    batch = first_samples(spiking, example, count)
    try:
        return batch, run(batch)
    except Exception:  # it is the user's code, which may raise anything
        return example, run(example)


def _has_dense_mode(spiking: nn.Module, approximated: Sequence[str]) -> bool:
    """Whether all that was approximated can be left out: an approximator without coders is another function always."""
    return all(any(isinstance(each, Coder) for each in spiking.get_submodule(name).modules()) for name in approximated)


def first_samples(model: nn.Module, batch: Any, count: int = SAMPLES) -> Any:
    """The first samples of a batch, where a network takes any number of them; of texts so many tokens."""
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        batch = batch[:, :TOKENS]
    if isinstance(model, SpikingGraph) and not model.any_samples:
        return batch
    size = next((len(each) for each in leaves(batch) if each.ndim), 0)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count] if value.ndim and len(value) == size else value
        if isinstance(value, Mapping):
            return {key: cut(each) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(cut(each) for each in value) if type(value) in (tuple, list) else value
        return value

    return cut(batch)


def _compare_outputs(
    dense: nn.Module, spiking: nn.Module, example: Any, architecture: Architecture, least: float
) -> None:
    batch, result = _on_first(spiking, example, SAMPLES, lambda batch: architecture.feed(dense, batch))
    wanted = leaves(result)
    with in_mode(spiking, "dense"):
        found = leaves(architecture.feed(spiking, batch))
    if len(wanted) != len(found):
        raise ConversionError(f"the converted network gives {len(found)} tensors, {type(dense).__name__} {len(wanted)}")
    for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
        one, other = _real(batch, one), _real(batch, other)
        if _far(one, other, least):
            part = _first_difference(dense, spiking, batch, architecture, least)
            raise ConversionError(
                f"with its codes left out the converted network is not {type(dense).__name__}: result {index} differs "
                f"by {difference(one, other):.2g} of its largest value{part}. This is an error of the conversion or of "
                "a network whose results depend on more than its inputs; verify=False skips the comparison"
            )


def _real(batch: Any, result: Tensor) -> Tensor:
    """A result without the positions of padding, where attention sees nothing and gives whatever it gives."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return result[mask.bool()] if isinstance(mask, Tensor) and result.shape[: mask.ndim] == mask.shape else result


def _far(wanted: Tensor, found: Tensor, least: float = 0.0) -> bool:
    if not wanted.is_floating_point():
        return not torch.equal(wanted, found)
    return difference(wanted, found) > max(least, TOLERANCE.get(wanted.dtype, 1e-3))


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the tensors that its operations give, by their paths."""

    def __init__(self, model: SpikingGraph) -> None:
        super().__init__(model.program)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op not in ("placeholder", "get_attr"):
            self.found.setdefault(str(n.meta["path"]), result)
        return result


def _first_difference(
    dense: nn.Module, spiking: nn.Module, batch: Any, architecture: Architecture, least: float
) -> str:
    """The first layer of the dense network whose result the converted one does not have."""
    if not isinstance(spiking, SpikingGraph):
        return ""
    known: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: known.setdefault(name, out))
        for name, module in dense.named_modules()
        if name
    ]
    try:
        architecture.feed(dense, batch)
    finally:
        for handle in handles:
            handle.remove()
    recorder = _Recorder(spiking)
    with in_mode(spiking, "dense"):
        recorder.run(*leaves(batch)[: len(spiking.captured.inputs)])
    for path, value in recorder.found.items():
        if isinstance(known.get(path), Tensor) and _far(known[path], value, least):
            return f"; the first operation that differs is '{path}'"
    return ""


def _compare_layers(spiking: nn.Module, example: Any, architecture: Architecture) -> None:
    """Every layer on spikes, stepped, on what it gets in a fused pass of one sample."""
    if not any(isinstance(site, Site) and site.encoder.collapsible for site in sites(spiking).values()):
        return
    if any(site.mode != "fused" or not site.calibrated for site in sites(spiking).values()):
        return
    parted: list[str] = []
    handles = []
    for name, module in spiking.named_modules():
        if isinstance(module, SpikingLayer) and module.source.encoder.collapsible:
            handles.append(module.register_forward_hook(_comparing(name, parted)))
    try:
        _on_first(spiking, example, 1, lambda batch: architecture.feed(spiking, batch))
    finally:
        for handle in handles:
            handle.remove()
    if parted:
        raise ConversionError(
            f"'{parted[0]}' gives other values stepped than fused: its code says that it is collapsible and is not, or "
            "its neuron fires other spikes"
        )


def _comparing(name: str, parted: list[str]) -> Any:
    def compare(module: SpikingLayer, args: tuple[Tensor, ...], fused: Tensor) -> None:
        site = module.source
        site.mode = "stepped"
        listeners, site.listeners, consumers, site.consumers = site.listeners, (), site.consumers, 1
        try:
            stepped = module.forward(args[0])
        finally:
            site.mode, site.listeners, site.consumers = "fused", listeners, consumers
        if _far(fused, stepped):
            parted.append(name)

    return compare
