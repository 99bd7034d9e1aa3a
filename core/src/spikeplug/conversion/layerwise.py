"""Conversion layer by layer, for networks that cannot be captured: every weighted layer codes its own input.

What is computed between layers is not known and stays dense; the report says so.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spikeplug.coding.layers import SPIKING, SpikingLayer, channels_of, make_spiking
from spikeplug.coding.site import Coder, Site
from spikeplug.config import ConversionConfig
from spikeplug.errors import BundleError, CalibrationError, ConversionError, OptionError
from spikeplug.graph.capture import unwrapped
from spikeplug.graph.network import samples_of

from .architecture import Architecture
from .networks import WEIGHTS, as_call, fill_sites
from .plan import Plan, Problem, refuse
from .record import Conversion, conversion_of
from .report import ConversionReport, Op, spiking_op
from .sharing import own, shared_copy

DENSE_WITH_WEIGHTS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
    nn.Embedding,
)
"""Modules with parameters that stay in floating point, and that the report lists so."""

BETWEEN = "converted layer by layer: what is computed between layers stays dense and is not known"
REPORT = "layers.json"


class Layers(Architecture):
    """Networks that are converted layer by layer."""

    target: ClassVar[str] = "module"

    def plan(self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any]) -> Plan:
        """What a conversion would make of the network. Raises as `prepare`, but for modules of no known role."""
        model = unwrapped(model)
        self._check(model, config, batches)
        problems = tuple(_problems(model, config))
        named = config.model_copy(update={"exclude": (*config.exclude, *(each.operation for each in problems))})
        found = conversion_of(_made(shared_copy(model), named, _counted(model, batches[0])))
        make = functools.partial(self.prepare, model, config, batches)
        return Plan(type(model).__name__, config, found.report, problems, make)

    def prepare(
        self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any] = (), *, inplace: bool = False
    ) -> nn.Module:
        model = unwrapped(model)
        self._check(model, config, batches)
        head = f"{type(model).__name__} cannot be converted by '{config.recipe}'"
        refuse(tuple(_problems(model, config)), head)
        macs = _counted(model, batches[0])
        model = model if inplace else shared_copy(model)
        config = config.apply_passes(model, batches)
        return _made(model, config, macs)

    def _check(self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any]) -> None:
        names = [name for name, module in model.named_modules() if type(module) in SPIKING]
        if not names:
            raise ConversionError(f"{type(model).__name__} has no layer that can receive spikes: {_choices()}")
        if config.build()[0].streams:
            raise OptionError(f"structure='layers': trains of '{config.encoder}' stream through captured networks only")
        if any(name != "exact" for name in config.approximators.values()):
            raise OptionError("structure='layers' has no approximators: operations between layers are not known")
        config.check_patterns({**dict.fromkeys(names, ("input",)), **dict.fromkeys(dict(_unknown(model)), ("module",))})
        if not batches:
            raise CalibrationError("the first batch counts the operations: give calibration=batches, or example=batch")

    def feed(self, model: nn.Module, batch: Any) -> Any:
        args, kwargs = as_call(model, batch)
        return model(*args, **kwargs)

    def units(self, batch: Any) -> int:
        return samples_of(batch)

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of save: a network takes none")
        safetensors.torch.save_model(model, str(folder / WEIGHTS))
        (folder / REPORT).write_text(json.dumps(conversion_of(model).report.to_dict()["ops"], indent=1))

    def load(self, folder: Path, **options: Any) -> nn.Module:
        model, config = options.pop("model", None), options.pop("config")
        if options or not isinstance(model, nn.Module):
            raise BundleError(f"{folder} was converted layer by layer: give the dense network as load(path, model=net)")
        model = shared_copy(unwrapped(model))
        _code_inputs(model, config)
        rows = json.loads((folder / REPORT).read_text())
        ops = tuple(Op(**{**row, "sites": tuple(row["sites"])}) for row in rows)
        model.conversion = Conversion(config, ConversionReport(config.recipe, ops, "sample"), "layers")  # type: ignore[assignment]
        _restore(model, folder)
        return model


def _made(model: nn.Module, config: ConversionConfig, macs: dict[str, int]) -> nn.Module:
    """Code every layer's input, and put the record of that on the model."""
    _code_inputs(model, config)
    report = ConversionReport(config.recipe, tuple(_ops(model, macs)), "sample")
    model.conversion = Conversion(config, report, "layers")  # type: ignore[assignment]
    return model


def _code_inputs(model: nn.Module, config: ConversionConfig) -> None:
    for name, module in list(model.named_modules()):
        if type(module) in SPIKING and not config.excludes(name, "input"):
            encoder, neuron = config.build(name, "input")
            make_spiking(module, Site(name, "input", encoder, neuron, channels_of(module)))


def _problems(model: nn.Module, config: ConversionConfig) -> Iterator[Problem]:
    for name, module in _unknown(model):
        if not config.excludes(name, "module"):
            reason = "owns parameters and has no spiking form"
            remedy = f"list it under exclude to leave it dense. {_choices()}"
            yield Problem(name, type(module).__name__, "", reason, remedy)


def _restore(model: nn.Module, folder: Path) -> None:
    """Read weights and parameters of sites. Raises BundleError: they are those of another network or dtype."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    fill_sites(model, tensors)
    name = type(model).__name__
    for path, tensor in list(model.state_dict().items()):
        if path in tensors and tensors[path].dtype != tensor.dtype:
            found = f"'{path}' is {tensors[path].dtype}, the given network's is {tensor.dtype}"
            raise BundleError(f"{folder}: {found}: convert it first")
    try:
        own(model)
        safetensors.torch.load_model(model, folder / WEIGHTS)
    except (RuntimeError, KeyError) as error:
        raise BundleError(f"{folder} does not fit the given {name}: {error}") from None


def _counted(model: nn.Module, batch: Any) -> dict[str, int]:
    """MACs of a sample of every module, by path, and of all under the empty one."""
    args, kwargs = as_call(model, batch)
    root, size = type(model).__name__, samples_of(batch)
    with FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    found = {}
    for name, flops in counter.get_flop_counts().items():
        path = "" if name in ("Global", root) else name.removeprefix(f"{root}.")
        found[path] = sum(flops.values()) // 2 // max(1, size)
    return found


def _choices() -> str:
    return "Layers with a spiking form: " + ", ".join(layer.__name__ for layer in SPIKING)


def _unknown(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if (
            _owns(module)
            and type(module) not in SPIKING
            and not isinstance(module, (*DENSE_WITH_WEIGHTS, SpikingLayer))
        ):
            yield name, module


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _ops(model: nn.Module, macs: dict[str, int]) -> Iterator[Op]:
    known = 0
    for name, module in model.named_modules():
        weighted = isinstance(module, SpikingLayer) or type(module) in SPIKING
        count = macs.get(name, 0) if weighted else 0
        known += count
        kind = type(module).__name__
        if isinstance(module, SpikingLayer):
            yield spiking_op(name, kind.removeprefix("Spiking"), count, module.source)
        elif weighted or _owns(module) or not (isinstance(module, Coder) or list(module.children())):
            yield Op(name, kind, "dense", count)
    yield Op("(between layers)", "functions", "dense", max(0, macs.get("", 0) - known), note=BETWEEN)
