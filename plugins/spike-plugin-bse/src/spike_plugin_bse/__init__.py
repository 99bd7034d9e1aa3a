"""Bit spike encoding (BSE) of LASER for Spikeplug. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_encoders() -> dict[str, str]:
    return {"bse": "spike_plugin_bse.encoder:BSE"}


@hookimpl
def spikeplug_neurons() -> dict[str, str]:
    return {"bse-if": "spike_plugin_bse.neuron:BitIF"}


@hookimpl
def spikeplug_recipes() -> dict[str, str]:
    return {"bse": "spike_plugin_bse.recipe:BSE_RECIPE"}
