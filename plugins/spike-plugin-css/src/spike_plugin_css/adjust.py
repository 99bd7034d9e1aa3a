"""Amplitude adjustment: amplitudes grow where too much potential is left over (CSS, appendix A.3, Eq. A.18)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from spikeplug.coding.listeners import Listener, listening
from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.conversion.verbs import architecture_of
from spikeplug.errors import OptionError
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.streaming import StreamingSite

from .encoder import CSS


@dataclasses.dataclass(frozen=True)
class Adjust:
    """Trainer: raises amplitudes of a converted network from what its neurons have left over. Weights stay.

    Args:
        rounds: how often all sites are measured and adjusted.
        percentile: share of a site's neurons, in percent, that may have more than one amplitude left over.

    Raises:
        OptionError: an option is out of range.
    """

    rounds: int = 3
    percentile: float = 99.9

    name: ClassVar[str] = "css-adjust"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise OptionError(f"rounds={self.rounds}: at least 1 is needed")
        if not 0 < self.percentile <= 100:
            raise OptionError(f"percentile={self.percentile}: a number above 0, at most 100, is needed")

    def train(
        self, model: nn.Module, batches: Sequence[Any], *, checkpoint: Any = None, watch: Watch = unwatched
    ) -> list[float]:
        """Adjust in place. Returns, for every round, the largest amplitude's growth: 1 where nothing is to be done.

        Raises:
            OptionError: the model is not coded by `css`, or a checkpoint is asked for.
        """
        if checkpoint is not None:
            raise OptionError("the trainer css-adjust takes seconds and keeps no checkpoint: leave it out")
        if not isinstance(model, SpikingGraph) or model.stream is None:
            raise OptionError("the trainer css-adjust adjusts networks converted by 'css'")
        growth = []
        for turn in range(self.rounds):
            watch("adjusting", turn, self.rounds)
            left = self._left(model, batches)
            largest = 1.0
            for site, potential in left.items():
                assert isinstance(site.encoder, CSS)
                factor = amplification(potential, site.encoder.total)
                site.set_params({**site.params().tensors(), "scale": site.amplitude * factor})
                largest = max(largest, factor)
            growth.append(largest)
        return growth

    def _left(self, model: SpikingGraph, batches: Sequence[Any]) -> dict[StreamingSite, float]:
        """Percentile of the potential left at every site, in amplitudes; the largest of all batches."""
        assert model.stream is not None
        found: dict[Any, _Left] = {site: _Left(self.percentile) for site in model.stream.sites if not site.encodes}
        with torch.no_grad(), listening(found):
            for batch in batches:
                architecture_of(model).feed(model, batch)
        return {site: each.largest for site, each in found.items() if each.largest is not None}


class _Left(Listener):
    """The largest percentile of the potential left in one site, over all windows."""

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.largest: float | None = None

    def window(self, coder: Any, x: torch.Tensor, spikes: torch.Tensor) -> None:
        left = coder.residual(x).abs().flatten()
        value = float(left.kthvalue(max(1, round(left.numel() * self.percentile / 100))).values)
        self.largest = max(self.largest or 0.0, value)


def amplification(left: float, total: float) -> float:
    """s of Eq. A.18 for a potential u of `left` amplitudes and `total` = sum of β^(T-t).

    The equation's θ is taken as the unit: with amplitudes normalized to 1, `u - θ` is `left - 1`.
    """
    over = left - 1
    if over <= 0:
        return 1.0
    if over > 0.05 * total:
        return 1 + over / total
    if over > 0.01 * total:
        return 1 + (over - 0.01 * total) / total + 0.04
    return 1 + 4 * over / total
