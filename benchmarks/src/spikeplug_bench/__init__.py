"""The benchmark runner. This module is the plugin; it imports nothing heavy."""

from __future__ import annotations

from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_commands() -> dict[str, str]:
    return {"bench": "spikeplug_bench.cli:app"}


@hookimpl
def spikeplug_engines() -> dict[str, str]:
    engines = {"local": "Local", "processes": "Processes", "ray": "Ray", "slurm": "Slurm"}
    return {name: f"spikeplug_bench.engines:{cls}" for name, cls in engines.items()}
