"""Image networks and image data. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_architectures() -> dict[str, str]:
    return {"vision": "spikeplug_vision.images:Vision"}


@hookimpl
def spikeplug_commands() -> dict[str, str]:
    return {"diagnose": "spikeplug_vision.cli:diagnose_command"}
