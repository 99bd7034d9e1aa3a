"""What is known of a converted network, in one object on it: what was asked for, and what became of every operation."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from spikeplug.config import ConversionConfig
from spikeplug.errors import ConversionError

from .report import ConversionReport


@dataclasses.dataclass
class Conversion:
    """What report, energy, delay, diagnosis, files and exporters read.

    Attributes:
        config: what was asked for; its `execution` is how the network runs now.
        report: every operation and its role.
        architecture: the kind of network, by the name of what handles it.
        folded: path -> type of what was merged into another layer, or does nothing.
        origin: what a command line opened: the network's name and how its images are prepared.
    """

    config: ConversionConfig
    report: ConversionReport
    architecture: str
    folded: dict[str, str] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


def refuse_replaced(model: nn.Module) -> None:
    """Raise ConversionError where a layer on spikes was replaced by another one after the conversion."""
    modules = dict(model.named_modules())
    for op in conversion_of(model).report.ops:
        module = modules.get(op.name)
        if module is None:
            continue
        layer = op.role == "spiking" and not hasattr(module, "source")
        embedding = op.role == "coded" and isinstance(module, nn.Embedding) and not hasattr(module, "site")
        if layer or embedding:
            raise ConversionError(
                f"'{op.name}' was replaced after the conversion by a {type(module).__name__}, which is dense: change "
                "the dense model, and convert it then"
            )


def conversion_of(model: nn.Module) -> Conversion:
    """The record of a converted network. Raises ConversionError when it is none."""
    found = getattr(model, "conversion", None)
    if not isinstance(found, Conversion):
        raise ConversionError(f"{type(model).__name__} is no converted model: convert it with spikeplug.convert first")
    return found
