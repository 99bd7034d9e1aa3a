"""Error of ASNC against its budget, beside simpler tables of the same size: a Markdown table and a plot.

The inputs are N(0, 1) and those of layer 15 of SmolLM2 on a text (the first half is fitted, the second measured):
what SiLU sees there, and what exp sees in softmax, scores less the largest of their row.

    python benchmarks/nonlinear_error.py TEXT --plot docs/results/asnc.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spike_plugin_bse.asnc import fit
from spike_plugin_bse.segments import Fit
from spikeplug.cli import language

LAYER = 15
STEPS, SEGMENTS = (4, 8, 16), (16, 32, 64)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "exp": torch.exp}
Approximation = Callable[[Tensor], Tensor]


def asnc(function: Approximation, x: Tensor, steps: int, segments: int) -> Approximation:
    return fit(function, x, Fit(steps=steps, segments=segments))


def uniform_bins(function: Approximation, x: Tensor, size: int) -> Approximation:
    """Constants on even bins over what was seen."""
    edges = torch.linspace(float(x.min()), float(x.max()), size + 1, dtype=torch.float64)
    return _constants(edges[1:-1], function((edges[1:] + edges[:-1]) / 2))


def lloyd_max(function: Approximation, x: Tensor, size: int) -> Approximation:
    """The constants of least error on the sample: Lloyd's iteration from the widths that are best for many bins."""
    x = x.sort().values
    y = function(x)
    grid = torch.linspace(float(x[0]), float(x[-1]), 4097, dtype=torch.float64)
    mass = torch.histogram(x, grid).hist
    # Bennett's integral for f(X): widths go as (density * slope²)^(-1/3).
    wanted = (mass * function(grid).diff().square()).pow(1 / 3) + 1e-9
    total = torch.cat([torch.zeros(1, dtype=torch.float64), wanted.cumsum(0)])
    share = torch.linspace(0, float(total[-1]), size + 1, dtype=torch.float64)[1:-1]
    edges = grid[torch.searchsorted(total, share).clamp(1, 4096)]
    best = (float("inf"), edges, torch.zeros(size, dtype=torch.float64))
    for _ in range(30):
        bins = torch.bucketize(x, edges, right=True)
        count = torch.zeros(size, dtype=torch.float64).index_add_(0, bins, torch.ones_like(y))
        ends = torch.cat([x[:1], edges, x[-1:]])
        middle = (ends[1:] + ends[:-1]) / 2
        sums = (torch.zeros(size, dtype=torch.float64).index_add_(0, bins, each) for each in (x, y))
        mx, my = (
            torch.where(count > 0, each / count.clamp(min=1), start)
            for each, start in zip(sums, (middle, function(middle)), strict=True)
        )
        error = float((my[bins] - y).square().mean())
        if error < best[0]:
            best = (error, edges, my)
        # The border of two constants is where the function is half-way between them.
        low, high, target = mx[:-1].clone(), mx[1:].clone(), (my[:-1] + my[1:]) / 2
        rising = my[1:] >= my[:-1]
        for _ in range(30):
            at = (low + high) / 2
            below = (function(at) < target) == rising
            low, high = torch.where(below, at, low), torch.where(below, high, at)
        edges = ((low + high) / 2).sort().values
    return _constants(best[1], best[2])


