"""The recipe `bse`: weighted layers, q·k and p·v coded by BSE; nonlinear operations exact."""

from __future__ import annotations

from spikeplug import Recipe

BSE_RECIPE = Recipe(
    name="bse",
    summary="LASER's bit spike encoding of every weighted layer and attention operand; nonlinear operations exact",
    encoder="bse",
    neuron="bse-if",
    neuron_options={"steps": "steps"},
)
