"""Phase coding (MGPC, LAS) for Spikeplug. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_encoders() -> dict[str, str]:
    return {"phase": "spike_plugin_phase.encoder:Phase"}


@hookimpl
def spikeplug_neurons() -> dict[str, str]:
    return {"phase-if": "spike_plugin_phase.neuron:PhaseIF"}


@hookimpl
def spikeplug_trainers() -> dict[str, str]:
    return {"mgpc": "spike_plugin_phase.trainer:MGPC"}


@hookimpl
def spikeplug_recipes() -> dict[str, str]:
    return {
        "las": "spike_plugin_phase.recipe:LAS",
        "base2-round": "spike_plugin_phase.recipe:BASE2_ROUND",
        "phase": "spike_plugin_phase.recipe:PHASE",
        "mgpc": "spike_plugin_phase.recipe:MGPC",
        "single-spike": "spike_plugin_phase.recipe:SINGLE_SPIKE",
        "two-spike": "spike_plugin_phase.recipe:TWO_SPIKE",
    }
