"""The parts that core brings itself, registered through the same door as a plugin's."""

from __future__ import annotations

from spikeplug.graph.table import CORE

from .hookspecs import API_VERSION, hookimpl

spikeplug_api = API_VERSION


@hookimpl
def spikeplug_encoders() -> dict[str, str]:
    return {"rate": "spikeplug.coding.rate:Rate"}


@hookimpl
def spikeplug_neurons() -> dict[str, str]:
    return {"if": "spikeplug.coding.rate:IF"}


@hookimpl
def spikeplug_approximators() -> dict[str, str]:
    return {"exact": "spikeplug.graph.nonlinear:Exact"}


@hookimpl
def spikeplug_operations() -> dict[str, str]:
    return CORE


@hookimpl
def spikeplug_recipes() -> dict[str, str]:
    return {"rate": "spikeplug.coding.rate:RECIPE"}


@hookimpl
def spikeplug_architectures() -> dict[str, str]:
    return {"network": "spikeplug.conversion.networks:Networks", "layers": "spikeplug.conversion.layerwise:Layers"}
