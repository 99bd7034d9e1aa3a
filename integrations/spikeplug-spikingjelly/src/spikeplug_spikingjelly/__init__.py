"""Neurons and converted networks in SpikingJelly. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from typing import Any

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_frameworks() -> dict[str, str]:
    return {"spikingjelly": "spikeplug_spikingjelly.layers:SpikingJelly"}


def __getattr__(name: str) -> Any:
    if name in ("SJNeuron", "SJNetwork", "SpikingJelly", "SpikeplugRecipe", "signed_rules"):
        from spikeplug_spikingjelly import layers

        return getattr(layers, name)
    raise AttributeError(f"module 'spikeplug_spikingjelly' has no attribute '{name}'")
