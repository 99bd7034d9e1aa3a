"""What approximators, operations, passes, trainers and exporters must do."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

import spikeplug
from spikeplug.coding.site import in_mode, sites
from spikeplug.conversion.sharing import shared_copy
from spikeplug.errors import OptionError
from spikeplug.graph.structure import leaves
from spikeplug.graph.trials import difference
from spikeplug.testing.guard import Guarded


def _run(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return leaves(model(**batch) if isinstance(batch, Mapping) else model(batch))


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class ApproximatorConformance(Guarded):
    """Checks of an approximator. Give the fixtures `approximator` and `operations`."""

    tolerance: ClassVar[float] = 0.05
    """Largest error of a result, over the largest value of the exact one."""

    @pytest.fixture
    def approximator(self) -> Any:
        """The approximator under test, registered under its `name`."""
        pytest.fail("give the fixture `approximator`")

    @pytest.fixture
    def operations(self) -> Mapping[str, nn.Module]:
        """Operation, by its name, and a module that is it, for activations `[B, 16]`."""
        pytest.fail("give the fixture `operations`")

    @pytest.fixture
    def converted(
        self, approximator: Any, operations: Mapping[str, nn.Module]
    ) -> Callable[[str], tuple[Any, Any, Any]]:
        """The dense network, the converted one and a batch for an operation, which alone is replaced."""

        def convert(op: str) -> tuple[nn.Module, nn.Module, Tensor]:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(8, 16), operations[op], nn.Linear(16, 4)).eval()
            batch = torch.randn(64, 8)
            options = {approximator.name: dataclasses.asdict(approximator)}
            spiking = spikeplug.convert(
                net, "rate", calibration=[batch], exclude=["input"], approximators={op: approximator.name},
                approximator_options=options,
            )  # fmt: skip
            return net, spiking, batch

        return convert

    def test_is_a_frozen_dataclass_with_its_name(self, approximator: Any) -> None:
        assert type(approximator)(**dataclasses.asdict(cast(Any, approximator))) == approximator
        assert spikeplug.get_approximator(approximator.name) is not None
        with pytest.raises(dataclasses.FrozenInstanceError):
            approximator.name_of_nothing = 1

    def test_results_are_near_and_not_exact(self, converted: Any, operations: Mapping[str, nn.Module]) -> None:
        for op in operations:
            net, spiking, batch = converted(op)
            assert 0 < difference(_run(net, batch)[0], _run(spiking, batch)[0]) < self.tolerance, op
            rows = {row.name: row.role for row in spikeplug.report(spiking).ops}
            assert rows["1"] == "approximated", op

    def test_stepped_equals_fused_and_counts_alike(self, converted: Any, operations: Mapping[str, nn.Module]) -> None:
        for op in operations:
            _, spiking, batch = converted(op)
            found = []
            for execution in ("fused", "stepped"):
                spikeplug.set_execution(spiking, cast(Any, execution))
                with spikeplug.count_spikes(spiking) as counts:
                    found.append((_run(spiking, batch[:4])[0], counts))
            assert difference(found[0][0], found[1][0]) < 1e-5, op
            assert found[0][1].total == found[1][1].total > 0, op

    def test_saved_and_loaded_it_is_itself(
        self, converted: Any, operations: Mapping[str, nn.Module], tmp_path: Path
    ) -> None:
        for op in operations:
            _, spiking, batch = converted(op)
            spikeplug.save(spiking, tmp_path / op)
            assert _equal(_run(spikeplug.load(tmp_path / op), batch), _run(spiking, batch)), op

    def test_an_operation_without_a_form_is_refused(self, approximator: Any) -> None:
        with pytest.raises(OptionError):
            approximator.build("no such operation", nn.Identity(), "there")


class OperationConformance(Guarded):
    """Checks of an operation with a rule. Give the fixtures `network` and `example`: a network that uses it."""

    role: ClassVar[str] = ""
    """The role that its rule shall give it in the report of a window code; empty: any."""

    @pytest.fixture
    def operation(self) -> str:
        """Path of the operation in the network."""
        pytest.fail("give the fixture `operation`")

    @pytest.fixture
    def network(self) -> nn.Module:
        """A network, in evaluation mode, with layers ahead of the operation and behind it."""
        pytest.fail("give the fixture `network`")

    @pytest.fixture
    def example(self) -> Any:
        """A batch of at least four samples, a tensor."""
        pytest.fail("give the fixture `example`")

    def test_codes_left_out_the_network_is_the_dense_one(self, network: nn.Module, example: Tensor) -> None:
        dense = _run(network, example)
        spiking = spikeplug.convert(network, "rate", calibration=[example])
        with in_mode(spiking, "dense"):
            found = _run(spiking, example)
        assert all(difference(one, other) < 1e-5 for one, other in zip(dense, found, strict=True))
        assert not _equal(_run(spiking, example), dense)
        assert _equal(_run(network, example), dense)

    def test_it_has_its_role(self, network: nn.Module, example: Tensor, operation: str) -> None:
        spiking = spikeplug.convert(network, "rate", calibration=[example])
        rows = {row.name: row.role for row in spikeplug.report(spiking).ops}
        assert operation in rows, sorted(rows)
        assert not self.role or rows[operation] == self.role

    def test_samples_do_not_meet_where_they_do_not_in_the_dense_network(
        self, network: nn.Module, example: Tensor
    ) -> None:
        network, example = (
            copy.deepcopy(network).double(),
            example.double(),
        )  # codes flip where sums are rounded otherwise
        dense, alone = _run(network, example)[0][:1], _run(network, example[:1])[0]
        spiking = spikeplug.convert(network, "rate", calibration=[example], steps=256)
        if difference(dense, alone) < 1e-12:
            assert difference(_run(spiking, example)[0][:1], _run(spiking, example[:1])[0]) < 1e-9

    def test_saved_and_loaded_it_is_itself(self, network: nn.Module, example: Tensor, tmp_path: Path) -> None:
        spiking = spikeplug.convert(network, "rate", calibration=[example])
        spikeplug.save(spiking, tmp_path / "net")
        assert _equal(_run(spikeplug.load(tmp_path / "net"), example), _run(spiking, example))


class PassConformance(Guarded):
    """Checks of a pass. Give the fixtures `transform`, `model` and `batches`."""

    tolerance: ClassVar[float] = 1e-3
    """Largest error of a result, over the largest value: rewrites are rounded otherwise."""

    @pytest.fixture
    def transform(self) -> Any:
        """The pass under test."""
        pytest.fail("give the fixture `transform`")

    @pytest.fixture
    def model(self) -> nn.Module:
        """A model that it is for, in evaluation mode."""
        pytest.fail("give the fixture `model`")

    @pytest.fixture
    def batches(self) -> Sequence[Any]:
        """Batches of the model."""
        pytest.fail("give the fixture `batches`")

    def test_a_copy_that_shares_memory_is_changed_and_the_original_is_not(
        self, transform: Any, model: nn.Module, batches: Sequence[Any]
    ) -> None:
        before, state = _run(model, batches[0]), {key: each.clone() for key, each in model.state_dict().items()}
        copied = shared_copy(model)
        transform.apply(copied, batches)
        assert all(torch.equal(state[key], each) for key, each in model.state_dict().items())
        assert _equal(_run(model, batches[0]), before)
        if getattr(transform, "keeps_function", True):
            found = _run(copied, batches[0])
            assert all(difference(one, other) < self.tolerance for one, other in zip(before, found, strict=True))

    def test_twice_it_is_the_same(self, transform: Any, model: nn.Module, batches: Sequence[Any]) -> None:
        found = []
        for _ in range(2):
            copied = shared_copy(model)
            transform.apply(copied, batches)
            found.append(_run(copied, batches[0]))
        assert _equal(*found)


class TrainerConformance(Guarded):
    """Checks of a trainer. Give the fixtures `trainer`, `converted` and `batches`."""

    @pytest.fixture
    def trainer(self) -> Any:
        """The trainer under test, with few steps."""
        pytest.fail("give the fixture `trainer`")

    @pytest.fixture
    def converted(self) -> Callable[[], tuple[nn.Module, nn.Module]]:
        """Makes the dense model and the one that was converted of it, always the same."""
        pytest.fail("give the fixture `converted`")

    @pytest.fixture
    def batches(self) -> Sequence[Any]:
        """Batches as the trainer takes them."""
        pytest.fail("give the fixture `batches`")

    def test_losses_are_finite_and_the_same_every_time(self, trainer: Any, converted: Any, batches: Any) -> None:
        losses = [trainer.train(converted()[1], batches) for _ in range(2)]
        assert losses[0] == losses[1]
        assert losses[0]
        assert all(isinstance(loss, float) and loss == loss for loss in losses[0])

    def test_the_dense_model_keeps_its_weights(self, trainer: Any, converted: Any, batches: Any) -> None:
        dense, spiking = converted()
        state = {key: each.clone() for key, each in dense.state_dict().items()}
        trainer.train(spiking, batches)
        assert all(torch.equal(state[key], each) for key, each in dense.state_dict().items())
        assert all(site.calibrated for site in sites(spiking).values())


class ExporterConformance(Guarded):
    """Checks of an exporter. Give the fixtures `exporter`, `converted` and `samples`."""

    @pytest.fixture
    def exporter(self) -> Any:
        """The exporter under test."""
        pytest.fail("give the fixture `exporter`")

    @pytest.fixture
    def converted(self) -> nn.Module:
        """A converted network that it can export."""
        pytest.fail("give the fixture `converted`")

    @pytest.fixture
    def samples(self) -> Sequence[Any]:
        """Batches for it."""
        pytest.fail("give the fixture `samples`")

    def test_writes_a_file_and_returns_a_report(
        self, exporter: Any, converted: nn.Module, samples: Sequence[Any], tmp_path: Path
    ) -> None:
        state = {key: each.clone() for key, each in converted.state_dict().items()}
        report = exporter.export(converted, tmp_path / "out", samples)
        assert (tmp_path / "out").exists()
        assert json.loads(json.dumps(report, allow_nan=False))
        assert all(torch.equal(state[key], each) for key, each in converted.state_dict().items())

    def test_leaves_nothing_behind_where_it_fails(
        self, exporter: Any, converted: nn.Module, samples: Sequence[Any], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(spikeplug.SpikeplugError):
            exporter.export(converted, tmp_path / "file" / "out", samples)
        with pytest.raises(spikeplug.SpikeplugError):
            exporter.export(nn.Sequential(nn.Linear(4, 4)), tmp_path / "dense", samples)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
