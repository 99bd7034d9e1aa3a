"""Conversion of a plain PyTorch model: every weighted layer in its tree of modules receives spikes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor, nn

from spikeplug import network
from spikeplug.architecture import Architecture
from spikeplug.config import ConversionConfig
from spikeplug.coverage import ConversionReport, Op, spiking_op
from spikeplug.errors import BundleError, ConversionError, OptionError
from spikeplug.fold import CONVOLUTIONS
from spikeplug.layers import SPIKING, SpikingLayer, channels_of, make_spiking
from spikeplug.nonlinear import OPS, approximate, labels_of, within
from spikeplug.site import Coder, Site

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

LAYERS = "layers.json"


class ModuleTree(Architecture):
    """Hands networks with convolutions to `spikeplug.network`. Of others, it swaps `nn.Linear` for its spiking twin.

    A module that owns parameters and is neither one of `SPIKING` nor known to stay dense is refused, so that no
    weighted operation is left dense unseen.
    """

    target: ClassVar[str] = "module"

    def prepare(self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any] = ()) -> nn.Module:
        if as_graph(model, config):
            return network.prepare(model, config)
        names = {name for name, module in model.named_modules() if type(module) in SPIKING}
        if not names:
            raise ConversionError(f"{type(model).__name__} has no layer that can receive spikes: {_choices()}")
        for name, module in model.named_modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                raise ConversionError(
                    f"'{name or type(model).__name__}' is a TransformerEncoderLayer, whose fast path reads weights "
                    "without calling their layers, so their spikes would be left out: write its forward out instead"
                )
        ops = {
            name: OPS[type(module)]
            for name, module in model.named_modules(remove_duplicate=False)
            if type(module) in OPS
        }
        labels = {name: labels_of(op) for name, op in ops.items()}
        config.check_patterns(
            {**dict.fromkeys(names, ("input",)), **{name: ("module",) for name, _ in _unknown(model)}, **labels}
        )
        for name, module in _unknown(model):
            if not config.excludes(name, "module"):
                raise ConversionError(
                    f"module '{name}' ({type(module).__name__}) owns parameters and has no spiking form: "
                    f"list it under exclude to leave it dense. {_choices()}"
                )
        folded = [name for each in config.build_passes() for name in each.apply(model, batches)]
        replaced = approximate(model, config, ops)
        for name, module in list(model.named_modules()):
            if name in names and not config.excludes(name, "input"):
                encoder, neuron = config.build(name, "input")
                make_spiking(module, Site(name, "input", encoder, neuron, channels_of(module)))
        model.spikeplug_folded = folded  # type: ignore[assignment]
        model.spikeplug_approximated = replaced  # type: ignore[assignment]
        model.spikeplug_macs = {}  # type: ignore[assignment]
        return model

    def feed(self, model: nn.Module, batch: Any) -> None:
        if model.spikeplug_macs:
            super().feed(model, batch)
            return
        # The dense network's MACs, of its modules and of what its forward methods compute by functions.
        with network.counted_macs(model.spikeplug_macs, type(model).__name__, _batch_size(batch)):  # type: ignore[arg-type]
            super().feed(model, batch)

    def units(self, batch: Any) -> int:
        return _batch_size(batch)

    def report(self, model: nn.Module) -> ConversionReport:
        config: ConversionConfig = model.spikeplug_config  # type: ignore[assignment]
        return ConversionReport(config.recipe, tuple(_ops(model)), "sample")

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of save: a plain PyTorch model takes none")
        # save_model stores tied weights once, which save_file refuses.
        safetensors.torch.save_model(model, str(folder / network.WEIGHTS))
        described = {"macs": model.spikeplug_macs, "folded": model.spikeplug_folded}
        (folder / LAYERS).write_text(json.dumps(described, indent=1))

    def load(self, folder: Path, **options: Any) -> nn.Module:
        model = options.pop("model", None)
        config = options.pop("config")
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of load: a plain PyTorch model takes model")
        if not isinstance(model, nn.Module):
            raise BundleError(f"{folder} holds a plain PyTorch model: give the dense network as load(path, model=net)")
        described = json.loads((folder / LAYERS).read_text())
        model = self.prepare(model, config)
        model.spikeplug_folded = described["folded"]
        model.spikeplug_macs = described["macs"]
        network.restore(model, folder, type(model).__name__)
        return model


def as_graph(model: nn.Module, config: ConversionConfig) -> bool:
    """Whether the network is traced, as `ConversionConfig.structure` says."""
    if config.structure != "auto":
        return config.structure == "graph"
    return config.build()[0].flows or any(isinstance(module, CONVOLUTIONS) for module in model.modules())


def _choices() -> str:
    return "Layers with a spiking form: " + ", ".join(layer.__name__ for layer in SPIKING)


def _unknown(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        owns = next(module.parameters(recurse=False), None) is not None
        if owns and type(module) not in SPIKING and not isinstance(module, (*DENSE_WITH_WEIGHTS, SpikingLayer)):
            yield name, module


def _ops(model: Any) -> Iterator[Op]:
    macs: dict[str, int] = model.spikeplug_macs
    for name, module in model.named_modules():
        kind, count = type(module).__name__, macs.get(name, 0) if macs else None
        if within(name, model.spikeplug_approximated):
            continue
        if isinstance(module, SpikingLayer):
            yield spiking_op(name, kind.removeprefix("Spiking"), count, module.source)
        elif name in model.spikeplug_approximated:
            yield Op(name, model.spikeplug_approximated[name], "approximated", 0, kind)
        elif name in model.spikeplug_folded:
            yield Op(name, "BatchNorm", "folded")
        elif type(module) in SPIKING or _owns(module) or not (isinstance(module, Coder) or list(module.children())):
            yield Op(name, kind, "dense", count if type(module) in SPIKING or _owns(module) else 0)
    counted = {name for name, module in model.named_modules() if _counted(module)} | set(model.spikeplug_approximated)
    by_function = macs.get("", 0) - sum(macs.get(name, 0) for name in counted)
    if by_function > 0:
        note = "products computed by functions inside forward stay dense"
        yield Op("(functions)", "products", "dense", by_function, note=note)


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _counted(module: nn.Module) -> bool:
    return isinstance(module, SpikingLayer) or type(module) in SPIKING or _owns(module)


def _batch_size(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(each) for each in tensors if isinstance(each, Tensor) and each.ndim), 1) or 1
