"""Reports: what they hold, that they need nothing else, that equal rows give equal files."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml

from spikeplug.errors import BundleError, OptionError
from spikeplug_bench import figures, report, runner
from spikeplug_bench.store import Row, Store
from spikeplug_bench.suite import parse_suite
from spikeplug_bench.tables import chapters, tables

TEXT = """
format: 1
name: report
title: "A report & <its> parts"
grids:
  - task: {kind: reconstruction, encoder: rate, limit: 500}
    steps: [2, 4, 8]
  - task: {kind: reconstruction, encoder: rate, limit: 500}
    steps: 4
    options: {nonsense: 1}
compare:
  - {label: Rate, recipe: rate, steps: 4, metric: mse, value: 0.5, source: "A paper, Table 1"}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    opened = Store(folder / "a.db")
    runner.run(parse_suite(yaml.safe_load(TEXT)), opened, folder)
    return opened


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)


def test_the_page_needs_nothing_and_every_figure_leads_to_its_protocol(store, tmp_path):
    report.write_html(chapters(store), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    page = _Page()
    page.feed(text)
    outside = [link for link in page.links if not link.startswith("#")]
    assert not outside
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    targets = [link[1:] for link in page.links]
    assert set(targets) <= set(page.ids)
    assert {row.id[:16] for row in store.rows()} <= set(targets)
    assert "A report &amp; &lt;its&gt; parts" in text
    assert "500 of the uniform distribution" in text
    assert "unknown option" in text
    assert "A paper, Table 1" in text
    assert page.tags.count("svg") == 1


def test_equal_rows_give_equal_files(store, tmp_path):
    writers = (report.write_html, report.write_markdown, report.write_csv, report.write_latex)
    for write in writers:
        write(chapters(store), tmp_path / "a")
        write(chapters(store), tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_markdown_has_tables_with_their_protocol(store, tmp_path):
    report.write_markdown(chapters(store), tmp_path / "r.md")
    lines = (tmp_path / "r.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| rate |")]
    assert len(rows) == 4
    assert all(line.count("|") == rows[0].count("|") for line in rows)
    assert sum("| 5.00e-01 |" in row for row in rows) == 1
    assert any("range: known, [0, 1]" in line for line in lines)
    # What holds for some rows only is said too.
    codes = next(line for line in lines if line.startswith("* code, by row: "))
    assert "rate 2: Rate" in codes
    assert "rate 8: Rate" in codes


def test_csv_has_every_figure(store, tmp_path):
    report.write_csv(chapters(store), tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        found = list(csv.DictReader(file))
    row = next(r for r in store.rows() if r.cell["steps"] == 8)
    assert float(next(r["value"] for r in found if r["id"] == row.id and r["metric"] == "mse")) == row.metrics["mse"]
    assert [r["metric"] for r in found if r["status"] == "error"] == ["error"]


def test_latex_is_escaped(store, tmp_path):
    report.write_latex(chapters(store), tmp_path / "r.tex")
    text = (tmp_path / "r.tex").read_text()
    assert "A report \\& <its> parts" in text
    assert text.count("\\begin{tabular}") == text.count("\\bottomrule") == 1
    assert "$\\pm$" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(store, tmp_path):
    report.write_latex(chapters(store), tmp_path / "r.tex")
    whole = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{r.tex}\\end{document}"
    (tmp_path / "main.tex").write_text(whole)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_a_file_that_cannot_be_written_leaves_nothing(store, tmp_path, monkeypatch):
    path = tmp_path / "r.md"
    path.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(BundleError, match=r"cannot write .*r.md: No space left on device"):
        report.write_markdown(chapters(store), path)
    assert [each.name for each in tmp_path.iterdir()] == ["r.md"]
    assert path.read_text() == "before"


def test_only_suites_that_are_there(store, tmp_path):
    with pytest.raises(OptionError, match="did you mean 'report'"):
        chapters(store, ["reprot"])
    with pytest.raises(OptionError, match="holds no run yet"):
        chapters(Store(tmp_path / "empty.db"))


def _lm_row(recipe: str, metrics: dict, detail: dict, **protocol) -> Row:
    cell = {
        "model": {"source": "lm"},
        "recipe": recipe,
        "steps": None,
        "options": {},
        "execution": None,
        "framework": "torch",
    }
    return Row(
        id=recipe, point="p", name="lm", status="done", cell={**cell, "task": {"kind": "lm-eval"}}, metrics=metrics,
        timing={}, protocol=protocol, detail=detail, config={}, versions={}, inputs={}, code="", hardware={}, seed=0,
        started="", seconds=0.0,
    )  # fmt: skip


def test_every_row_is_compared_with_its_own_twin():
    suite, rows = parse_suite(yaml.safe_load(TEXT)), []
    for dtype, dense, spiking in (("float32", 10.0, 11.0), ("bfloat16", 20.0, 22.0)):
        for recipe, value in (("dense", dense), ("bse", spiking)):
            row = _lm_row(recipe, {"perplexity": value}, {})
            cell = {**row.cell, "dtype": dtype, "task": {"kind": "perplexity"}}
            rows.append(dataclasses.replace(row, id=f"{recipe}{dtype}", cell=cell))
    table = tables(suite, rows)[0]
    assert table.head == ["recipe", "dtype", "perplexity", "change"]
    assert [row[3] for row in table.rows] == ["", "+10.00%", "", "+10.00%"]


def test_what_holds_for_some_rows_is_said_of_those():
    rows = [_lm_row("dense", {}, {"predictions": {}}, device="cpu")]
    for recipe, code in (("bse", "BSE"), ("laser", "BSE"), ("rate", "Rate")):
        rows.append(_lm_row(recipe, {}, {"predictions": {}}, device="cpu", calibration="text.txt", code=code))
    table = tables(parse_suite(yaml.safe_load(TEXT)), rows)[0]
    assert table.protocol == {"device": "cpu"}
    assert table.parted == {
        "calibration": {"text.txt": "all but dense"},
        "code": {"BSE": "bse, laser", "Rate": "rate"},
    }


def test_lines_of_a_figure_are_told_apart_by_their_options(store):
    rows = [row for row in store.rows() if row.status == "done"]
    other = [dataclasses.replace(row, id=f"{row.id}x", cell={**row.cell, "options": {"signed": False}}) for row in rows]
    chapter = dataclasses.replace(chapters(store)[0], rows=rows + other)
    svg = figures.figures(chapter)[0]["svg"]
    assert "rate signed=false" in svg


def test_every_line_of_a_figure_has_a_look_of_its_own():
    def looks(count: int) -> int:
        svg = figures._plot({f"line {index}": [(1.0, index), (2.0, index)] for index in range(count)}, "x", "y")
        return len(set(re.findall(r'id="(m[0-9a-f]+)"', svg)))

    assert looks(24) - looks(4) == 20


def test_answers_are_compared_with_those_of_the_dense_model():
    dense = {"stderr": {"a.acc": 0.1}, "predictions": {"a": [0, 1, 2, 0]}}
    spiking = {"stderr": {}, "predictions": {"a": [0, 1, 1, 1]}}
    rows = [
        _lm_row("dense", {"a.acc": 0.5, "mean_acc": 0.5}, dense),
        _lm_row("bse", {"a.acc": 0.25, "mean_acc": 0.25}, spiking, batch_invariant=False),
    ]
    table = tables(parse_suite(yaml.safe_load(TEXT)), rows)[0]
    assert table.head == ["recipe", "a", "mean", "same answers as dense", ""]
    assert table.rows[0] == ["dense", "50.0% ± 10.0%", "50.00%", "", ""]
    assert table.rows[1] == ["bse", "25.0%", "25.00%", "50.0%", "not batch invariant"]


def test_tasks_without_an_accuracy_have_their_own_figures():
    row = _lm_row("dense", {"a.acc": 0.5, "a.acc_norm": 0.4, "b.exact_match.strict": 0.25}, {"stderr": {}})
    table = tables(parse_suite(yaml.safe_load(TEXT)), [row])[0]
    assert table.head == ["recipe", "a", "b.exact_match.strict"]
    assert table.rows[0] == ["dense", "50.0%", "0.25"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(store, tmp_path, width):
    """Nothing but the tables, which scroll by themselves, is wider than the screen, and something is drawn."""
    from matplotlib import image

    report.write_html(chapters(store), tmp_path / "r.html")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path}/profile"]
    command += [f"--window-size={width},1600", f"--screenshot={tmp_path}/r.png", f"file://{tmp_path}/r.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = image.imread(tmp_path / "r.png")
    assert pixels.shape[1] >= width
    assert pixels[..., :3].std() > 0.05
