"""The recipes `bse` (weighted layers and attention operands in spikes) and `laser` (nonlinear operations too)."""

from __future__ import annotations

from spikeplug import Recipe

BSE_RECIPE = Recipe(
    name="bse",
    summary="LASER's bit spike encoding of every weighted layer and attention operand; nonlinear operations exact",
    encoder="bse",
    neuron="bse-if",
    neuron_options={"steps": "steps"},
)

LASER = Recipe(
    name="laser",
    summary="LASER whole: bit spike encoding everywhere, and every nonlinear operation by spiking codecs (ASNC)",
    encoder="bse",
    neuron="bse-if",
    neuron_options={"steps": "steps"},
    approximators={"*": "asnc"},
    approximator_follows={"steps": "steps"},
)
