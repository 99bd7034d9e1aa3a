"""The tables of a report: of every suite in a store its last run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from spikeplug.errors import OptionError, listed, nearest

from .spec import DENSE
from .store import DONE, Row, Run, Store
from .suite import Published, Suite, parse_suite


@dataclasses.dataclass(frozen=True)
class Chapter:
    """A suite and the rows of its last run, in its order; `missing` cells have not been run."""

    suite: Suite
    run: Run
    rows: list[Row]
    missing: int


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one task and model. Values are texts; `ids` are the cells that they are of.

    Attributes:
        protocol: what holds for all of its rows.
        parted: what does not: key of a protocol -> value -> the rows that it holds for, in words.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    ids: list[str]
    protocol: dict[str, Any]
    parted: dict[str, dict[str, str]]


def chapters(store: Store, only: Sequence[str] | None = None) -> list[Chapter]:
    """Every suite of a store with its last run.

    Raises:
        OptionError: a suite that was asked for is not in it, or there is none at all.
    """
    last = {run.suite: run for run in store.runs()}
    for name in only or []:
        if name not in last:
            raise OptionError(f"no suite '{name}' in {store.path}{nearest(name, last)} It holds: {listed(last)}")
    if not last:
        raise OptionError(f"{store.path} holds no run yet: `spikeplug bench run SUITE --store {store.path}`")
    found = []
    for name, run in last.items():
        if not only or name in only:
            rows = store.named(run.cells)
            found.append(Chapter(parse_suite(run.definition, name), run, rows, len(run.cells) - len(rows)))
    return found


# Tables


def tables(suite: Suite, rows: Sequence[Row]) -> list[Table]:
    """The tables of a suite's rows: one for each task and model."""
    return [_table(suite, group) for group in grouped(rows)]


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one model and one task, whose figures can be compared."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        task = {key: value for key, value in row.cell["task"].items() if key != "encoder"}
        groups.setdefault(json.dumps([row.name, task], sort_keys=True), []).append(row)
    return list(groups.values())


