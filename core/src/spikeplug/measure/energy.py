"""Energy of a converted network beside its dense one, from operations and spikes that were counted.

Prices are data: `cost_models.json`, or a file of one's own. Traffic is that of Eq. 59-60 of multi-granularity phase
coding (a spike is one bit). The figures are estimates from counts, no measurements of a chip.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeplug.coding.listeners import SpikeCount
from spikeplug.coding.site import Site, sites
from spikeplug.conversion.report import Op
from spikeplug.conversion.verbs import architecture_of, report
from spikeplug.errors import CalibrationError, OptionError, listed, nearest
from spikeplug.graph.streaming import StreamingSite

from .counting import SpikeCounts, count_spikes

DEFAULT = "45 nm"


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Picojoules an operation.

    Attributes:
        mac, ac: a multiply-accumulate, an accumulate.
        neuron: one neuron's update in one time step.
        read, write: 32 bits from and to memory.
        source: where the figures are from.
    """

    name: str
    mac: float
    ac: float
    neuron: float
    read: float
    write: float
    source: str = ""

    @classmethod
    def named(cls, name: str) -> CostModel:
        """A cost model by its name, or of a `.json` file that holds the figures of one.

        Raises:
            OptionError: there is none of the name, or the file is none; the message names the choices or the key.
        """
        if name.endswith(".json"):
            return cls._of_file(Path(name))
        known: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "cost_models.json").read_text())
        if name not in known:
            raise OptionError(f"no cost model '{name}'{nearest(name, known)} Known: {listed(known)}; or a .json file")
        return cls(name, **known[name])

    @classmethod
    def _of_file(cls, path: Path) -> CostModel:
        try:
            given = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise OptionError(f"cannot read the cost model {path}: {error}") from None
        known = {field.name for field in dataclasses.fields(cls)}
        prices = known - {"name", "source"}
        if not isinstance(given, dict) or set(given) - known or prices - set(given):
            raise OptionError(f"{path} is no cost model: it must hold {listed(prices)}, and may hold name and source")
        for key in prices:
            if isinstance(given[key], bool) or not isinstance(given[key], (int, float)) or given[key] < 0:
                raise OptionError(f"{path}: {key}={given[key]!r}, picojoules of at least 0 are needed")
        figures: dict[str, Any] = {"name": path.stem, **given}
        return cls(**figures)


@dataclasses.dataclass(frozen=True)
class OpEnergy:
    """Counts of one operation, for one unit of the report (a token, a sample).

    Attributes:
        dense_macs: MACs of the dense network.
        macs, acs: what is left of them, and the accumulates that spikes cause.
        exact: whether every synapse was counted where its spike fell; else the operation's spikes are taken to fall
            evenly over its inputs.
    """

    name: str
    role: str
    dense_macs: float
    macs: float
    acs: float
    exact: bool = True

    @property
    def reads(self) -> float:
        """Words of 32 bits read: a weight and an activation for a MAC, a weight and one bit for an AC (Eq. 59)."""
        return 2 * self.macs + (1 + 1 / 32) * self.acs


@dataclasses.dataclass(frozen=True)
class SiteEnergy:
    """Counts of the neurons of one site, for one unit of the report.

    Attributes:
        updates: neurons times their steps.
    """

    name: str
    neurons: float
    spikes: float
    updates: float

    @property
    def writes(self) -> float:
        """Words of 32 bits written: one bit in every update (Eq. 60)."""
        return self.updates / 32


@dataclasses.dataclass(frozen=True)
class EnergyReport:
    """Counts for one `unit`, and what they cost, in millijoules."""

    ops: tuple[OpEnergy, ...]
    sites: tuple[SiteEnergy, ...]
    unit: str
    costs: CostModel

    def total(self, count: str) -> float:
        """Sum of a count over operations, or over sites: `neurons`, `spikes`, `updates`, `writes`."""
        of_sites = count in ("neurons", "spikes", "updates", "writes")
        return float(sum(getattr(part, count) for part in (self.sites if of_sites else self.ops)))

    @property
    def dense(self) -> float:
        """MACs of the dense network."""
        return 1e-9 * self.costs.mac * self.total("dense_macs")

    @property
    def spiking(self) -> float:
        """MACs and ACs of the spiking one."""
        return 1e-9 * (self.costs.mac * self.total("macs") + self.costs.ac * self.total("acs"))

    @property
    def dense_with_memory(self) -> float:
        """The same and traffic: a weight and an activation are read for every MAC (Eq. 59, first line)."""
        return self.dense + 1e-9 * 2 * self.costs.read * self.total("dense_macs")

    @property
    def spiking_with_memory(self) -> float:
        """The same and traffic and neurons."""
        traffic = self.costs.read * self.total("reads") + self.costs.write * self.total("writes")
        return self.spiking + 1e-9 * (traffic + self.costs.neuron * self.total("updates"))

    @property
    def assumptions(self) -> str:
        """What the figures rest on."""
        each = ", ".join(f"{name} {getattr(self.costs, name)} pJ" for name in ("mac", "ac", "neuron", "read", "write"))
        source = f" [{self.costs.source}]" if self.costs.source else ""
        even = [op.name for op in self.ops if not op.exact]
        evenly = f"; spikes taken to fall evenly over the inputs of {len(even)} operations" if even else ""
        return (
            f"{self.costs.name}: {each} (read and write: 32 bits){source}. Counted per {self.unit}, not measured on a "
            f"chip; a signed or weighted spike is one AC per synapse{evenly}. Left out: norms, activations, softmax, "
            "residual additions"
        )

    def summary(self) -> dict[str, Any]:
        """Totals, ready for JSON."""
        counts = ("dense_macs", "macs", "acs", "reads", "writes", "updates", "neurons", "spikes")
        energies = ("dense", "spiking", "dense_with_memory", "spiking_with_memory")
        millijoules = {name: getattr(self, name) for name in energies}
        ratios = {
            "ratio": self.spiking / self.dense if self.dense else None,
            "ratio_with_memory": self.spiking_with_memory / self.dense_with_memory if self.dense else None,
        }
        totals = {count: self.total(count) for count in counts}
        return {"unit": self.unit, **totals, "millijoules": millijoules, **ratios, "assumptions": self.assumptions}

    def __str__(self) -> str:
        said = self.summary()
        lines = [
            f"{self.dense:.4g} mJ dense, {self.spiking:.4g} mJ spiking per {self.unit} (MAC and AC alone)",
            f"{self.dense_with_memory:.4g} mJ dense, {self.spiking_with_memory:.4g} mJ spiking with memory and neurons",
            f"{said['dense_macs']:.4g} MACs dense; {said['macs']:.4g} MACs and {said['acs']:.4g} ACs spiking",
            self.assumptions,
        ]
        return "\n".join(lines)


