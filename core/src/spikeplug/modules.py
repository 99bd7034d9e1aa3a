"""Conversion of a plain PyTorch model: every weighted layer in its tree of modules receives spikes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import nn

from spikeplug import plugins
from spikeplug.architecture import Architecture
from spikeplug.config import ConversionConfig
from spikeplug.coverage import ConversionReport, Op, dynamic_note
from spikeplug.errors import BundleError, ConversionError
from spikeplug.layers import SPIKING, SpikingLayer, channels_of, make_spiking
from spikeplug.nonlinear import OPS, approximate, within
from spikeplug.site import Site
from spikeplug.types import CodeParams

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

WEIGHTS = "model.safetensors"
LAYERS = "layers.json"


class ModuleTree(Architecture):
    """Swaps `nn.Linear` and `nn.Conv*d` for their spiking twins wherever they stand in the tree.

    A module that owns parameters and is neither one of those nor known to stay dense is refused, so that no weighted
    operation is left dense unseen.
    """

    target: ClassVar[str] = "module"

    def prepare(self, model: nn.Module, config: ConversionConfig) -> nn.Module:
        names = {name: "input" for name, module in model.named_modules() if type(module) in SPIKING}
        if not names:
            raise ConversionError(f"{type(model).__name__} has no layer that can receive spikes: {_choices()}")
        config.check_exclude({**names, **{name: "module" for name, _ in _unknown(model)}})
        for name, module in _unknown(model):
            if not config.excludes(name, "module"):
                raise ConversionError(
                    f"module '{name}' ({type(module).__name__}) owns parameters and has no spiking form: "
                    f"list it under exclude to leave it dense. {_choices()}"
                )
        folded = [name for each in config.passes for name in plugins.get_pass(each).apply(model)]
        ops = {name: OPS[type(module)] for name, module in model.named_modules() if type(module) in OPS}
        replaced = approximate(model, config, ops)
        encoder, neuron = config.build()
        for name, module in list(model.named_modules()):
            if name in names and not config.excludes(name, "input"):
                make_spiking(module, Site(name, "input", encoder, neuron, channels_of(module)))
        model.spikeplug_folded = folded  # type: ignore[assignment]
        model.spikeplug_approximated = replaced  # type: ignore[assignment]
        return model

    def report(self, model: nn.Module) -> ConversionReport:
        config: ConversionConfig = model.spikeplug_config  # type: ignore[assignment]
        return ConversionReport(config.recipe, tuple(_ops(model)), "sample")

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_model(model, str(folder / WEIGHTS)) if _shares(model) else safetensors.torch.save_file(
            state, folder / WEIGHTS
        )
        layers = {name: module.macs for name, module in model.named_modules() if isinstance(module, SpikingLayer)}
        described = {"macs": layers, "folded": model.spikeplug_folded}
        (folder / LAYERS).write_text(json.dumps(described, indent=1))

    def load(self, folder: Path, **options: Any) -> nn.Module:
        model = options.pop("model", None)
        config = options.pop("config")
        if not isinstance(model, nn.Module):
            raise BundleError(f"{folder} holds a plain PyTorch model: give the dense network as load(path, model=net)")
        described = json.loads((folder / LAYERS).read_text())
        model = self.prepare(model, config)
        model.spikeplug_folded = described["folded"]
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        for name, module in model.named_modules():
            if isinstance(module, SpikingLayer):
                module.macs = described["macs"].get(name)
            if isinstance(module, Site):
                prefix = f"{name}."
                own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                module.set_params(CodeParams.from_tensors(own))
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise BundleError(f"{folder} does not fit {type(model).__name__}: missing {missing}, unknown {unexpected}")
        return model


def _choices() -> str:
    return "Layers with a spiking form: " + ", ".join(layer.__name__ for layer in SPIKING)


def _unknown(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        owns = next(module.parameters(recurse=False), None) is not None
        if owns and type(module) not in SPIKING and not isinstance(module, (*DENSE_WITH_WEIGHTS, SpikingLayer)):
            yield name, module


def _ops(model: Any) -> Iterator[Op]:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if within(name, model.spikeplug_approximated):
            continue
        if isinstance(module, SpikingLayer):
            dense = kind.removeprefix("Spiking")
            yield Op(
                name, dense, "spiking", module.macs, str(module.source.encoder), dynamic_note(module.source.encoder)
            )
        elif name in model.spikeplug_approximated:
            yield Op(name, model.spikeplug_approximated[name], "approximated", 0, kind)
        elif name in model.spikeplug_folded:
            yield Op(name, "BatchNorm", "folded")
        elif type(module) in SPIKING:
            yield Op(name, kind, "dense", None, note="excluded layers are dense; their MACs are not counted")
        elif not isinstance(module, Site) and (not list(module.children()) or isinstance(module, DENSE_WITH_WEIGHTS)):
            yield Op(name, kind, "dense")
        elif next(module.parameters(recurse=False), None) is not None:
            yield Op(name, kind, "dense", None, note="excluded modules are dense; their MACs are not counted")


def _shares(model: nn.Module) -> bool:
    state = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    return len(state) != len(set(state))
