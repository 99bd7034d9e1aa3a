"""What sites saw, in a file: the same fit without another pass over the data, and never for another model."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from torch import nn

import spikeplug
from spikeplug.conversion.statistics_file import KEY
from spikeplug.errors import BundleError, CalibrationError


def build(seed=0, width=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)).eval()


def data(seed=0):
    return [torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))]


def test_a_second_recipe_reads_what_the_first_saw(tmp_path):
    file = tmp_path / "seen.safetensors"
    first = spikeplug.convert(build(), "rate", calibration=data(), statistics=file)
    assert file.exists()
    assert list(tmp_path.iterdir()) == [file]
    changed = file.stat().st_mtime_ns
    stages = []
    second = spikeplug.convert(
        build(), "rate", calibration=data(), statistics=file, steps=9, watch=lambda stage, *_: stages.append(stage)
    )
    assert "calibrating" not in stages
    assert file.stat().st_mtime_ns == changed
    plain = spikeplug.convert(build(), "rate", calibration=data(), steps=9)
    x = data(1)[0]
    assert torch.equal(second(x), plain(x))
    assert not torch.equal(second(x), first(x))


def test_percentiles_come_out_the_same(tmp_path):
    model = spikeplug.convert(build(), "rate", calibration=data(), statistics=tmp_path / "seen")
    kept = spikeplug.load_statistics(tmp_path / "seen", model, data())
    seen = spikeplug.observe(model, data())
    assert set(kept) == set(seen)
    for name, stats in seen.items():
        assert kept[name].count == stats.count
        for field in ("low", "high", "values", "rows"):
            assert torch.equal(getattr(kept[name], field), getattr(stats, field))


def other_statistics():
    """The same weights, and other batch-norm statistics, which are buffers."""
    model = build()
    model[1].running_mean += 1
    return model


@pytest.mark.parametrize(
    ("model", "batches", "options", "message"),
    [
        (build(1), data(), {}, "another model"),
        (build(0, 6), data(), {}, "another model"),
        (other_statistics(), data(), {}, "another model"),
        (build(), data(1), {}, "other calibration data"),
        (build(), data() * 2, {}, "other calibration data"),
    ],
    ids=["weights", "shape", "buffers", "data", "more data"],
)
def test_a_file_of_something_else_is_refused(tmp_path, model, batches, options, message):
    file = tmp_path / "seen"
    spikeplug.convert(build(), "rate", calibration=data(), statistics=file)
    with pytest.raises(CalibrationError, match=message):
        spikeplug.convert(model, "rate", calibration=batches, statistics=file, **options)


def test_the_passes_are_compared_where_weights_do_not_tell(tmp_path):
    file, model = tmp_path / "seen", spikeplug.convert(build(), "rate", calibration=data())
    spikeplug.save_statistics(spikeplug.observe(model, data()), file, model, data())
    conversion = spikeplug.conversion_of(model)
    conversion.config = conversion.config.model_copy(update={"passes": ("other",)})
    with pytest.raises(CalibrationError, match="the passes"):
        spikeplug.load_statistics(file, model, data())


def test_damaged_foreign_and_missing_files_are_one_clear_line(tmp_path):
    file, model = tmp_path / "seen", spikeplug.convert(build(), "rate", calibration=data())
    with pytest.raises(BundleError, match="does not exist"):
        spikeplug.load_statistics(file, model, data())
    file.write_bytes(b"nonsense")
    with pytest.raises(BundleError, match="cannot read"):
        spikeplug.load_statistics(file, model, data())
    safetensors.torch.save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(BundleError, match="holds no calibration statistics"):
        spikeplug.load_statistics(file, model, data())
    safetensors.torch.save_file({"x": torch.zeros(1)}, file, {KEY: json.dumps({"format": 99})})
    with pytest.raises(BundleError, match="a later spikeplug"):
        spikeplug.load_statistics(file, model, data())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    model = spikeplug.convert(build(), "rate", calibration=data())
    seen = spikeplug.observe(model, data())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(BundleError, match="No space left on device"):
        spikeplug.save_statistics(seen, tmp_path / "seen", model)
    assert not os.listdir(tmp_path)