def energy(model: nn.Module, batches: Any, costs: CostModel | str = DEFAULT) -> EnergyReport:
    """Run batches through a converted model, count its spikes, and charge them.

    ACs of a linear layer are its spikes times its outputs; those of a convolution are the synapses that the spikes of
    every place have, so that padding costs nothing. Where spikes pass another operation before they reach a
    convolution, its ACs are its MACs times the spikes that one of its inputs fires on average, and the report says so.
    A layer that no batch reached is charged as dense.

    Args:
        batches: a batch, a tensor or a dict, as the model takes it; or several.
        costs: the name of a cost model, a `.json` file of one, or one.

    Raises:
        ConversionError: the model is not converted.
        CalibrationError: its MACs are not known before a calibration batch, or no batch was given.
        OptionError: there is no such cost model.
    """
    costs = CostModel.named(costs) if isinstance(costs, str) else costs
    architecture = architecture_of(model)
    several: Iterable[Any] = [batches] if isinstance(batches, (Tensor, Mapping)) else batches
    units = 0
    with torch.no_grad(), count_spikes(model) as counts:
        for batch in several:
            architecture.feed(model, batch)
            units += architecture.units(batch)
    return charge(model, counts, units, costs)


def charge(model: nn.Module, counts: SpikeCounts, units: int, costs: CostModel | None = None) -> EnergyReport:
    """Charge spikes that were counted over so many units of the model's report. Raises as `energy`."""
    found = report(model)
    if not units:
        raise CalibrationError("there is no batch to count spikes on: give at least one")
    if any(op.macs is None for op in found.ops):
        raise CalibrationError("the MACs of the model are not known: calibrate it first")
    fired = {name: count for name, count in counts.by_site.items() if count.neurons}
    coded = {
        name: site for name, site in sites(model).items() if name in fired and isinstance(site, (Site, StreamingSite))
    }
    of_sites = tuple(
        SiteEnergy(
            name,
            fired[name].neurons / units,
            fired[name].spikes / units,
            fired[name].neurons * site.encoder.steps * site.encoder.updates / units,
        )
        for name, site in coded.items()
    )
    modules = dict(model.named_modules())
    ops = tuple(_charged(op, fired, modules.get(op.name), units) for op in found.ops)
    return EnergyReport(ops, of_sites, found.unit, costs or CostModel.named(DEFAULT))


def _charged(op: Op, fired: Mapping[str, SpikeCount], layer: nn.Module | None, units: int) -> OpEnergy:
    macs = float(op.macs or 0)
    if op.role != "spiking":
        return OpEnergy(op.name, op.role, macs, macs, 0.0)
    counts = [fired[name] for name in op.sites if name in fired]
    if not counts:  # no batch reached it
        return OpEnergy(op.name, op.role, macs, macs, 0.0)
    synapses = _synapses(layer, counts[0].places, macs) if len(counts) == 1 else None
    if synapses is not None and counts[0].places is not None:
        accumulates = float((counts[0].places.cpu().double() * synapses).sum()) / units
        return OpEnergy(op.name, op.role, macs, 0.0, accumulates)
    rate = sum(count.spikes for count in counts) / sum(count.neurons for count in counts)
    return OpEnergy(
        op.name, op.role, macs, 0.0, macs * rate, exact=len(counts) == 1 and not hasattr(layer, "kernel_size")
    )


def _synapses(layer: Any, places: Tensor | None, macs: float) -> Tensor | None:
    """Synapses that one input of a convolution has at every place; None where its input is not what its site fires."""
    kernel = getattr(layer, "kernel_size", None)
    plain = places is not None and kernel is not None and not layer.transposed and layer.padding_mode == "zeros"
    if not plain or places is None or kernel is None or places.ndim != len(kernel):
        return None
    found = torch.tensor(float(layer.out_channels // layer.groups), dtype=torch.float64)
    each = layer.out_channels * layer.in_channels // layer.groups
    # Two numbers for every dimension, the last dimension first.
    pads = list(reversed(layer._reversed_padding_repeated_twice[1::2]))
    before = list(reversed(layer._reversed_padding_repeated_twice[0::2]))
    for dim, (size, taps) in enumerate(zip(places.shape, kernel, strict=True)):
        stride, dilation = layer.stride[dim], layer.dilation[dim]
        outputs = (size + before[dim] + pads[dim] - dilation * (taps - 1) - 1) // stride + 1
        reached = torch.arange(outputs).unsqueeze(1) * stride + torch.arange(taps) * dilation - before[dim]
        inside = reached[(reached >= 0) & (reached < size)]
        found = found.unsqueeze(-1) * torch.bincount(inside, minlength=size).double()
        each *= outputs * taps
    return found if each == macs else None