def text_tables(suite: Suite, rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Titles, heads and rows for a terminal."""
    for table in tables(suite, rows):
        yield table.title, table.head, table.rows


Column = tuple[str, Callable[[Row], str]]
PLAIN = ("framework", "dtype", "device", "ranks", "seed")
"""Axes that have a column where they differ."""


def _axis(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.cell.get(name, ""))


def twin(row: Row, rows: Iterable[Row]) -> Row | None:
    """The finished dense row that differs from a row in its conversion alone."""
    same = ("model", "dtype", "device", "seed", "ranks")
    for other in rows:
        alike = all(other.cell.get(key) == row.cell.get(key) for key in same)
        if alike and other.cell["recipe"] == DENSE and other.status == DONE and other is not row:
            return other
    return None


def _table(suite: Suite, rows: list[Row]) -> Table:
    kind = rows[0].cell["task"]["kind"]
    first: list[Column] = [
        ("code" if kind == "reconstruction" else "recipe", what_of),
        ("T", steps_of),
        ("options", options_of),
    ]
    first += [(name, _axis(name)) for name in PLAIN]
    columns = [*first, *_COLUMNS[kind](suite, rows), ("", _remark)]
    cells = [[text(row) for _, text in columns] for row in rows]
    # A column that says the same of every row, or nothing, tells nothing.
    kept = [
        index
        for index, (name, _) in enumerate(columns)
        if any(row[index] for row in cells) and (name not in PLAIN or len({r[index] for r in cells}) > 1)
    ]
    common = _common([row.protocol for row in rows if row.protocol])
    task = rows[0].cell["task"]
    title = f"{rows[0].name}: {kind}" if rows[0].cell["model"] else f"{kind}, {task['distribution']} values"
    head = [columns[index][0] for index in kept]
    labels = _labels([[row[index] for index in kept if index < len(first)] for row in cells])
    texts = [[row[index] for index in kept] for row in cells]
    return Table(title, head, texts, [row.id for row in rows], common, _parted(rows, labels, common))


def _labels(names: Sequence[Sequence[str]]) -> list[str]:
    """What rows are called: as many of their first columns as tell them apart."""
    labels: list[str] = []
    for width in range(1, len(names[0]) + 1):
        labels = [" ".join(text for text in row[:width] if text) for row in names]
        if len(set(labels)) == len(labels):
            break
    return labels


def _parted(rows: Sequence[Row], labels: Sequence[str], common: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What holds for some rows only, and for which."""
    found: dict[str, dict[str, list[str]]] = {}
    for row, label in zip(rows, labels, strict=True):
        # These have columns.
        for key in sorted(row.protocol.keys() - common.keys() - {"steps", "batch_invariant", *PLAIN}):
            found.setdefault(key, {}).setdefault(flat(row.protocol[key]), []).append(label)

    def words(holders: list[str]) -> str:
        others = [label for label in labels if label not in holders]
        return "all but " + ", ".join(others) if 2 * len(others) < len(holders) else ", ".join(holders)

    return {key: {value: words(holders) for value, holders in values.items()} for key, values in found.items()}


def _common(protocols: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not protocols:
        return {}
    first = protocols[0]
    return {key: value for key, value in first.items() if all(each.get(key) == value for each in protocols)}


def what_of(row: Row) -> str:
    return str(row.cell["task"].get("encoder") or row.cell["recipe"])


def steps_of(row: Row) -> str:
    steps = row.cell["steps"] or row.protocol.get("steps")
    return "" if row.cell["recipe"] == DENSE or steps is None else str(steps)


def options_of(row: Row) -> str:
    said = {**row.cell["options"]}
    if row.cell["execution"]:
        said["execution"] = row.cell["execution"]
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in said.items())


def _remark(row: Row) -> str:
    if row.status != DONE:
        return f"{row.status}: {row.error}"
    said = ["not batch invariant"] if row.protocol.get("batch_invariant") is False else []
    if "halved" in str(row.protocol.get("batch_size", "")):
        said.append("batch halved")
    return ", ".join(said)


def _figure(key: str, form: str, where: str = "metrics") -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = getattr(row, where).get(key)
        return "" if value is None else _number(value, form)

    return text


def _number(value: float, form: str) -> str:
    if not math.isfinite(value):
        return str(value)
    return form.format(value)


_ENERGY: list[Column] = [
    ("energy / dense", _figure("energy_ratio", "{:.3f}")),
    ("with memory", _figure("energy_ratio_memory", "{:.3f}")),
]


def _perplexity(suite: Suite, rows: list[Row]) -> list[Column]:
    def change(row: Row) -> str:
        found, dense = row.metrics.get("perplexity"), twin(row, rows)
        if dense is None or found is None or row.cell["recipe"] == DENSE:
            return ""
        return f"{found / dense.metrics['perplexity'] - 1:+.2%}"

    return [
        ("perplexity", _figure("perplexity", "{:,.3f}")),
        ("change", change),
        ("spikes a token", _figure("spikes", "{:,.0f}")),
        *_ENERGY,
        *_published(suite, "perplexity", "{:.2f}"),
    ]


def _lm_eval(suite: Suite, rows: list[Row]) -> list[Column]:
    every = list(dict.fromkeys(name for row in rows for name in row.metrics if "." in name))
    with_accuracy = {name.partition(".")[0] for name in every if name.endswith(".acc")}
    names = [name for name in every if name.endswith(".acc") or name.partition(".")[0] not in with_accuracy]

    def score(name: str) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            if name not in row.metrics:
                return ""
            if not name.endswith(".acc"):
                return f"{row.metrics[name]:.4g}"
            spread = row.detail["stderr"].get(name)
            return f"{row.metrics[name]:.1%}" + (f" ± {spread:.1%}" if isinstance(spread, float) else "")

        return text

    return [
        *((name.removesuffix(".acc"), score(name)) for name in names),
        ("mean", _figure("mean_acc", "{:.2%}")),
        ("same answers as dense", lambda row: _same_answers(row, twin(row, rows))),
    ]


def _same_answers(row: Row, dense: Row | None) -> str:
    if dense is None or row.cell["recipe"] == DENSE or row.status != DONE:
        return ""
    mine, theirs = row.detail["predictions"], dense.detail["predictions"]
    pairs = [pair for name in mine if name in theirs for pair in zip(mine[name], theirs[name], strict=False)]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.1%}" if pairs else ""


def _accuracy(suite: Suite, rows: list[Row]) -> list[Column]:
    return [
        ("top-1", _figure("top1", "{:.2%}")),
        ("top-1 of the ANN", _figure("top1_dense", "{:.2%}")),
        ("agree", _figure("agreement", "{:.2%}")),
        ("top-5", _figure("top5", "{:.2%}")),
        ("steps to the result", _figure("steps_to_result", "{:,.0f}")),
        ("spikes an image", _figure("spikes", "{:,.0f}")),
        *_ENERGY,
        ("ms an image", _figure("ms_per_image", "{:.1f}", "timing")),
        ("of the ANN", _figure("ms_per_image_dense", "{:.1f}", "timing")),
        *_published(suite, "top1", "{:.2%}"),
    ]


