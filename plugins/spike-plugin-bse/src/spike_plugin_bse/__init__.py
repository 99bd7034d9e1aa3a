"""LASER (BSE, ASNC, STE) for Spikeplug. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_encoders() -> dict[str, str]:
    return {"bse": "spike_plugin_bse.encoder:BSE"}


@hookimpl
def spikeplug_neurons() -> dict[str, str]:
    return {"bse-if": "spike_plugin_bse.neuron:BitIF", "asnc-if": "spike_plugin_bse.neuron:CodecIF"}


@hookimpl
def spikeplug_approximators() -> dict[str, str]:
    return {"asnc": "spike_plugin_bse.nonlinear:ASNC"}


@hookimpl
def spikeplug_trainers() -> dict[str, str]:
    return {"ste": "spike_plugin_bse.ste:STE"}


@hookimpl
def spikeplug_recipes() -> dict[str, str]:
    return {"bse": "spike_plugin_bse.recipe:BSE_RECIPE", "laser": "spike_plugin_bse.recipe:LASER"}
