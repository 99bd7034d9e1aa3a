"""Spikeplug turns a pretrained network into a spiking one under a coding scheme that is a plugin.

Names are imported at their first use, so that `import spikeplug`, and with it every plugin's hook module and the
command line, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spikeplug.hookspecs import API_VERSION, hookimpl

if TYPE_CHECKING:
    from spikeplug.architecture import Architecture
    from spikeplug.bundle import load, save
    from spikeplug.config import ConversionConfig
    from spikeplug.conversion.plan import Plan, Problem
    from spikeplug.conversion.record import Conversion, conversion_of
    from spikeplug.conversion.verbs import (
        calibrate,
        convert,
        count_spikes,
        fit,
        observe,
        plan,
        prepare,
        report,
        set_execution,
    )
    from spikeplug.costs import CostModel, EnergyReport, energy
    from spikeplug.coverage import ConversionReport
    from spikeplug.errors import SpikeplugError
    from spikeplug.listeners import Listener, listening
    from spikeplug.observed import load_observed, save_observed
    from spikeplug.plugins import (
        get_approximator,
        get_encoder,
        get_exporter,
        get_neuron,
        get_pass,
        get_recipe,
        get_trainer,
    )
    from spikeplug.site import in_mode
    from spikeplug.stats import ActivationStats
    from spikeplug.types import CodeParams, Encoder, Neuron, Recipe

__version__ = "0.1.0"

_HOME = {
    "architecture": ("Architecture",),
    "bundle": ("load", "save"),
    "config": ("ConversionConfig",),
    "conversion.plan": ("Plan", "Problem"),
    "conversion.record": ("Conversion", "conversion_of"),
    "conversion.verbs": (
        *("calibrate", "convert", "count_spikes", "fit", "observe", "plan", "prepare", "report", "set_execution"),
    ),
    "diagnosis": ("diagnose",),
    "costs": ("CostModel", "EnergyReport", "energy"),
    "errors": ("SpikeplugError",),
    "listeners": ("Listener", "listening"),
    "observed": ("load_observed", "save_observed"),
    "plugins": (
        *("get_approximator", "get_encoder", "get_exporter", "get_neuron", "get_pass", "get_recipe", "get_trainer"),
    ),
    "coverage": ("ConversionReport",),
    "site": ("in_mode",),
    "stats": ("ActivationStats",),
    "types": ("CodeParams", "Encoder", "Neuron", "Recipe"),
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
    "load_observed",
    "observe",
    "plan",
    "prepare",
    "report",
    "save",
    "save_observed",
    "set_execution",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'spikeplug' has no attribute '{name}'")
    return getattr(importlib.import_module(f"spikeplug.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
