"""Neurons and converted networks in snnTorch. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from typing import Any

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_frameworks() -> dict[str, str]:
    return {"snntorch": "spikeplug_snntorch.layers:SnnTorch"}


def __getattr__(name: str) -> Any:
    if name in ("SnnNeuron", "SnnNetwork", "SnnTorch"):
        from spikeplug_snntorch import layers

        return getattr(layers, name)
    raise AttributeError(f"module 'spikeplug_snntorch' has no attribute '{name}'")
