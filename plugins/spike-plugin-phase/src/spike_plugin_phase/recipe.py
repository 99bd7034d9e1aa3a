"""Recipes of phase coding: what the papers compare."""

from __future__ import annotations

from typing import Any

from spikeplug import Recipe


def _recipe(name: str, summary: str, **options: Any) -> Recipe:
    return Recipe(
        name,
        summary,
        encoder="phase",
        neuron="phase-if",
        encoder_options=options,
        neuron_options={"spikes": "spikes", "mask": "mask"},
    )


LAS = _recipe("las", "phase code of base 2 that rounds down (LAS)", rounding="floor")
BASE2_ROUND = _recipe("base2-round", "phase code of base 2 that rounds to nearest, the baseline of what is learned")
PHASE = _recipe("phase", "phase code with one learned base", grains=1)
MGPC = _recipe("mgpc", "multi-granularity phase code: two learned bases, thresholds and resets", grains=2)
SINGLE_SPIKE = _recipe("single-spike", "phase code of base 2 with at most one spike", rounding="floor", spikes=1)
TWO_SPIKE = _recipe("two-spike", "phase code of base 2 with at most two spikes", rounding="floor", spikes=2)
