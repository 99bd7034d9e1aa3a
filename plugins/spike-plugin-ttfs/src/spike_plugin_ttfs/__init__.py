"""Discrete time to first spike (QC-A2S) for Spikeplug. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_encoders() -> dict[str, str]:
    return {
        "ttfs": "spike_plugin_ttfs.encoder:TTFS",
        "ttfs-continuous": "spike_plugin_ttfs.encoder:ContinuousTTFS",
    }


@hookimpl
def spikeplug_neurons() -> dict[str, str]:
    return {"ttfs-if": "spike_plugin_ttfs.neuron:FirstSpikeIF"}


@hookimpl
def spikeplug_approximators() -> dict[str, str]:
    return {"ttfs-kernels": "spike_plugin_ttfs.nonlinear:Kernels"}


@hookimpl
def spikeplug_commands() -> dict[str, str]:
    return {"explain": "spike_plugin_ttfs.cli:explain_command"}


@hookimpl
def spikeplug_recipes() -> dict[str, str]:
    return {
        "ttfs": "spike_plugin_ttfs.recipe:TTFS",
        "qc-a2s": "spike_plugin_ttfs.recipe:QC_A2S",
        "ttfs-continuous": "spike_plugin_ttfs.recipe:CONTINUOUS",
    }
