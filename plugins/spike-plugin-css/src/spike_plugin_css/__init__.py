"""Canonic signed spikes (CSS) and ternary self-amplifying neurons (TSA). This module imports nothing heavy."""

from __future__ import annotations

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_encoders() -> dict[str, str]:
    return {"css": "spike_plugin_css.encoder:CSS"}


@hookimpl
def spikeplug_neurons() -> dict[str, str]:
    return {"tsa": "spike_plugin_css.neuron:TSA", "tsa-relu": "spike_plugin_css.neuron:TSAReLU"}


@hookimpl
def spikeplug_trainers() -> dict[str, str]:
    return {"css-adjust": "spike_plugin_css.adjust:Adjust"}


@hookimpl
def spikeplug_recipes() -> dict[str, str]:
    return {"css": "spike_plugin_css.recipe:CSS", "css-q": "spike_plugin_css.recipe:CSS_Q"}
