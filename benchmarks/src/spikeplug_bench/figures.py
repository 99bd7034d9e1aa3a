"""Figures of a report, as SVG that is equal for equal rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from .spec import DENSE
from .store import DONE, Row
from .tables import Chapter, grouped, options_of, steps_of, what_of

Points = dict[str, list[tuple[float, float]]]
"""Name of a line to its points."""


def figures(chapter: Chapter) -> list[dict[str, str]]:
    """Title, model and SVG of every figure that the rows of a chapter give."""
    found = []
    for rows in grouped(row for row in chapter.rows if row.status == DONE):
        for title, draw in _FIGURES.get(rows[0].cell["task"]["kind"], []):
            svg = draw(rows)
            if svg is not None:
                found.append({"title": f"{rows[0].name}: {title}{_of(rows[0])}", "svg": svg})
    return found


def _of(row: Row) -> str:
    """What tells the tasks of one kind apart."""
    task = row.cell["task"]
    about = [str(task["distribution"])] if "distribution" in task else []
    about += [f"{task['limit']:,} items"] if task.get("limit") else []
    return f" ({', '.join(about)})" if about else ""


def _name(row: Row, rows: Sequence[Row]) -> str:
    """Of a line: the recipe, and options where rows of it differ in them."""
    differ = len({options_of(other) for other in rows if what_of(other) == what_of(row)}) > 1
    return f"{what_of(row)} {options_of(row)}".strip() if differ else what_of(row)


def _lines(rows: Sequence[Row], x: Callable[[Row], Any], y: Callable[[Row], Any]) -> Points:
    found: Points = {}
    for row in rows:
        at, value = x(row), y(row)
        if at not in (None, "") and value is not None and row.cell["recipe"] != DENSE:
            found.setdefault(_name(row, rows), []).append((float(at), float(value)))
    return {name: sorted(points) for name, points in found.items()}


def _metric(key: str) -> Callable[[Row], Any]:
    return lambda row: row.metrics.get(key)


def _dense(rows: Sequence[Row], key: str) -> float | None:
    of_twin = next((row.metrics.get(f"{key}_dense") for row in rows if row.metrics.get(f"{key}_dense")), None)
    return of_twin or next((row.metrics.get(key) for row in rows if row.cell["recipe"] == DENSE), None)


def _against_steps(key: str, label: str, log: bool = False) -> Callable[[list[Row]], str | None]:
    def draw(rows: list[Row]) -> str | None:
        plain = [row for row in rows if row.cell["framework"] == "torch"]
        points = _lines(plain, steps_of, _metric(key))
        if not any(len(each) > 1 for each in points.values()):
            return None
        level = {"dense": _dense(rows, key)} if not log else {}
        floor = (
            {"2^T even levels": sorted({(float(steps_of(r)), r.metrics["floor_binary"]) for r in plain if _even(r)})}
            if log
            else {}
        )
        return _plot({**points, **floor}, "T, time steps", label, level, logs=(log, log), dashed=tuple(floor))

    return draw


def _even(row: Row) -> bool:
    return row.metrics["floor_binary"] is not None


def _pareto(key: str, label: str, lower: bool) -> Callable[[list[Row]], str | None]:
    def draw(rows: list[Row]) -> str | None:
        points = _lines(
            [r for r in rows if r.cell["framework"] == "torch"], _metric("energy_ratio_memory"), _metric(key)
        )
        every = [point for each in points.values() for point in each]
        if len(every) < 2:
            return None
        front = _front(every, lower)
        return _plot(
            points, "energy / dense, with memory and neurons", label, {"dense": _dense(rows, key)},
            marks=True, front=front, logs=(True, lower and max(y for _, y in every) > 3 * min(y for _, y in every)),
        )  # fmt: skip

    return draw


def _front(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """Points that no other is better than in both."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not best or (y < best[-1][1] if lower else y > best[-1][1]):
            best.append((x, y))
    return best


def _by_layer(pick: Callable[[Row], dict[str, float]], label: str) -> Callable[[list[Row]], str | None]:
    def draw(rows: list[Row]) -> str | None:
        points: Points = {}
        names: list[str] = []
        for row in rows:
            found = pick(row)
            name = f"{_name(row, rows)}, T = {steps_of(row)}"
            if found and name not in points:
                names = max(names, list(found), key=len)
                points[name] = [(float(index), value) for index, value in enumerate(found.values())]
        return _plot(points, "layer of neurons, from the input on", label, ticks=names) if points else None

    return draw


def _spikes(row: Row) -> dict[str, float]:
    found: dict[str, float] = row.detail.get("spikes_per_neuron") or {}
    return found


def _residual(row: Row) -> dict[str, float]:
    return {each["site"]: each["residual"] for each in row.detail.get("sites", []) if each["residual"] is not None}


_FIGURES: dict[str, list[tuple[str, Callable[[list[Row]], str | None]]]] = {
    "accuracy": [
        ("accuracy by steps", _against_steps("top1", "top-1")),
        ("accuracy and energy", _pareto("top1", "top-1", lower=False)),
        ("spikes by layer", _by_layer(_spikes, "spikes of a neuron")),
        ("potential left by layer", _by_layer(_residual, "mean magnitude, in amplitudes")),
    ],
    "perplexity": [
        ("perplexity by steps", _against_steps("perplexity", "perplexity")),
        ("perplexity and energy", _pareto("perplexity", "perplexity", lower=True)),
    ],
    "reconstruction": [("error by steps", _against_steps("mse", "mean squared error", log=True))],
}

_COLOURS = (
    "#3b6fb6",
    "#c8553d",
    "#3f8f5b",
    "#8a5aa8",
    "#b58900",
    "#2aa198",
    "#d33682",
    "#6c6f7f",
    "#7a5c3e",
    "#1b4965",
)
_MARKS = "osD^v"
"""Beyond the last colour lines have the next mark."""


def _plot(
    points: Points,
    x: str,
    y: str,
    levels: dict[str, float | None] | None = None,
    *,
    logs: tuple[bool, bool] = (False, False),
    marks: bool = False,
    front: Sequence[tuple[float, float]] = (),
    dashed: Sequence[str] = (),
    ticks: Sequence[str] = (),
) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "spikeplug", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.7), layout="constrained")
        axes = figure.subplots()
        for index, (name, line) in enumerate(points.items()):
            turn, index = divmod(index, len(_COLOURS))
            mark = _MARKS[turn % len(_MARKS)]
            style = mark if marks else "--" if name in dashed else f"{mark}-"
            colour = "#777777" if name in dashed else _COLOURS[index]
            axes.plot(*zip(*line, strict=True), style, label=name, color=colour, markersize=4.5, linewidth=1.3)
        for name, level in (levels or {}).items():
            if level is not None:
                axes.axhline(level, label=name, color="#777777", linewidth=0.9, linestyle=":")
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color="#777777", linewidth=0.9, label="best of both", zorder=0)
        axes.set(xlabel=x, ylabel=y, xscale="log" if logs[0] else "linear", yscale="log" if logs[1] else "linear")
        if logs[0]:
            if marks:
                axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
            else:
                axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        if ticks and len(ticks) <= 24:
            axes.set_xticks(
                range(len(ticks)), [name.removeprefix("layer") for name in ticks], rotation=60, ha="right", fontsize=7
            )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, linewidth=0.3, alpha=0.6)
        axes.legend(fontsize=7.5, frameon=False, ncols=2)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]
