"""Energy by hand counts, and its dependence on what fires."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spikeplug
from spikeplug.costs import CostModel, EnergyReport, OpEnergy
from spikeplug.errors import CalibrationError, ConversionError


def test_totals_by_hand():
    ops = (OpEnergy("a", "spiking", 100.0, 0.0, 40.0), OpEnergy("b", "dense", 10.0, 10.0, 0.0))
    costs = CostModel("made up", mac=4.0, ac=1.0, neuron=2.0, read=8.0, write=16.0)
    found = EnergyReport(ops, updates=64.0, spikes=5.0, unit="sample", costs=costs)
    assert found.dense == pytest.approx(440e-9)
    assert found.spiking == pytest.approx((40 + 40) * 1e-9)
    assert found.dense_with_memory == pytest.approx((440 + 110 * 16) * 1e-9)
    # 10 MACs read 20 words, 40 ACs read 41.25; 64 bits are written, and 64 neurons updated.
    assert found.spiking_with_memory == pytest.approx((80 + 8 * 61.25 + 64 * 0.5 + 64 * 2) * 1e-9)
    assert "made up: mac 4.0 pJ" in found.assumptions
    assert found.summary()["ratio"] == pytest.approx(80 / 440)
    assert "not measured on a chip" in str(found)


def test_a_linear_network_costs_its_spikes_times_its_outputs():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    batch = torch.rand(7, 6, generator=torch.Generator().manual_seed(0))
    snn = spikeplug.convert(net, "rate", calibration=[batch], steps=8)
    with spikeplug.count_spikes(snn) as counts:
        snn(batch)
    found = spikeplug.energy(snn, [batch])
    spikes = {name: count.spikes for name, count in counts.by_site.items()}
    assert found.total("dense_macs") == 6 * 5 + 5 * 3
    assert found.total("macs") == 0
    assert found.total("acs") == pytest.approx((spikes["0"] * 5 + spikes["2"] * 3) / 7)
    assert found.updates == 8 * (6 + 5)
    assert found.spikes == pytest.approx(sum(spikes.values()) / 7)
    # Twice the batches are the same for one sample.
    assert spikeplug.energy(snn, [batch, batch]) == found


def test_silence_costs_no_accumulates():
    net = nn.Sequential(nn.Linear(4, 2, bias=False)).eval()
    snn = spikeplug.convert(net, "rate", calibration=[torch.rand(3, 4)])
    found = spikeplug.energy(snn, [torch.zeros(3, 4)])
    assert found.total("acs") == 0 == found.spiking
    assert found.spiking_with_memory > 0


def test_what_was_excluded_stays_macs():
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)).eval()
    snn = spikeplug.convert(net, "rate", calibration=[torch.rand(3, 4)], exclude=["1"])
    assert spikeplug.energy(snn, [torch.rand(3, 4)]).total("macs") == 4


def test_what_cannot_be_charged_says_so():
    net = nn.Sequential(nn.Linear(4, 2)).eval()
    with pytest.raises(ConversionError, match="no spiking site"):
        spikeplug.energy(net, [torch.rand(3, 4)])
    snn = spikeplug.convert(net, "rate", calibration=[torch.rand(3, 4)])
    with pytest.raises(CalibrationError, match="give at least one"):
        spikeplug.energy(snn, [])
