"""Spikeplug turns a pretrained network into a spiking one under a coding scheme that is a plugin.

Names are imported at their first use, so that `import spikeplug`, and with it every plugin's hook module and the
command line, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spikeplug.plugins.hookspecs import API_VERSION, hookimpl

if TYPE_CHECKING:
    from spikeplug.coding.listeners import Listener, listening
    from spikeplug.coding.site import in_mode
    from spikeplug.coding.statistics import ActivationStats
    from spikeplug.coding.types import CodeParams, Encoder, Neuron, Recipe
    from spikeplug.config import ConversionConfig
    from spikeplug.conversion.architecture import Architecture
    from spikeplug.conversion.bundle import load, save
    from spikeplug.conversion.plan import Plan, Problem
    from spikeplug.conversion.record import Conversion, conversion_of
    from spikeplug.conversion.report import ConversionReport
    from spikeplug.conversion.statistics_file import load_statistics, save_statistics
    from spikeplug.conversion.verbs import (
        calibrate,
        convert,
        fit,
        observe,
        plan,
        prepare,
        report,
        set_execution,
    )
    from spikeplug.errors import SpikeplugError
    from spikeplug.measure.counting import count_spikes
    from spikeplug.measure.energy import CostModel, EnergyReport, energy
    from spikeplug.plugins import (
        get_approximator,
        get_encoder,
        get_exporter,
        get_neuron,
        get_pass,
        get_recipe,
        get_trainer,
    )

__version__ = "0.1.0"

_HOME = {
    "conversion.architecture": ("Architecture",),
    "conversion.bundle": ("load", "save"),
    "config": ("ConversionConfig",),
    "conversion.plan": ("Plan", "Problem"),
    "conversion.record": ("Conversion", "conversion_of"),
    "conversion.verbs": (*("calibrate", "convert", "fit", "observe", "plan", "prepare", "report", "set_execution"),),
    "measure.diagnosis": ("diagnose",),
    "measure.counting": ("count_spikes",),
    "measure.energy": ("CostModel", "EnergyReport", "energy"),
    "errors": ("SpikeplugError",),
    "coding.listeners": ("Listener", "listening"),
    "conversion.statistics_file": ("load_statistics", "save_statistics"),
    "plugins": (
        *("get_approximator", "get_encoder", "get_exporter", "get_neuron", "get_pass", "get_recipe", "get_trainer"),
    ),
    "conversion.report": ("ConversionReport",),
    "coding.site": ("in_mode",),
    "coding.statistics": ("ActivationStats",),
    "coding.types": ("CodeParams", "Encoder", "Neuron", "Recipe"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "API_VERSION",
    "ActivationStats",
    "Architecture",
    "CodeParams",
    "Conversion",
    "ConversionConfig",
    "ConversionReport",
    "CostModel",
    "Encoder",
    "EnergyReport",
    "Listener",
    "Neuron",
    "Plan",
    "Problem",
    "Recipe",
    "SpikeplugError",
    "__version__",
    "calibrate",
    "conversion_of",
    "convert",
    "count_spikes",
    "diagnose",
    "energy",
    "fit",
    "get_approximator",
    "get_encoder",
    "get_exporter",
    "get_neuron",
    "get_pass",
    "get_recipe",
    "get_trainer",
    "hookimpl",
    "in_mode",
    "listening",
    "load",
    "load_statistics",
    "observe",
    "plan",
    "prepare",
    "report",
    "save",
    "save_statistics",
    "set_execution",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'spikeplug' has no attribute '{name}'")
    return getattr(importlib.import_module(f"spikeplug.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
