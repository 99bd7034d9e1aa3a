"""Energy of a converted network beside its dense one, from operations and spikes that were counted.

Sources: 4.6 pJ a MAC and 0.9 pJ an AC in 45 nm (Horowitz, 2014); traffic by Eq. 59-60 of multi-granularity phase coding
(5 pJ to read or write 32 bits; a spike is one bit). The figures are estimates from counts, no measurements of a chip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from spikeplug.conversion import SpikeCounts, architecture_of, count_spikes, report
from spikeplug.coverage import Op
from spikeplug.errors import CalibrationError
from spikeplug.flow import FlowSite
from spikeplug.site import Site, SpikeCount, sites


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Picojoules an operation.

    Attributes:
        mac, ac: a multiply-accumulate, an accumulate.
        neuron: one neuron's update in one time step.
        read, write: 32 bits from and to memory.
    """

    name: str = "45 nm"
    mac: float = 4.6
    ac: float = 0.9
    neuron: float = 0.9
    read: float = 5.0
    write: float = 5.0


@dataclasses.dataclass(frozen=True)
class OpEnergy:
    """Counts of one operation, for one unit of the report (a token, a sample).

    Attributes:
        dense_macs: MACs of the dense network.
        macs, acs: what is left of them, and the accumulates that spikes cause.
    """

    name: str
    role: str
    dense_macs: float
    macs: float
    acs: float


@dataclasses.dataclass(frozen=True)
class EnergyReport:
    """Counts for one `unit`, and what they cost, in millijoules.

    Attributes:
        updates: neurons of all sites times their steps.
        spikes: spikes of all sites.
    """

    ops: tuple[OpEnergy, ...]
    updates: float
    spikes: float
    unit: str
    costs: CostModel

    def total(self, count: str) -> float:
        """Sum over operations of `dense_macs`, `macs` or `acs`."""
        return float(sum(getattr(op, count) for op in self.ops))

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
        """The same and traffic and neurons: 33 bits are read for every AC, one bit is written in every update."""
        reads = 2 * self.total("macs") + (1 + 1 / 32) * self.total("acs")
        of_neurons = self.costs.write / 32 + self.costs.neuron
        return self.spiking + 1e-9 * (self.costs.read * reads + of_neurons * self.updates)

    @property
    def assumptions(self) -> str:
        """What the figures rest on."""
        each = ", ".join(f"{name} {getattr(self.costs, name)} pJ" for name in ("mac", "ac", "neuron", "read", "write"))
        return (
            f"{self.costs.name}: {each} (read and write: 32 bits). Counted per {self.unit}, not measured on a chip; a "
            "signed or weighted spike is one AC per synapse. Left out: norms, activations, softmax, residual additions"
        )

    def summary(self) -> dict[str, Any]:
        """Totals, ready for JSON."""
        counts = {count: self.total(count) for count in ("dense_macs", "macs", "acs")}
        counts |= {"updates": self.updates, "spikes": self.spikes}
        energies = ("dense", "spiking", "dense_with_memory", "spiking_with_memory")
        millijoules = {name: getattr(self, name) for name in energies}
        ratios = {
            "ratio": self.spiking / self.dense if self.dense else None,
            "ratio_with_memory": self.spiking_with_memory / self.dense_with_memory if self.dense else None,
        }
        return {"unit": self.unit, **counts, "millijoules": millijoules, **ratios, "assumptions": self.assumptions}

    def __str__(self) -> str:
        said = self.summary()
        lines = [
            f"{self.dense:.4g} mJ dense, {self.spiking:.4g} mJ spiking per {self.unit} (MAC and AC alone)",
            f"{self.dense_with_memory:.4g} mJ dense, {self.spiking_with_memory:.4g} mJ spiking with memory and neurons",
            f"{said['dense_macs']:.4g} MACs dense; {said['macs']:.4g} MACs and {said['acs']:.4g} ACs spiking",
            self.assumptions,
        ]
        return "\n".join(lines)


def energy(model: nn.Module, batches: Iterable[Any], costs: CostModel | None = None) -> EnergyReport:
    """Run batches through a converted model, count its spikes, and charge them.

    ACs of a weighted layer are its MACs times the spikes that one of its inputs fires on average: exact for linear
    layers, and for convolutions but for their padding. A layer that no batch reached is charged as dense.

    Raises:
        ConversionError: the model is not converted.
        CalibrationError: its MACs are not known before a calibration batch, or no batch was given.
    """
    architecture = architecture_of(model)
    units = 0
    with torch.no_grad(), count_spikes(model) as counts:
        for batch in batches:
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
    coded = {name: site for name, site in sites(model).items() if name in fired and isinstance(site, (Site, FlowSite))}
    updates = sum(fired[name].neurons * site.encoder.steps * site.encoder.updates for name, site in coded.items())
    spikes = sum(fired[name].spikes for name in coded)
    ops = tuple(_charged(op, fired) for op in found.ops)
    return EnergyReport(ops, updates / units, spikes / units, found.unit, costs or CostModel())


def _charged(op: Op, fired: Mapping[str, SpikeCount]) -> OpEnergy:
    macs = float(op.macs or 0)
    if op.role != "spiking":
        return OpEnergy(op.name, op.role, macs, macs, 0.0)
    counts = [fired[name] for name in op.sites if name in fired]
    if not counts:  # no batch reached it
        return OpEnergy(op.name, op.role, macs, macs, 0.0)
    rate = sum(count.spikes for count in counts) / sum(count.neurons for count in counts)
    return OpEnergy(op.name, op.role, macs, 0.0, macs * rate)
