"""Phase codes on a small language model: perplexity by steps and variant, and where the error comes from.

    python benchmarks/phase_tables.py variants --calibrate TEXT --ppl TEXT [--steps 6,8,10]
    python benchmarks/phase_tables.py errors --calibrate TEXT --ppl TEXT [--steps 6,8,10]
    python benchmarks/phase_tables.py sites --calibrate TEXT --ppl TEXT --steps 6
    python benchmarks/phase_tables.py plots --calibrate TEXT --ppl TEXT

After the passes `rotate` and `prefix`; one calibration serves all rows. `variants` has every site coded and, in its
last column, the sites of PrefixQuant alone. `sites` codes each kind of site alone, and leaves each alone dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from site_bench import PREFIXQUANT, Bench, parser, show

from spike_plugin_phase.encoder import Phase
from spike_plugin_phase.trainer import learn_all
from spikeplug.coding.site import Site
from spikeplug.coding.types import CodeParams

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


def phase(variant: str, steps: int) -> Callable[[Site], Phase]:
    """The code of every site under a variant."""
    options = dict(VARIANTS[variant])
    more = options.pop("more", 0)

    def code(site: Site) -> Phase:
        size = min(16, steps + (more if site.kind == "probabilities" else 0))
        given = {
            key: {"grains": size, "mask": size // 2}[key] if value == -1 else value for key, value in options.items()
        }
        return Phase(steps=size, **given)

    return code


def variants(bench: Bench) -> Iterator[list[str]]:
    """Every site coded, and PrefixQuant's alone."""
    for steps in bench.arguments.steps:
        rounding: dict[str, float] = {}
        for name in bench.arguments.only or VARIANTS:
            seconds, error = bench.code(phase(name, steps)), bench.error()
            rounding = error if name == "base2-round" else rounding
            ratios = [error[site] / rounding[site] for site in error if rounding.get(site)]
            found, energy = bench.perplexity_and_energy()
            row = [str(steps), name, bench.change(found)]
            worse = sum(ratio > 1 for ratio in ratios)
            row += [f"{sum(ratios) / len(ratios):.3f} ({worse} above)" if ratios else "", f"{seconds:.0f}", energy, ""]
            if name in ("las", "base2-round", "mgpc, 2 grains"):
                bench.code(phase(name, steps), PREFIXQUANT)
                row[-1] = f"{bench.perplexity():.2f}"
            yield row


def errors(bench: Bench) -> Iterator[list[str]]:
    """Squared error over rounding's at every site: mean, smallest and largest, without a look at the model's output."""
    for steps in bench.arguments.steps:
        bench.code(phase("base2-round", steps))
        rounding = bench.error()
        for name in bench.arguments.only or ("las", "mgpc, 2 grains", "mgpc, 3 grains"):
            bench.code(phase(name, steps))
            ratios = [error / rounding[site] for site, error in bench.error().items()]
            mean = sum(ratios) / len(ratios)
            yield [str(steps), name, f"{mean:.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}", str(len(ratios))]


def by_site(bench: Bench) -> Iterator[list[str]]:
    kinds = sorted({site.kind for site in bench.sites.values()})
    for steps in bench.arguments.steps:
        for name in bench.arguments.only or ("las", "base2-round"):
            for kind in kinds:
                bench.code(phase(name, steps), (kind,))
                alone = bench.perplexity()
                bench.code(phase(name, steps), [each for each in kinds if each != kind])
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
    bench = Bench(
        parser(__doc__.splitlines()[0], ("variants", "errors", "sites", "plots"), [6, 8, 10]).parse_args(),
        "base2-round",
    )
    print(bench.header())
    if bench.arguments.table == "plots":
        plots(bench, Path("docs/results"))
    elif bench.arguments.table == "variants":
        head = ["T", "variant", "perplexity", "error / rounding's", "CPU s to fit", "energy / dense"]
        show([*head, "PrefixQuant's sites"], variants(bench))
    elif bench.arguments.table == "errors":
        show(["T", "variant", "mean", "smallest", "largest", "sites"], errors(bench))
    else:
        show(["T", "variant", "kind of site", "coded alone", "left dense alone"], by_site(bench))


if __name__ == "__main__":
    with torch.no_grad():
        main()
