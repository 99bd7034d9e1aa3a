"""Recipes of canonic signed spikes."""

from __future__ import annotations

from typing import Any

from spikeplug import Recipe


def _recipe(name: str, summary: str, **options: Any) -> Recipe:
    return Recipe(
        name,
        summary,
        encoder="css",
        encoder_options=options,
        # An image must be covered whole; what saturates at a clip could not be taken back by late input.
        overrides={"image": {"percentile": 100.0}, "clip": {"headroom": 1.5}},
        neuron="tsa",
        neuron_options={"beta": "beta"},
        targets=frozenset({"module"}),
    )


CSS = _recipe("css", "canonic signed spikes, whole trains stream through a CNN, T = 12", steps=12, beta=1.5)
CSS_Q = _recipe("css-q", "the same with β = 2, whose values are even, for quantized networks", steps=8, beta=2.0)
