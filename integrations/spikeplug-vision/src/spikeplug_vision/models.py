"""Image networks by name: torchvision's, timm's, CIFAR ResNets, or what a Python function returns."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from spikeplug.errors import OptionError, nearest

CIFAR = {"size": 32, "crop": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGENET = {"size": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def open_model(source: str, weights: Path | None = None) -> nn.Module:
    """A network in evaluation mode, with `spikeplug_preprocess`, how its images are prepared.

    Args:
        source: a torchvision or timm name; `cifar_resnet20`, 32, 44, 56 or 110; or `module:function`, a function
            without arguments that returns the network.
        weights: a .safetensors, .pt or .pth file of its state dict; None: as it is built, which is at random for names.

    Raises:
        OptionError: there is no such network, or the weights do not fit.
    """
    model, preprocess = _built(source)
    if weights is not None:
        load_weights(model, weights)
    model.spikeplug_preprocess = {**preprocess, **getattr(model, "spikeplug_preprocess", {})}  # type: ignore[assignment]
    return model.eval()


def _built(source: str) -> tuple[nn.Module, Mapping[str, Any]]:
    if ":" in source:
        return _from_function(source), IMAGENET
    if source.startswith("cifar_resnet"):
        depth = source.removeprefix("cifar_resnet")
        if not depth.isdigit() or (int(depth) - 2) % 6:
            raise OptionError(f"'{source}': depths are 6 n + 2: cifar_resnet20, 32, 44, 56, 110")
        return CifarResNet(int(depth)), CIFAR
    import torchvision.models

    names = torchvision.models.list_models()
    if source in names:
        preset = torchvision.models.get_model_weights(source).DEFAULT.transforms()
        return torchvision.models.get_model(source, weights=None), _of_preset(preset)
    try:
        import timm
    except ImportError:
        hint = "; timm's names need pip install timm"
    else:
        if timm.is_model(source):
            model = timm.create_model(source, pretrained=False)
            return model, _of_timm(model.pretrained_cfg)
        names, hint = [*names, *timm.list_models()], ""
    raise OptionError(
        f"no network '{source}'{nearest(source, names)} Give a torchvision or timm name, cifar_resnet20, or "
        f"module:function{hint}"
    )


def _from_function(source: str) -> nn.Module:
    module, _, name = source.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)()
    except Exception as error:  # it is the user's code, which may raise anything
        raise OptionError(f"'{source}' cannot be called: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"'{source}' returns a {type(model).__name__}, a torch.nn.Module is needed")
    return model


def _of_preset(preset: Any) -> dict[str, Any]:
    if not hasattr(preset, "crop_size"):
        return dict(IMAGENET)
    return {
        "size": preset.resize_size[0],
        "crop": preset.crop_size[0],
        "mean": list(preset.mean),
        "std": list(preset.std),
        "interpolation": preset.interpolation.value,
    }


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    crop = config["input_size"][-1]
    return {
        "size": math.floor(crop / config.get("crop_pct", 0.875)),
        "crop": crop,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config.get("interpolation", "bilinear"),
    }


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict; prefixes of wrappers (`module.`) are taken off.

    Raises:
        OptionError: it cannot be read or does not fit.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise OptionError(f"cannot read weights {path}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # refused by PyTorch: the file holds more than tensors
        raise OptionError(
            f"cannot read weights {path}: a state dict alone is needed, {type(error).__name__}"
        ) from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    if not isinstance(state, Mapping):
        raise OptionError(f"weights {path} hold a {type(state).__name__}, a state dict is needed")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise OptionError(f"weights {path} do not fit {type(model).__name__}: {' '.join(lines[1:3])[:300]}") from None


class CifarResNet(nn.Module):
    """ResNet for CIFAR (He et al., 2016, section 4.2) with parameterless shortcuts (option A)."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, 1, blocks)
        self.layer2 = self._layer(16, 32, 2, blocks)
        self.layer3 = self._layer(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = _CifarBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, 3, 32, 32]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class _CifarBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.added = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(y + x)
