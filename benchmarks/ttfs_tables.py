"""Time to first spike on a small language model: perplexity by steps, rounding and clipping; sources of the error.

    python benchmarks/ttfs_tables.py variants --calibrate TEXT --ppl TEXT --defer --bits 8 [--figure ttfs.png]
    python benchmarks/ttfs_tables.py sites --calibrate TEXT --ppl TEXT --steps 64

After the passes `rotate` and `prefix`, and those that the options name; one calibration serves all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from site_bench import PREFIXQUANT, Bench, parser, show

from spike_plugin_ttfs.encoder import TTFS, ContinuousTTFS
from spikeplug.coding.site import Site

VARIANTS: dict[str, dict[str, Any]] = {
    "continuous time in steps": {"continuous": True},
    "floor, min-max": {"rounding": "floor"},
    "floor, searched": {"rounding": "floor", "clip": "mse"},
    "nearest, min-max": {},
    "nearest, searched": {"clip": "mse"},
    "nearest, searched, probabilities with 4 times the steps": {"clip": "mse", "more": 4},
}


def ttfs(variant: str, steps: int) -> Callable[[Site], TTFS]:
    """The code of every site under a variant."""
    options = dict(VARIANTS[variant])
    cls, more = ContinuousTTFS if options.pop("continuous", False) else TTFS, options.pop("more", 1)

    def code(site: Site) -> TTFS:
        return cls(steps=min(cls.most, steps * (more if site.kind == "probabilities" else 1)), **options)

    return code


def variants(bench: Bench, found: dict[str, list[float]]) -> Iterator[list[str]]:
    """Every site coded, and in one variant PrefixQuant's alone. Perplexities are also put into `found`, by variant."""
    for steps in bench.arguments.steps:
        for name in bench.arguments.only or VARIANTS:
            bench.code(ttfs(name, steps))
            perplexity, energy = bench.perplexity_and_energy()
            found.setdefault(name, []).append(perplexity)
            row = [str(steps), name, bench.change(perplexity), energy, ""]
            if name == "nearest, searched":
                bench.code(ttfs(name, steps), PREFIXQUANT)
                row[-1] = bench.change(bench.perplexity())
            yield row


def by_site(bench: Bench) -> Iterator[list[str]]:
    """Each kind of site coded alone, and each left dense alone."""
    kinds = sorted({site.kind for site in bench.sites.values()})
    for steps in bench.arguments.steps:
        for name in bench.arguments.only or ("nearest, searched",):
            for kind in kinds:
                bench.code(ttfs(name, steps), (kind,))
                alone = bench.perplexity()
                bench.code(ttfs(name, steps), [each for each in kinds if each != kind])
                yield [str(steps), name, kind, f"{alone:.2f}", f"{bench.perplexity():.2f}"]


def plot(bench: Bench, found: dict[str, list[float]], path: Path) -> None:
    """Perplexity against T for every variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, perplexities in found.items():
        shown = sorted(zip(bench.arguments.steps, (min(each, 1e4) for each in perplexities), strict=True))
        axes.plot(*zip(*shown, strict=True), "o-", label=name, markersize=4)
    axes.axhline(bench.dense["perplexity"], color="#8a8f98", linestyle="--", label="dense")
    axes.set(xscale="log", yscale="log", xlabel="steps T", ylabel="perplexity (10,000 and more at the top)")
    axes.set_xticks(bench.arguments.steps, [str(steps) for steps in bench.arguments.steps])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__.splitlines()[0], ("variants", "sites"), [16, 64, 256, 1024])
    options.add_argument("--figure", type=Path, help="draw perplexity against T into this file")
    bench = Bench(options.parse_args(), "ttfs")
    print(bench.header())
    if bench.arguments.table == "sites":
        show(["T", "variant", "kind of site", "coded alone", "left dense alone"], by_site(bench))
        return
    found: dict[str, list[float]] = {}
    show(["T", "variant", "perplexity", "energy / dense", "PrefixQuant's sites"], variants(bench, found))
    if bench.arguments.figure:
        plot(bench, found, bench.arguments.figure)


if __name__ == "__main__":
    with torch.no_grad():
        main()
