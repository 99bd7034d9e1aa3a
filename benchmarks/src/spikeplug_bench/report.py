"""The files of a report: one page, Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spikeplug.errors import BundleError
from spikeplug.files import draft_of

from .spec import Cell
from .store import Row
from .tables import PUBLISHED, Chapter, flat, published_rows, said, said_of, steps_of, tables, what_of


def write_markdown(found: Sequence[Chapter], path: Path) -> None:
    """Write the tables as Markdown. Raises BundleError."""
    lines: list[str] = []
    for chapter in found:
        lines += [f"# {chapter.suite.title}", "", *([chapter.suite.about.strip(), ""] if chapter.suite.about else [])]
        lines += [said_of(chapter), ""]
        for table in tables(chapter.suite, chapter.rows):
            lines += [f"## {table.title}", "", *_markdown(table.head, table.rows), "", said(table.protocol), ""]
            for key, values in table.parted.items():
                each = "; ".join(f"{rows}: {value}" for value, rows in values.items())
                lines.append(f"* {key.replace('_', ' ')}, by row: {each}")
            lines += [""] if table.parted else []
        if chapter.suite.compare:
            lines += ["## Published", "", *_markdown(PUBLISHED, published_rows(chapter.suite.compare)), ""]
    _write(path, "\n".join(lines))


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join([' --- '] * len(head))}|"]
    return lines + [f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in rows]


def write_csv(found: Sequence[Chapter], path: Path) -> None:
    """Write every figure as a line. Raises BundleError."""
    out = io.StringIO()
    writer = csv.writer(out)
    head = ["suite", "id", "model", "recipe", "steps", "options", "framework", "execution", "task"]
    head += ["dtype", "device", "ranks", "seed", "status"]
    writer.writerow([*head, "metric", "value", "protocol"])
    for chapter in found:
        for row in chapter.rows:
            cell = row.cell
            start = [chapter.suite.name, row.id, row.name, what_of(row), steps_of(row), json.dumps(cell["options"])]
            start += [cell["framework"], cell["execution"] or "", cell["task"]["kind"]]
            start += [cell["dtype"], cell["device"], str(cell["ranks"]), str(row.seed), row.status]
            for metric, value in {**row.metrics, **row.timing}.items() or {"error": row.error}.items():
                writer.writerow([*start, metric, value, json.dumps(row.protocol)])
    _write(path, out.getvalue())


def write_latex(found: Sequence[Chapter], path: Path) -> None:
    """Write the tables as LaTeX, for the package booktabs. Raises BundleError."""
    lines = ["% needs \\usepackage{booktabs}"]
    for chapter in found:
        for table in tables(chapter.suite, chapter.rows):
            lines += [
                "\\begin{table}", "\\centering", f"\\begin{{tabular}}{{{'l' * len(table.head)}}}", "\\toprule",
                " & ".join(map(_tex, table.head)) + " \\\\", "\\midrule",
                *(" & ".join(map(_tex, row)) + " \\\\" for row in table.rows), "\\bottomrule", "\\end{tabular}",
                f"\\caption{{{_tex(f'{chapter.suite.title}, {table.title}. {said(table.protocol)}')}}}",
                f"\\label{{tab:{chapter.suite.name}-{table.ids[0][:8]}}}", "\\end{table}", "",
            ]  # fmt: skip
    _write(path, "\n".join(lines))


_TEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "β": "$\\beta$",
    "·": "$\\cdot$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def write_html(found: Sequence[Chapter], path: Path) -> None:
    """Write one page that needs no network and no script. Raises BundleError."""
    import jinja2

    from .figures import figures

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spikeplug_bench", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    parts = [
        {
            "suite": chapter.suite,
            "said": said_of(chapter),
            "tables": tables(chapter.suite, chapter.rows),
            "figures": figures(chapter),
            "published": published_rows(chapter.suite.compare),
            "rows": [_details(row) for row in chapter.rows],
        }
        for chapter in found
    ]
    template = environment.get_template("report.html.j2")
    _write(path, template.render(chapters=parts, published_head=PUBLISHED, said=said))


def _details(row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "label": Cell.model_validate(row.cell).label(),
        "facts": {
            "status": row.status + (f": {row.error}" if row.error else ""),
            "metrics": flat(row.metrics),
            "timing": flat(row.timing),
            "protocol": said(row.protocol),
            "conversion": flat({k: v for k, v in row.config.items() if v not in ({}, [], None)}),
            "versions": flat(row.versions),
            "inputs (SHA-256)": flat(row.inputs),
            "machine": flat(row.hardware),
            "measured": f"{row.started}, {row.seconds:.1f} s, seed {row.seed}",
            "source code (SHA-256)": row.code,
        },
    }


def _write(path: Path, text: str) -> None:
    try:
        with draft_of(path) as draft:
            draft.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}") from None