def piecewise_linear(function: Approximation, x: Tensor, size: int) -> Approximation:
    """A line a segment, free at its ends: three numbers each. Segments are ASNC's, whose codes are then ideal."""
    table = fit(function, x, Fit(steps=8, segments=max(1, size // 3)))
    edges = torch.cat([table.start, table.ends[1:, 0]])
    x = x.sort().values
    bins = torch.bucketize(x, edges[1:-1], right=True)
    lines = []
    for segment in range(edges.numel() - 1):
        inside = x[bins == segment]
        if inside.numel() < 8:
            inside = torch.linspace(float(edges[segment]), float(edges[segment + 1]), 64, dtype=torch.float64)
        features = torch.stack([torch.ones_like(inside), inside], dim=1)
        lines.append(torch.linalg.lstsq(features, function(inside)[:, None]).solution.squeeze(1))
    line = torch.stack(lines)

    def value(x: Tensor) -> Tensor:
        own = line[torch.bucketize(x, edges[1:-1], right=True)]
        return own[:, 0] + own[:, 1] * x

    return value


def _constants(edges: Tensor, values: Tensor) -> Approximation:
    return lambda x: values[torch.bucketize(x, edges, right=True)]


def inputs_of_smollm2(text: Path, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs of SiLU and of exp in one layer: fitted part and measured part of each."""
    architecture = language()
    opened = architecture.open("smollm2", dtype="auto", device="cpu")
    model: Any = opened.model
    model.set_attn_implementation("spikeplug")
    found: dict[str, list[Tensor]] = {"silu": [], "exp": []}
    block = model.model.layers[LAYER]
    block.mlp.act_fn.register_forward_pre_hook(lambda _, given: found["silu"].append(given[0].double().flatten()))

    class Softmax(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            less = (scores - scores.amax(-1, keepdim=True)).double().flatten()
            found["exp"].append(less[less > -1e4])  # what the mask lets through
            return scores.softmax(-1)

    for layer in model.model.layers:
        layer.self_attn.softmax = torch.nn.Softmax(dim=-1)
    block.self_attn.softmax = Softmax()
    for window in architecture.windows(opened, text, seqlen=512, tokens=tokens):
        with torch.no_grad():
            model(window, use_cache=False)
    halves = {}
    for name, parts in found.items():
        first, second = torch.cat(parts[: len(parts) // 2]), torch.cat(parts[len(parts) // 2 :])
        generator = torch.Generator().manual_seed(0)
        halves[name] = (first[torch.randperm(first.numel(), generator=generator)[:65536]], second)
    halves["gelu"] = halves["silu"]
    return halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    gaussian = tuple(torch.randn(n, dtype=torch.float64, generator=generator) for n in (65536, 200_000))
    real = inputs_of_smollm2(arguments.text, arguments.tokens)
    rows = []
    for name, function in FUNCTIONS.items():
        for where, (seen, fresh) in {"N(0, 1)": gaussian, "SmolLM2": real[name]}.items():
            for steps in STEPS:
                for segments in SEGMENTS:
                    size = segments * (steps + 1)
                    approximations = {
                        "ASNC": asnc(function, seen, steps, segments),
                        "uniform bins": uniform_bins(function, seen, size),
                        "Lloyd-Max": lloyd_max(function, seen, size),
                        "piecewise linear": piecewise_linear(function, seen, size),
                    }
                    errors = {
                        kind: float((each(fresh) - function(fresh)).square().mean())
                        for kind, each in approximations.items()
                    }
                    rows.append((name, where, steps, segments, size, errors))
    kinds = list(rows[0][-1])
    print(f"| function | inputs | steps | segments | numbers | {' | '.join(kinds)} |")
    print("| " + " | ".join(["---"] * (5 + len(kinds))) + " |")
    for *head, errors in rows:
        print("| " + " | ".join([*map(str, head), *(f"{errors[kind]:.2e}" for kind in kinds)]) + " |")
    worse = [row[:4] for row in rows if row[-1]["ASNC"] > row[-1]["uniform bins"]]
    print(f"\nbudgets at which uniform bins are better than ASNC: {worse or 'none'}")
    if arguments.plot:
        plot(rows, kinds, arguments.plot)


def plot(rows: list[Any], kinds: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for column, name in enumerate(FUNCTIONS):
        for row, where in enumerate(("N(0, 1)", "SmolLM2")):
            ax = axes[row, column]
            for kind in kinds:
                points = sorted((size, errors[kind]) for n, w, _, _, size, errors in rows if (n, w) == (name, where))
                ax.loglog(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=kind)
            ax.set_title(f"{name}, {where}", fontsize=10)
            ax.set_xlabel("numbers in the table")
            ax.set_ylabel("mean squared error")
            ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
