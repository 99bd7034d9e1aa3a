"""Where the error of a first-spike network comes from: Theorem 3 of QC-A2S, site by site."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from spikeplug.coding.site import Site, sites
from spikeplug.coding.types import CodeParams
from spikeplug.errors import ConversionError, OptionError

from .encoder import MAX_STEPS, TTFS


@dataclasses.dataclass(frozen=True)
class SiteBound:
    """Theorem 3 at one site: `|decode(encode(x)) - x| <= clipping + quantization` for every x in what was seen.

    Attributes:
        low, high: smallest and largest number that calibration saw.
        a, b: ends of the code's range (Eq. 3).
        clipping: `max(ρ - (b - a) / 2, 0)`, ρ the largest distance of what was seen from the middle of the range.
        quantization: λ/2 or λ, by the rounding.
        needed: T with which a range of all that was seen has an error of at most the wanted one; a power of two; None
            where that is more than the largest T.
    """

    site: str
    steps: int
    low: float
    high: float
    a: float
    b: float
    clipping: float
    quantization: float
    needed: int | None

    @property
    def total(self) -> float:
        """The bound."""
        return self.clipping + self.quantization


def bound(name: str, encoder: TTFS, p: CodeParams, wanted: float = 0.01) -> SiteBound:
    """The bound of one site.

    Args:
        wanted: largest error, as a share of the largest magnitude that was seen.

    Raises:
        OptionError: `wanted` is not above 0.
    """
    if not 0 < wanted < math.inf:
        raise OptionError(f"error={wanted}: a number above 0 is needed")
    low, high = float(p.extra["low"]), float(p.extra["high"])
    a, b = (float(end) for end in encoder.span(p))
    farthest = max(abs(low - (a + b) / 2), abs(high - (a + b) / 2))
    levels = (high - low) / (wanted * max(abs(low), abs(high))) / (2 if encoder.rounding == "nearest" else 1)
    needed = 2 ** max(1, math.ceil(math.log2(levels + 1)))
    return SiteBound(
        site=name,
        steps=encoder.steps,
        low=low,
        high=high,
        a=a,
        b=b,
        clipping=max(farthest - (b - a) / 2, 0.0),
        quantization=float(encoder.error_bound(p)),
        needed=needed if needed <= MAX_STEPS else None,
    )


def explain(model: nn.Module, wanted: float = 0.01) -> list[SiteBound]:
    """The bound of every first-spike site of a calibrated model, in the order of the network. Raises as `bound`.

    Raises:
        ConversionError: it has none.
        CalibrationError: a site is not calibrated.
    """
    coded = {name: site for name, site in sites(model).items() if isinstance(site, Site)}
    found = []
    for name, site in coded.items():
        if isinstance(site.encoder, TTFS):
            found.append(bound(name, site.encoder, site.params(torch.zeros(())), wanted))
    if not found:
        codes = ", ".join(sorted({site.encoder.name for site in coded.values()}))
        raise ConversionError(f"no site is coded by first spikes ({codes} is): convert with the recipe qc-a2s or ttfs")
    return found
