"""What a plugin can bring, and how it is found and loaded."""

from __future__ import annotations

from .loading import (
    CHOOSER,
    FIRST_PARTY,
    KINDS,
    Part,
    PluginInfo,
    Registry,
    architecture_name,
    get_approximator,
    get_class,
    get_encoder,
    get_exporter,
    get_neuron,
    get_pass,
    get_recipe,
    get_trainer,
    probe,
    probe_here,
    registry,
)

__all__ = [
    "CHOOSER",
    "FIRST_PARTY",
    "KINDS",
    "Part",
    "PluginInfo",
    "Registry",
    "architecture_name",
    "get_approximator",
    "get_class",
    "get_encoder",
    "get_exporter",
    "get_neuron",
    "get_pass",
    "get_recipe",
    "get_trainer",
    "probe",
    "probe_here",
    "registry",
]
