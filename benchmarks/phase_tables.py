"""Phase codes on a small language model: perplexity by steps and variant, and where the error comes from.

    python benchmarks/phase_tables.py variants --calibrate TEXT --ppl TEXT [--steps 6,8,10]
    python benchmarks/phase_tables.py sites --calibrate TEXT --ppl TEXT --steps 6

After the passes `rotate` and `prefix`; one calibration serves all rows. `variants` has every site coded, and, in its
last column, the sites of PrefixQuant alone: inputs of linear layers, k and v. `sites` codes each kind of site alone, and leaves each
alone dense.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import spikeplug
from spike_plugin_phase.encoder import Phase
from spikeplug.architecture import Opened
from spikeplug.cli import language
from spikeplug.config import ConversionConfig
from spikeplug.conversion import observe
from spikeplug.site import Site, sites

VARIANTS: dict[str, dict[str, Any]] = {
    "las": {"rounding": "floor"},
    "base2-round": {},
    "base2-round, clipping searched": {"clip": "mse"},
    "phase (1 base learned)": {"grains": 1},
    "mgpc, 2 grains": {"grains": 2},
    "mgpc, 3 grains": {"grains": 3},
    "mgpc, T grains": {"grains": -1},
    "mgpc, 2 grains, searched": {"grains": 2, "allocation": "search"},
    "mgpc, 2 grains, probabilities with 4 steps more": {"grains": 2, "more": 4},
    "two-spike": {"rounding": "floor", "spikes": 2},
    "single-spike": {"rounding": "floor", "spikes": 1},
}
PREFIXQUANT = ("input", "key", "value", "embedding")
"""Kinds of site that PrefixQuant quantizes; the input of the output layer is not among them."""


class Bench:
    """A model whose sites are coded anew for every row."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.architecture = arguments, language()
        self.opened = self.architecture.open(arguments.model, dtype="auto", device="cpu")
        self.dense = self._measure()
        tokens = arguments.calibrate_tokens
        batches = self.architecture.calibration(self.opened, arguments.calibrate, seqlen=512, tokens=tokens)
        config = ConversionConfig.resolve("base2-round", {"passes": ["rotate", "prefix"]})
        self.model: Any = spikeplug.prepare(self.opened.model, config, batches)
        self.sites = {name: site for name, site in sites(self.model).items() if isinstance(site, Site)}
        self.stats = observe(self.model, batches)
        self.code("none", 16, {})
        self.errors: dict[tuple[int, str], dict[str, float]] = {}

    def code(self, which: Any, steps: int, options: dict[str, Any]) -> float:
        """Code the sites of these kinds ("all", "none", or a tuple of kinds); return the seconds that fitting took."""
        options = dict(options)
        more = options.pop("more", 0)
        start = time.process_time()
        for extra in {0, more}:
            size = min(16, steps + extra)
            code = Phase(
                steps=size, **{**options, "grains": size if options.get("grains") == -1 else options.get("grains", 0)}
            )
            names = [
                name for name, site in self.sites.items() if (site.kind == "probabilities") == (extra > 0) or not more
            ]
            for name, p in zip(names, code.fit_all([self.stats[name] for name in names]), strict=True):
                site = self.sites[name]
                site.encoder = code
                site.set_params(p.tensors())
        for site in self.sites.values():
            coded = which == "all" or (which != "none" and site.kind in which)
            # A site that stays dense: its hook gives back what came in.
            site.forward = type(site).forward.__get__(site) if coded else (lambda x, *_, **__: x)  # type: ignore[method-assign]
        return time.process_time() - start

    def error(self) -> dict[str, float]:
        """Mean squared error of every site on its sample."""
        found = {}
        for name, site in self.sites.items():
            x = self.stats[name].values.double()
            p = site.params(x)
            found[name] = float((site.encoder.fused(x, p) - x).square().mean())
        return found

    def perplexity(self) -> float:
        found: float = self._measure()["perplexity"]
        return found

    def _measure(self) -> dict[str, Any]:
        opened = Opened(self.opened.model, self.opened.tokenizer, self.opened.name)
        return self.architecture.perplexity(opened, self.arguments.ppl, seqlen=512, tokens=self.arguments.tokens)


def variants(bench: Bench) -> Iterator[list[str]]:
    for steps in bench.arguments.steps:
        rounding: dict[str, float] = {}
        for name, options in VARIANTS.items():
            seconds = bench.code("all", steps, options)
            error = bench.error()
            rounding = error if name == "base2-round" else rounding
            ratio = (
                sum(error[site] / rounding[site] for site in error if rounding.get(site)) / len(error)
                if rounding
                else 0
            )
            whole = bench.perplexity()
            bench_only = ""
            if name in ("las", "base2-round", "mgpc, 2 grains"):
                bench.code(PREFIXQUANT, steps, options)
                bench_only = f"{bench.perplexity():.2f}"
            change = f"{whole / bench.dense['perplexity'] - 1:+.1%}"
            yield [
                str(steps),
                name,
                f"{whole:.2f}",
                change,
                f"{ratio:.3f}" if ratio else "",
                f"{seconds:.0f}",
                bench_only,
            ]


def by_site(bench: Bench) -> Iterator[list[str]]:
    kinds = sorted({site.kind for site in bench.sites.values()})
    for steps in bench.arguments.steps:
        for name in ("las", "base2-round"):
            for kind in kinds:
                bench.code((kind,), steps, VARIANTS[name])
                alone = bench.perplexity()
                bench.code(tuple(each for each in kinds if each != kind), steps, VARIANTS[name])
                yield [str(steps), name, kind, f"{alone:.2f}", f"{bench.perplexity():.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("variants", "sites"))
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--ppl", type=Path, required=True)
    parser.add_argument("--steps", type=lambda text: [int(each) for each in text.split(",")], default=[6, 8, 10])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--calibrate-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(", ".join(f"{key} {value}" for key, value in bench.dense["protocol"].items()))
    base = bench.perplexity()
    print(
        f"prefix tokens {bench.model.config.spikeplug_prefix}; dense {bench.dense['perplexity']:.3f}, with both passes {base:.3f}\n"
    )
    if arguments.table == "variants":
        show(
            ["T", "variant", "perplexity", "change", "error over rounding's", "CPU s to fit", "PrefixQuant's sites"],
            variants(bench),
        )
    else:
        show(["T", "variant", "kind of site", "coded alone", "left dense alone"], by_site(bench))


def show(head: list[str], rows: Iterator[list[str]]) -> None:
    """Print a Markdown table as its rows come."""
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
