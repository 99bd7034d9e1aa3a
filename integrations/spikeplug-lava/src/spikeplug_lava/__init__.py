"""Converted networks as integer networks for Loihi 2, and as NIR graphs. This module imports nothing heavy."""

from __future__ import annotations

from typing import Any

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_exporters() -> dict[str, str]:
    return {"lava": "spikeplug_lava.exporter:Lava", "nir": "spikeplug_lava.nir:NIR"}


def __getattr__(name: str) -> Any:
    if name == "IntegerNetwork":
        from spikeplug_lava.integer import IntegerNetwork

        return IntegerNetwork
    raise AttributeError(f"module 'spikeplug_lava' has no attribute '{name}'")
