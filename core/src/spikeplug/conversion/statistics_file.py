"""What the sites of a model saw, kept in a file, so that many schemes are fitted to one pass over the calibration data.

One safetensors file; its metadata bind it to the model, the rewrites before observation and the calibration data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spikeplug.coding.site import Coder
from spikeplug.coding.statistics import ActivationStats
from spikeplug.config import ConversionConfig
from spikeplug.errors import BundleError, CalibrationError
from spikeplug.files import draft_of

from .record import conversion_of

FORMAT = 1
KEY = "spikeplug_statistics"
TENSORS = ("low", "high", "values", "rows")
PROBE = 1024
"""Values of every parameter that the fingerprint of a model reads."""


def save_statistics(
    statistics: Mapping[str, ActivationStats],
    path: str | os.PathLike[str],
    model: nn.Module,
    batches: Iterable[Any] = (),
) -> None:
    """Write what `observe` gave. The file appears whole, or not at all.

    Args:
        model, batches: the converted model that was observed, and on what.

    Raises:
        BundleError: the file cannot be written.
    """
    named = ((f"{site}/{name}", getattr(stats, name)) for site, stats in statistics.items() for name in TENSORS)
    tensors = {name: tensor.contiguous() for name, tensor in named}
    counts = {site: stats.count for site, stats in statistics.items()}
    metadata = {KEY: json.dumps({"format": FORMAT, **_identity(model, batches), "counts": counts})}
    target = Path(os.path.abspath(path))
    try:
        with draft_of(target) as draft:
            safetensors.torch.save_file(tensors, draft, metadata)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error


def load_statistics(
    path: str | os.PathLike[str], model: nn.Module, batches: Iterable[Any] = ()
) -> dict[str, ActivationStats]:
    """Read what `save_statistics` wrote, for the same model after the same passes, on the same batches.

    Raises:
        BundleError: the file is not there, damaged, none of ours, or newer than this release.
        CalibrationError: it is of another model, other passes or approximators, or other calibration data.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(KEY, "null"))
            if said is None:
                raise BundleError(f"{path} holds no calibration statistics: `save_statistics` did not write it")
            if said["format"] > FORMAT:
                raise BundleError(f"{path} was written by a later spikeplug: install that one")
            _compare(path, said, _identity(model, batches))
            found = {}
            for site, count in said["counts"].items():
                low, high, values, rows = (file.get_tensor(f"{site}/{name}") for name in TENSORS)
                found[site] = ActivationStats(low, high, values, rows, count, device)
            return found
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _identity(model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
    config = conversion_of(model).config
    return {
        "model": fingerprint(model),
        "passes": json.dumps([config.passes, config.pass_options], sort_keys=True),
        "approximators": _approximations(config),
        "calibration": _digest(_tensors(batches)),
    }


def _approximations(config: ConversionConfig) -> str:
    """What replaces operations while sites are observed, and where: sites behind it see what it gives."""
    built = {name: each for name, each in config.build_approximators().items() if name != "exact"}
    return json.dumps([config.approximators, repr(built), config.include, config.exclude]) if built else "exact"


def _compare(path: object, said: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    remedies = {
        "model": "another model",
        "passes": f"the passes {said['passes']}, not {now['passes']}",
        "approximators": "other approximators, or the same with other options",
        "calibration": "other calibration data",
    }
    for key, what in remedies.items():
        if said[key] != now[key]:
            raise CalibrationError(f"{path} was observed on {what}: observe this one anew, into another file")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and some values of all parameters and buffers but those of sites."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    coders = [f"{name}." for name, module in model.named_modules() if isinstance(module, Coder)]
    own = ((name, tensor) for name, tensor in tensors.items() if not any(name.startswith(each) for each in coders))
    return _digest((name, _probe(tensor), tuple(tensor.shape)) for name, tensor in own)


def _probe(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // PROBE)].float().cpu()


def _tensors(batches: Any) -> Iterable[tuple[str, Tensor, tuple[int, ...]]]:
    """Every tensor in nested batches, by its place."""
    if isinstance(batches, Tensor):
        yield "", batches.detach().cpu(), tuple(batches.shape)
    elif isinstance(batches, Mapping):
        for key in sorted(batches):
            yield from ((f"{key}.{name}", *rest) for name, *rest in _tensors(batches[key]))  # type: ignore[misc]
    elif isinstance(batches, Iterable) and not isinstance(batches, str):
        for each in batches:
            yield from _tensors(each)


def _digest(parts: Iterable[tuple[str, Tensor, tuple[int, ...]]]) -> str:
    digest = hashlib.sha256()
    for name, tensor, shape in parts:
        digest.update(f"{name} {shape} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