def _reconstruction(suite: Suite, rows: list[Row]) -> list[Column]:
    return [
        ("mean squared error", lambda row: _with_spread(row)),
        ("nearest level", _figure("floor_levels", "{:.3e}")),
        ("2^T even levels", _figure("floor_binary", "{:.3e}")),
        ("spikes", _figure("spikes", "{:.3f}")),
        *_published(suite, "mse", "{:.2e}", lambda row: row.cell["task"]["distribution"] == "uniform"),
    ]


def _with_spread(row: Row) -> str:
    return f"{row.metrics['mse']:.3e} ± {row.metrics['mse_stderr']:.0e}" if "mse" in row.metrics else ""


def _throughput(suite: Suite, rows: list[Row]) -> list[Column]:
    unit = "tokens" if rows[0].cell["task"]["text"] else "images"
    return [
        (f"{unit}/s dense", _figure(f"{unit}_per_second_dense", "{:,.1f}", "timing")),
        (f"{unit}/s spiking", _figure(f"{unit}_per_second_spiking", "{:,.1f}", "timing")),
        ("time / dense", _figure("time_ratio", "{:.2f}", "timing")),
    ]


def _energy(suite: Suite, rows: list[Row]) -> list[Column]:
    return [
        ("MACs dense", _figure("dense_macs", "{:.4g}")),
        ("MACs left", _figure("macs", "{:.4g}")),
        ("ACs", _figure("acs", "{:.4g}")),
        ("spikes charged", _figure("spikes_charged", "{:.4g}")),
        ("updates", _figure("updates", "{:.4g}")),
        ("mJ dense", _figure("mj_dense", "{:.4g}")),
        ("mJ", _figure("mj", "{:.4g}")),
        *_ENERGY,
    ]


def _published(suite: Suite, metric: str, form: str, where: Callable[[Row], bool] = lambda row: True) -> list[Column]:
    known = [each for each in suite.compare if each.metric == metric]
    if not known:
        return []

    def text(row: Row) -> str:
        if row.cell["options"] or row.cell["framework"] != "torch" or row.cell["execution"]:
            return ""  # it is another thing than what was published
        steps = steps_of(row)
        found = [
            e for e in known if where(row) and e.recipe == what_of(row) and (e.steps is None or str(e.steps) == steps)
        ]
        return "; ".join(_number(each.value, form) + (f" ({each.model})" if each.model else "") for each in found)

    return [("published", text)]


_COLUMNS: dict[str, Callable[[Suite, list[Row]], list[Column]]] = {
    "perplexity": _perplexity,
    "lm-eval": _lm_eval,
    "accuracy": _accuracy,
    "reconstruction": _reconstruction,
    "throughput": _throughput,
    "energy": _energy,
}


PUBLISHED = ["", "model", "metric", "figure", "source", "note"]


def published_rows(known: Sequence[Published]) -> list[list[str]]:
    return [
        [f"{e.label}{f', T = {e.steps}' if e.steps else ''}", e.model, e.metric, f"{e.value:g}", e.source, e.note]
        for e in known
    ]


def said(protocol: Mapping[str, Any]) -> str:
    """A protocol in one line."""
    return "; ".join(f"{key.replace('_', ' ')}: {flat(value)}" for key, value in protocol.items())


def flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(each)}" for key, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def said_of(chapter: Chapter) -> str:
    """Suite, time, machine and versions of a chapter in one line."""
    versions: dict[str, set[str]] = {}
    for row in chapter.rows:
        for name, version in row.versions.items():
            versions.setdefault(name, set()).add(version)
    machines = sorted({flat(row.hardware) for row in chapter.rows if row.hardware})
    known = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in sorted(versions.items()))
    suite = f"Suite {chapter.suite.name}, version {chapter.suite.version}"
    suite += f", changed: {flat(chapter.run.overrides)}" if chapter.run.overrides else ""
    codes = len({row.code for row in chapter.rows})
    mixed = f"; rows of {codes} states of the code" if codes > 1 else ""
    left = f"; {chapter.missing} cells not run yet" if chapter.missing else ""
    return f"{suite}, {chapter.run.started}. {known}. {'; '.join(machines)}{mixed}{left}"
