"""Where a converted network loses what: site by site, beside the dense network on the same batches."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spikeplug.conversion.verbs import architecture_of
from spikeplug.errors import CalibrationError, ConversionError, OptionError
from spikeplug.graph.network import SpikingGraph, watching
from spikeplug.graph.streaming import FlowSite
from spikeplug.site import Site, sites


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


@dataclasses.dataclass
class _Sums:
    dense: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    neurons: int = 0
    spikes: float = 0.0
    negative: float = 0.0
    squared: float = 0.0
    power: float = 0.0
    left: list[Tensor] = dataclasses.field(default_factory=list)
    by_step: Tensor | None = None


def diagnose(model: nn.Module, batches: Iterable[Any]) -> list[Diagnosis]:
    """Run batches through a converted network and its dense counterpart, and compare every site.

    Errors of earlier layers are in those of later ones. Makes every spike; meant for some batches, not for a test set.

    Raises:
        ConversionError: the model is not converted, or was not traced.
        CalibrationError: it is not calibrated, or there is no batch.
    """
    if not isinstance(model, SpikingGraph):
        sites(model)
        raise ConversionError(f"{type(model).__name__} was not captured as a graph: only such networks are diagnosed")
    found = {site: _Sums() for site in sites(model).values() if isinstance(site, (Site, FlowSite))}
    architecture, seen = architecture_of(model), False
    with torch.no_grad():
        for batch in batches:
            seen = True
            with _captured(found), model.observing():
                architecture.feed(model, batch)
            if model.flow is None:
                with _coded(found):
                    architecture.feed(model, batch)
            else:
                with watching(model, lambda site, currents, spikes: _add_train(site, found[site], currents, spikes)):
                    architecture.feed(model, batch)
    if not seen:
        raise CalibrationError("there is no batch to diagnose on: give at least one")
    return [_row(site, sums) for site, sums in found.items()]


@contextlib.contextmanager
def _captured(found: dict[Any, _Sums]) -> Iterator[None]:
    """Keep what every site has in the dense network."""

    def keep(site: Any, args: Any, value: Tensor) -> None:
        found[site].dense = value

    handles = [site.register_forward_hook(keep) for site in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _coded(found: dict[Any, _Sums]) -> Iterator[None]:
    """Compare every site's code of what comes in with the dense network's value."""
    done: set[Any] = set()

    def look(site: Any, args: tuple[Any, ...], value: Tensor) -> None:
        if site in done:
            return
        done.add(site)
        x = args[0]
        p = site.params(x)
        spikes = site.encoder.encode(x, p)
        _add(found[site], site.encoder.decode(spikes, p), spikes)

    if any(site.execution != "fused" for site in found):
        raise OptionError("diagnose runs codes with windows of their own fused: set_execution(model, 'fused') first")
    handles = [site.register_forward_hook(look) for site in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_train(site: FlowSite, sums: _Sums, currents: Tensor, spikes: Tensor) -> None:
    d = torch.tensor(site.flow.weights, dtype=spikes.dtype, device=spikes.device)
    _add(sums, torch.tensordot(d, spikes, dims=1) * site.amplitude, spikes)
    if not site.encodes:
        left = site.residual(currents).abs().flatten()
        sums.left.append(left[:: max(1, left.numel() // 65536)].float())


def _add(sums: _Sums, value: Tensor, spikes: Tensor) -> None:
    fired = spikes.abs().flatten(1).sum(1).double().cpu()
    sums.by_step = fired if sums.by_step is None else sums.by_step + fired
    sums.neurons += spikes[0].numel()
    sums.spikes += float(fired.sum())
    sums.negative += float((spikes < 0).sum())
    sums.squared += float((value - sums.dense).double().square().sum())
    sums.power += float(sums.dense.double().square().sum())


def _row(site: Site | FlowSite, sums: _Sums) -> Diagnosis:
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
