"""Recipes of time to first spike."""

from __future__ import annotations

from typing import Any

from spikeplug import Recipe


def _recipe(name: str, summary: str, encoder: str = "ttfs", **more: Any) -> Recipe:
    return Recipe(name, summary, encoder=encoder, neuron="ttfs-if", neuron_options={"steps": "steps"}, **more)


TTFS = _recipe("ttfs", "time to first spike, one code for each of T steps", encoder_options={"clip": "mse"})
CONTINUOUS = _recipe(
    "ttfs-continuous", "continuous time to first spike in T time steps, the baseline", "ttfs-continuous"
)
QC_A2S = _recipe(
    "qc-a2s",
    "a quantized language model (8-bit weights, log2 T-bit activations) as time to first spike",
    encoder_options={"clip": "mse", "power_of_two": True},
    passes=("rotate", "quantize-weights", "prefix", "defer-softmax"),
    targets=frozenset({"lm"}),
)
