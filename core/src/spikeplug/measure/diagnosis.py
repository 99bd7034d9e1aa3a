"""Where a converted network loses what: site by site, beside the dense network on the same batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikeplug.coding.listeners import Listener, listening
from spikeplug.coding.site import Coder, Site, in_mode, sites
from spikeplug.conversion.verbs import architecture_of
from spikeplug.errors import CalibrationError, ConversionError
from spikeplug.graph.network import SpikingGraph
from spikeplug.graph.streaming import StreamingSite


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One site.

    Attributes:
        spikes: per neuron and window.
        negative: share of spikes that are -1.
        error: root mean square of the decoded value less the dense network's, over that of the dense network's.
        residual, residual_999: mean and 99.9th percentile of the magnitude of the potential left, in amplitudes; None
            where every activation is a window of its own, which leaves nothing but rounding.
        by_step: share of the spikes that come at every step `T`.
    """

    site: str
    kind: str
    neurons: int
    spikes: float
    negative: float
    error: float
    residual: float | None
    residual_999: float | None
    by_step: tuple[float, ...]


class _Sums(Listener):
    """Keeps what one site has in the dense network, then compares its windows with that, one by one in their order."""

    def __init__(self) -> None:
        self.dense: list[Tensor] = []
        self.neurons = 0
        self.spikes = self.negative = self.squared = self.power = 0.0
        self.left: list[Tensor] = []
        self.by_step: Tensor | None = None

    def activation(self, coder: Coder, x: Tensor) -> None:
        self.dense.append(x)

    def window(self, coder: Any, x: Tensor, spikes: Tensor) -> None:
        if isinstance(coder, StreamingSite):
            d = torch.tensor(coder.stream.weights, dtype=spikes.dtype, device=spikes.device)
            value = torch.tensordot(d, spikes, dims=1) * coder.amplitude
            if not coder.encodes:
                left = coder.residual(x).abs().flatten()
                self.left.append(left[:: max(1, left.numel() // 65536)].float())
        else:
            value = coder.encoder.decode(spikes, coder.params(x))
        dense = self.dense.pop(0)
        fired = spikes.abs().flatten(1).sum(1).double().cpu()
        self.by_step = fired if self.by_step is None else self.by_step + fired
        self.neurons += spikes[0].numel()
        self.spikes += float(fired.sum())
        self.negative += float((spikes < 0).sum())
        self.squared += float((value - dense).double().square().sum())
        self.power += float(dense.double().square().sum())


def diagnose(model: nn.Module, batches: Iterable[Any]) -> list[Diagnosis]:
    """Run batches through a converted network and its dense counterpart, and compare every site.

    Errors of earlier layers are in those of later ones. Makes every spike; meant for some batches, not for a test set.

    Raises:
        ConversionError: the model is not converted, or was not captured as a graph.
        CalibrationError: it is not calibrated, or there is no batch.
    """
    if not isinstance(model, SpikingGraph):
        sites(model)
        raise ConversionError(f"{type(model).__name__} was not captured as a graph: only such networks are diagnosed")
    found: dict[Any, _Sums] = {
        site: _Sums() for site in sites(model).values() if isinstance(site, (Site, StreamingSite))
    }
    architecture, seen = architecture_of(model), False
    with torch.no_grad(), listening(found):
        for batch in batches:
            seen = True
            with in_mode(model, "dense"):
                architecture.feed(model, batch)
            architecture.feed(model, batch)
    if not seen:
        raise CalibrationError("there is no batch to diagnose on: give at least one")
    return [_row(site, sums) for site, sums in found.items()]


def _row(site: Site | StreamingSite, sums: _Sums) -> Diagnosis:
    left = torch.cat(sums.left) if sums.left else None
    fired = sums.spikes or 1.0
    return Diagnosis(
        site=site.name,
        kind=site.kind,
        neurons=sums.neurons,
        spikes=sums.spikes / max(1, sums.neurons),
        negative=sums.negative / fired,
        error=(sums.squared / sums.power) ** 0.5 if sums.power else 0.0,
        residual=None if left is None else float(left.mean()),
        residual_999=None if left is None else float(left.sort().values[int(0.999 * (left.numel() - 1))]),
        by_step=() if sums.by_step is None else tuple(float(each) for each in sums.by_step / fired),
    )
