"""Phase codes on a small language model: perplexity by steps and variant, and where the error comes from.

    python benchmarks/phase_tables.py variants --calibrate TEXT --ppl TEXT [--steps 6,8,10]
    python benchmarks/phase_tables.py sites --calibrate TEXT --ppl TEXT --steps 6

After the passes `rotate` and `prefix`; one calibration serves all rows. `variants` has every site coded and, in its
last column, the sites of PrefixQuant alone. `sites` codes each kind of site alone, and leaves each alone dense.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        more, grains = options.pop("more", 0), options.get("grains", 0)
        start = time.process_time()
        for extra in {0, more}:
            size = min(16, steps + extra)
            code = Phase(steps=size, **{**options, "grains": size if grains == -1 else grains})
            mine = [site for site in self.sites.items() if not more or (site[1].kind == "probabilities") == (extra > 0)]
            for (_, site), p in zip(mine, code.fit_all([self.stats[name] for name, _ in mine]), strict=True):
                site.encoder = code
                site.set_params(p.tensors())
        for site in self.sites.values():
            coded = which == "all" or (which != "none" and site.kind in which)
            # A site that stays dense gives back what came in.
            site.forward = type(site).forward.__get__(site) if coded else _pass_on  # type: ignore[method-assign]
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


def _pass_on(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def variants(bench: Bench) -> Iterator[list[str]]:
    """Every site coded, and PrefixQuant's alone."""
    for steps in bench.arguments.steps:
        rounding: dict[str, float] = {}
        for name, options in VARIANTS.items():
            seconds, error = bench.code("all", steps, options), bench.error()
            rounding = error if name == "base2-round" else rounding
            ratios = [error[site] / rounding[site] for site in error if rounding.get(site)]
            found = bench.perplexity()
            row = [str(steps), name, f"{found:.2f}", f"{found / bench.dense['perplexity'] - 1:+.1%}"]
            row += [f"{sum(ratios) / len(ratios):.3f}" if ratios else "", f"{seconds:.0f}", ""]
            if name in ("las", "base2-round", "mgpc, 2 grains"):
                bench.code(PREFIXQUANT, steps, options)
                row[-1] = f"{bench.perplexity():.2f}"
            yield row


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
    dense, tokens = bench.dense["perplexity"], bench.model.config.spikeplug_prefix
    print(f"prefix tokens {tokens}; dense {dense:.3f}, with both passes {bench.perplexity():.3f}\n")
    if arguments.table == "variants":
        head = ["T", "variant", "perplexity", "change", "error / rounding's", "CPU s to fit", "PrefixQuant's sites"]
        show(head, variants(bench))
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
