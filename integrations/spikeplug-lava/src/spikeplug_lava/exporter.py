"""Exporter `lava`: a converted network as an integer network, with what that changed measured on samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import spikeplug
from spikeplug.coding.listeners import Listener, listening
from spikeplug.coding.site import Site, in_mode, sites
from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.conversion.record import conversion_of
from spikeplug.errors import BundleError, ConversionError, OptionError
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.streaming import StreamingSite
from spikeplug_lava_runtime import Bundle, FormatError, save
from spikeplug_lava_runtime.format import SPEC, STATE_LIMIT

from .integer import IntegerNetwork
from .lower import lower
from .populations import bits
from .quantize import Layer, Quantizer
from .trace import fed


@dataclasses.dataclass(frozen=True)
class Lava:
    """Integer network for Loihi 2, one file: int8 weights, 24-bit states, graph, arithmetic and golden spikes.

    Args:
        golden: samples whose spikes are stored in the file, for `spikeplug-lava verify`.
        fitted: samples, the first, that ranges of states are fitted to; a state that another does not fit is an error.
        fraction: bits of a ternary neuron's state behind the unit of its weights; None: up to 8, as many as fit.

    Raises:
        OptionError: an option is out of range.
    """

    golden: int = 4
    fitted: int = 128
    fraction: int | None = None

    name: ClassVar[str] = "lava"

    def __post_init__(self) -> None:
        for option, least in (("golden", 0), ("fitted", 1)):
            if getattr(self, option) < least:
                raise OptionError(f"{option}={getattr(self, option)}: at least {least} is needed")
        if self.fraction is not None and not 0 <= self.fraction <= 16:
            raise OptionError(f"fraction={self.fraction}: a whole number from 0 to 16 is needed")

    def export(
        self, model: nn.Module, path: str | Path, samples: Sequence[Any] = (), *, watch: Watch = unwatched
    ) -> dict[str, Any]:
        """Write the file and return the report: see `report_of`.

        Args:
            samples: batches of inputs `[B, ...]`, or pairs of inputs and labels `[B]`.

        Raises:
            ConversionError: a part of the network has no integer form, or does not fit; the message names it.
            OptionError: there are no samples.
            BundleError: the file cannot be written.
        """
        network, report = self.measured(model, samples, watch)
        bundle = network.bundle
        if self.golden:
            first = _first([x for x, _ in _pairs(samples)], self.golden)
            fired, readout = network.fire(network.encode(first))
            recorded = {**fired, bundle.populations[-1]["name"]: readout.to(torch.int32)}
            bundle.tensors |= {f"golden.{name}": each.numpy() for name, each in recorded.items()}
        try:
            save(bundle, path)
        except FormatError as error:
            raise ConversionError(f"cannot be exported: {error}") from error
        except OSError as error:
            raise BundleError(f"cannot write {path}: {error.strerror or error}") from error
        return report

    def measured(
        self, model: nn.Module, samples: Sequence[Any], watch: Watch = unwatched
    ) -> tuple[IntegerNetwork, dict[str, Any]]:
        """The integer network, not written yet, and the report. Raises as `export`."""
        batches = _pairs(samples)
        if not batches:
            raise OptionError(
                "ranges of states are measured on samples: give some, on the command line --images FOLDER"
            )
        network, layers = self.quantize(model, [x for x, _ in batches], watch)
        return network, report_of(model, network, layers, batches, watch)

    def quantize(
        self, model: nn.Module, batches: Sequence[Tensor], watch: Watch = unwatched
    ) -> tuple[IntegerNetwork, list[Layer]]:
        """The integer network, not written yet, and what became of every population. Raises as `export`."""
        config = conversion_of(model).config
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise ConversionError("the model is on an accelerator: export it from the CPU, model.cpu()")
        samples = _first(batches, self.fitted).cpu()
        head = {
            "spec": SPEC,
            "producer": {"spikeplug": spikeplug.__version__},
            "network": model.captured.name if isinstance(model, SpikingGraph) else type(model).__name__,
            "recipe": config.recipe,
        }
        with torch.no_grad():
            quantizer = Quantizer(lower(model, samples), head, self.fraction)
            bundle = quantizer.run(samples, watch)
        return IntegerNetwork(bundle), quantizer.layers


def _pairs(samples: Sequence[Any]) -> list[tuple[Tensor, Any]]:
    return [(each[0], each[1]) if isinstance(each, (tuple, list)) else (each, None) for each in samples]


def _first(batches: Sequence[Tensor], count: int) -> Tensor:
    found, left = [], count
    for batch in batches:
        if left > 0:
            found.append(batch[:left])
            left -= len(found[-1])
    return torch.cat(found)


@torch.no_grad()
def report_of(
    model: Any, network: IntegerNetwork, layers: Sequence[Layer], batches: Sequence[Any], watch: Watch = unwatched
) -> dict[str, Any]:
    """The integer network beside the converted one and the dense one, on the same samples.

    Returns:
        `layers`: rows of `Layer`, with the share of spikes that differ from the converted network's, and of windows
        with another value; None where that one has no such neurons. `accuracy` of the three where there are labels,
        `agreement` of predictions, `samples`.
    """
    seen: dict[str, _Differences] = {}
    peaks: dict[str, int] = {}
    right = {"dense": 0, "converted": 0, "integer": 0}
    same = {"converted with dense": 0, "integer with dense": 0, "integer with converted": 0}
    count, labelled = 0, True
    for index, (x, labels) in enumerate(batches):
        watch("measuring", index, len(batches))
        with in_mode(model, "dense"):
            dense = model(x).flatten(1).argmax(1)
        converted, theirs = _watched(model, x)
        fired, readout = network.fire(network.encode(x), peaks)
        integer = network.logits(readout).flatten(1).argmax(1)
        for name, spikes in theirs.items():
            ours = fired.get(name)
            if ours is not None and ours.numel() == spikes.numel():
                seen.setdefault(name, _Differences()).add(ours, spikes.reshape(ours.shape), network.bundle)
        predictions = {"dense": dense, "converted": converted.flatten(1).argmax(1), "integer": integer}
        for pair in same:
            one, other = pair.split(" with ")
            same[pair] += int((predictions[one] == predictions[other]).sum())
        labelled = labelled and labels is not None
        if labelled:
            for name, each in predictions.items():
                right[name] += int((each == torch.as_tensor(labels)).sum())
        count += len(x)
    for name, peak in peaks.items():
        if peak > STATE_LIMIT:
            raise ConversionError(
                f"'{name}': a state needs {bits(peak)} bits on a sample that its range was not fitted to, 24 are "
                f"there: fit it to more, -s fitted={count}"
            )
    measured = [{**dataclasses.asdict(layer), "state_bits": bits(peaks[layer.name])} for layer in layers]
    return {
        "samples": count,
        "layers": [{**row, **seen.get(str(row["name"]), _Differences()).shares()} for row in measured],
        "agreement": {pair: each / count for pair, each in same.items()},
        "accuracy": {name: each / count for name, each in right.items()} if labelled else None,
    }


@dataclasses.dataclass
class _Differences:
    """How many spikes and windows of one population differ, of how many."""

    spikes: int = 0
    places: int = 0
    values: int = 0
    windows: int = 0

    def add(self, one: Tensor, other: Tensor, bundle: Bundle) -> None:
        self.spikes += int((one != other).sum())
        self.places += one.numel()
        self.values += int(_differing(one, other, bundle).sum())
        self.windows += one[0].numel()

    def shares(self) -> dict[str, float | None]:
        """Of nothing compared, None."""
        if not self.places:
            return {"spikes_differ": None, "values_differ": None}
        return {"spikes_differ": self.spikes / self.places, "values_differ": self.values / self.windows}


def _differing(one: Tensor, other: Tensor, bundle: Bundle) -> Tensor:
    """Windows of two trains `[T, ...]` that stand for different values; of a rate only the number of spikes counts."""
    if bundle.code == "rate":
        return one.sum(0) != other.sum(0)
    return (one != other).any(0)


def _watched(model: SpikingGraph, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Result and spikes int8 `[T, B, ...]` of the converted network, by the name of the population."""
    kept = {site: _Window() for site in sites(model).values()}
    with listening(kept):
        result = model(x)
    names = _population_names(model) if model.stream is None else {}
    found = {}
    for site, each in kept.items():
        if each.spikes is not None:
            name = (
                "image" if isinstance(site, StreamingSite) and site.kind == "image" else names.get(site.name, site.name)
            )
            found[name] = each.spikes
    return result, found


class _Window(Listener):
    """The last window of one site, int8."""

    def __init__(self) -> None:
        self.spikes: Tensor | None = None

    def window(self, coder: Any, x: Tensor, spikes: Tensor) -> None:
        self.spikes = spikes.to(torch.int8)


def _population_names(model: SpikingGraph) -> Mapping[str, str]:
    """Name of a site -> name of the population that fires its spikes: the path of the activation that it codes."""
    named: dict[str, str] = {}
    for node in model.program.graph.nodes:
        module = model.program.get_submodule(str(node.target)) if node.op == "call_module" else None
        source = getattr(module, "source", None)
        if not isinstance(source, Site) or source.name in named:
            continue
        before = fed(node)
        while str(before.target) == "aten.reshape.default":
            before = fed(before)
        kind = model.kinds[before.name].kind
        named[source.name] = {"input": "image", "activation": before.meta["path"]}.get(kind, source.name)
    return named
