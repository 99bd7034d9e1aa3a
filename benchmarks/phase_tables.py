"""Phase codes on a small language model: perplexity by steps and variant, and where the error comes from.

    python benchmarks/phase_tables.py variants --calibrate TEXT --ppl TEXT [--steps 6,8,10]
    python benchmarks/phase_tables.py sites --calibrate TEXT --ppl TEXT --steps 6
    python benchmarks/phase_tables.py plots --calibrate TEXT --ppl TEXT

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
from spike_plugin_phase.trainer import learn_all
from spikeplug.architecture import Opened
from spikeplug.cli import language
from spikeplug.config import ConversionConfig
from spikeplug.conversion import observe
from spikeplug.site import Site, sites
from spikeplug.types import CodeParams

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
    "base2-round, mask of T/2 steps": {"mask": -1},
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
        passes = ["rotate", "prefix"] if arguments.bits is None else ["rotate", "quantize-weights", "prefix"]
        passes += ["defer-softmax"] if arguments.defer else []
        options = {"quantize-weights": {"bits": arguments.bits, "group": 0 if arguments.bits == 8 else 64}}
        config = ConversionConfig.resolve("base2-round", {"passes": passes, "pass_options": options})
        batches = self.architecture.calibration(
            self.opened, arguments.calibrate, seqlen=512, tokens=arguments.calibrate_tokens, config=config
        )
        self.model: Any = spikeplug.prepare(self.opened.model, config, batches)
        self.sites = {name: site for name, site in sites(self.model).items() if isinstance(site, Site)}
        self.stats = observe(self.model, batches)
        self.code("none", 16, {})

    def code(self, which: Any, steps: int, options: dict[str, Any]) -> float:
        """Code the sites of these kinds ("all", "none", or a tuple of kinds); return the seconds that fitting took."""
        options = dict(options)
        more, grains = options.pop("more", 0), options.get("grains", 0)
        start = time.process_time()
        for extra in {0, more}:
            size = min(16, steps + extra)
            given = {**options, "grains": size if grains == -1 else grains}
            if given.get("mask") == -1:
                given["mask"] = size // 2
            code = Phase(steps=size, **given)
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

    def perplexity_and_energy(self) -> tuple[float, str]:
        """The second: energy against the dense model's, of MAC and AC alone, and with memory and neurons."""
        found = self._measure()
        return found["perplexity"], f"{found['energy']['ratio']:.3f}, {found['energy']['ratio_with_memory']:.3f}"

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
            if bench.arguments.only and name not in bench.arguments.only:
                continue
            seconds, error = bench.code("all", steps, options), bench.error()
            rounding = error if name == "base2-round" else rounding
            ratios = [error[site] / rounding[site] for site in error if rounding.get(site)]
            found, energy = bench.perplexity_and_energy()
            row = [str(steps), name, f"{found:.2f}", f"{found / bench.dense['perplexity'] - 1:+.1%}"]
            worse = sum(ratio > 1 for ratio in ratios)
            row += [f"{sum(ratios) / len(ratios):.3f} ({worse} above)" if ratios else "", f"{seconds:.0f}", energy, ""]
            if name in ("las", "base2-round", "mgpc, 2 grains"):
                bench.code(PREFIXQUANT, steps, options)
                row[-1] = f"{bench.perplexity():.2f}"
            yield row


def by_site(bench: Bench) -> Iterator[list[str]]:
    kinds = sorted({site.kind for site in bench.sites.values()})
    for steps in bench.arguments.steps:
        for name in bench.arguments.only or ("las", "base2-round"):
            for kind in kinds:
                bench.code((kind,), steps, VARIANTS[name])
                alone = bench.perplexity()
                bench.code(tuple(each for each in kinds if each != kind), steps, VARIANTS[name])
                yield [str(steps), name, kind, f"{alone:.2f}", f"{bench.perplexity():.2f}"]


def plots(bench: Bench, folder: Path) -> None:
    """Figures 3 and 4 of the paper, for the input of one `down_proj` and one site of probabilities, T = 6."""
    from matplotlib.figure import Figure

    names = ["model.layers.15.mlp.down_proj", "model.layers.15.self_attn.probabilities"]
    code = Phase(steps=6, grains=2)
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    params, learned = learn_all(code, [bench.stats[name] for name in names])
    for row, (name, p, course) in enumerate(zip(names, params, learned, strict=True)):
        values = bench.stats[name].values.double().abs() / p.scale
        left, right = axes[row]
        left.hist(values.clamp(max=0.5).numpy(), bins=200, log=True, color="#8a8f98")
        levels, rounding = (each._tables(q)[0].unique() for each, q in ((code, p), (Phase(steps=6), _plain(p))))
        for where, found, colour in ((0.12, levels, "#2f6fde"), (0.04, rounding, "#d1603d")):
            shown = found[found <= 0.5]
            left.plot(shown, [where] * len(shown), "|", color=colour, transform=left.get_xaxis_transform())
        left.set_title(f"{name.removeprefix('model.')}: levels learned (blue), rounding's (red)", fontsize=8)
        right.semilogy(course.losses, color="#2f6fde", linewidth=1)
        right.set_ylabel("squared error, units of 2^-T", fontsize=8)
        bases = right.twinx()
        for base in course.course.T:
            bases.plot([10 * turn for turn in range(len(base))], base, "--", color="#d1603d", linewidth=1)
        bases.set_ylabel("bases (dashed)", fontsize=8)
        right.set_title("steps of Algorithm 1", fontsize=8)
    figure.savefig(folder / "phase.png", dpi=110)


def _plain(p: CodeParams) -> CodeParams:
    code = Phase(steps=6)
    return code.params_of(p.scale, *code.start())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("variants", "sites", "plots"))
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--ppl", type=Path, required=True)
    parser.add_argument("--steps", type=lambda text: [int(each) for each in text.split(",")], default=[6, 8, 10])
    parser.add_argument("--only", action="append", help="name of a variant; may be given several times")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantize the weights first (4 bits: groups of 64)")
    parser.add_argument("--defer", action="store_true", help="also apply defer-softmax")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--calibrate-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(", ".join(f"{key} {value}" for key, value in bench.dense["protocol"].items()))
    dense, tokens = bench.dense["perplexity"], bench.model.config.spikeplug_prefix
    print(f"prefix tokens {tokens}; dense {dense:.3f}, with both passes {bench.perplexity():.3f}\n")
    if arguments.table == "plots":
        plots(bench, Path("docs/results"))
    elif arguments.table == "variants":
        head = ["T", "variant", "perplexity", "change", "error / rounding's", "CPU s to fit", "energy / dense"]
        show([*head, "PrefixQuant's sites"], variants(bench))
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
