"""Energy by hand counts, and its dependence on what fires."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spikeplug
from spikeplug.errors import CalibrationError, ConversionError, OptionError
from spikeplug.measure.energy import CostModel, EnergyReport, OpEnergy, SiteEnergy, _synapses


def test_totals_by_hand():
    ops = (OpEnergy("a", "spiking", 100.0, 0.0, 40.0), OpEnergy("b", "dense", 10.0, 10.0, 0.0))
    costs = CostModel("made up", mac=4.0, ac=1.0, neuron=2.0, read=8.0, write=16.0)
    found = EnergyReport(ops, (SiteEnergy("a", 8.0, 5.0, 64.0),), unit="sample", costs=costs)
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
    assert found.total("updates") == 8 * (6 + 5)
    assert found.total("spikes") == pytest.approx(sum(spikes.values()) / 7)
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


def test_padding_costs_nothing():
    """One spike in the corner of a 3 x 3 image meets 4 of the 9 taps of a padded 3 x 3 kernel, one in the middle 9."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(18, 1)).eval()
    corner, middle = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    corner[..., 0, 0] = middle[..., 1, 1] = 1.0
    snn = spikeplug.convert(net, "rate", calibration=[torch.cat([corner, middle])], steps=4)
    acs = [spikeplug.energy(snn, x).ops[0].acs for x in (corner, middle)]
    assert acs == [4 * 4 * 2, 4 * 9 * 2]
    assert spikeplug.energy(snn, [corner, middle]).ops[0].acs == sum(acs) / 2


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(2, 4, (3, 2), padding=(0, 1), dilation=(2, 1)),
        nn.Conv2d(4, 4, 3, padding="same", groups=2),
        nn.Conv1d(2, 3, 5, stride=3, padding=2),
        nn.Conv3d(1, 2, 2, padding=1),
    ],
)
def test_synapses_of_convolutions_equal_a_count_by_force(conv):
    """A convolution of ones counts the synapses that meet what is there."""
    dims = len(conv.kernel_size)
    places = torch.arange(7**dims).reshape([7] * dims)
    ones = torch.ones(1, conv.in_channels, *places.shape)
    macs = conv(ones)[0].numel() * conv.weight[0].numel()
    found = _synapses(conv, places, macs)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    ones.requires_grad_()
    conv(ones).sum().backward()
    torch.testing.assert_close(found, ones.grad[0, 0].double())
    assert _synapses(conv, places, macs + 1) is None  # what comes in has another shape than what the site fires


def test_where_spikes_pass_another_operation_the_report_says_so():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return self.second(nn.functional.pad(torch.relu(self.first(x)), (1, 1, 1, 1)))

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    snn = spikeplug.convert(Padded().eval(), "css", calibration=[x])
    found = spikeplug.energy(snn, x)
    assert [op.exact for op in found.ops if op.role == "spiking"] == [True, False]
    assert "evenly over the inputs of 1 operations" in found.assumptions


def test_cost_models_are_data(tmp_path):
    net = nn.Sequential(nn.Linear(4, 2)).eval()
    x = torch.rand(3, 4)
    snn = spikeplug.convert(net, "rate", calibration=[x])
    default, int8 = spikeplug.energy(snn, x), spikeplug.energy(snn, x, "45 nm, int8")
    assert int8.spiking / default.spiking == pytest.approx(0.1 / 0.9)
    assert "Horowitz" in default.assumptions
    own = tmp_path / "mine.json"
    own.write_text('{"mac": 1, "ac": 2, "neuron": 0, "read": 0, "write": 0}')
    assert spikeplug.energy(snn, x, str(own)).spiking == pytest.approx(2e-9 * default.total("acs"))
    own.write_text('{"mac": 1, "ac": -2, "neuron": 0, "read": 0, "write": 0}')
    with pytest.raises(OptionError, match="ac=-2"):
        CostModel.named(str(own))
    own.write_text('{"mac": 1}')
    with pytest.raises(OptionError, match="is no cost model"):
        CostModel.named(str(own))
    with pytest.raises(OptionError, match="did you mean '45 nm'"):
        spikeplug.energy(snn, x, "45nm")
