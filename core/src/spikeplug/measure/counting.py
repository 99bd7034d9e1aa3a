"""Spikes of forward passes, counted by site."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from spikeplug.coding.listeners import SpikeCount, listening
from spikeplug.coding.site import sites


class SpikeCounts:
    """Spikes fired while `count_spikes` was active, by site."""

    def __init__(self, by_site: dict[str, SpikeCount]) -> None:
        self.by_site = by_site

    @property
    def total(self) -> int:
        """Spikes of all sites."""
        return sum(count.spikes for count in self.by_site.values())


@contextlib.contextmanager
def count_spikes(model: nn.Module) -> Iterator[SpikeCounts]:
    """Count the spikes of every forward pass inside the context, in either execution.

    A spike of -1 counts as one. A site that several layers read counts once. Contexts may be nested.
    """
    found = sites(model)
    counts = SpikeCounts({name: SpikeCount() for name in found})
    with listening({site: counts.by_site[name] for name, site in found.items()}):
        yield counts
