"""`spikeplug bench`: run suites, look at what there is, write reports."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeplug.cli import Json, print_json, print_table, settings
from spikeplug.errors import OptionError

if TYPE_CHECKING:
    from .engines import Engine
    from .runner import Plan
    from .store import Row
    from .suite import Axis
    from .suite import Suite as SuiteFile

app = typer.Typer(no_args_is_help=True, help="Measure codes and networks side by side, in suites that can be rerun.")

STORE = Path("spikeplug-bench.db")

OTHER_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""Variables that keep bars of other libraries from running through ours, and through the rows of a log. They are set
before any is imported, which is when they look; processes of engines inherit them."""

Suite = Annotated[str, typer.Argument(help="A shipped suite (`spikeplug bench ls`), or a YAML file.")]
StorePath = Annotated[Path, typer.Option("--store", help="SQLite file of results.")]
Data = Annotated[
    Path | None, typer.Option(envvar="SPIKEPLUG_DATA", help="Folder that the paths of a suite are relative to.")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("-s", metavar="AXIS=VALUE,...", help="Replace an axis: steps=4,8, options.beta=2, task.seqlen=256."),
]


@app.command("run")
def run_command(
    context: typer.Context,
    suite: Suite,
    store: StorePath = STORE,
    data: Data = None,
    setting: Setting = None,
    limit: Annotated[int | None, typer.Option(help="Items of every task: documents, images, windows.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of every task that has batches.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every cell.")] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it: cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of language models: auto, float32, bfloat16, float16.")] = None,
    jobs: Annotated[int, typer.Option("-j", help="Cells at a time.")] = 1,
    engine: Annotated[
        str | None, typer.Option(help="local, processes, ray or slurm; with -j alone: processes.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="Option of the engine: gpus=0.5, partition=gpu.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run finished cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run a suite. The same command goes on where it was stopped; what is finished is not run again."""
    for name in OTHER_BARS:
        os.environ.setdefault(name, "1")
    from . import runner
    from .store import Store
    from .suite import read_suite

    found, folder = read_suite(suite), _data(context, suite, data)
    change = _change(setting, limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype)
    if jobs < 1:
        raise OptionError(f"-j {jobs}: at least 1 is needed")
    where = _engine(engine, jobs, address, option)
    opened = None if dry_run and not store.exists() else Store(store, read_only=dry_run)
    plan = runner.plan(found, opened, folder, change, cache=runner.cache_of(store))
    if dry_run or opened is None:
        _print_plan(plan, force, as_json)
        return
    _warn(plan, force)
    with _bars(len(plan.specs) if force else len(plan.left)) as (arrived, watch):
        rows = runner.run(
            found, opened, folder, change=change, planned=plan, engine=where, force=force, arrived=arrived, watch=watch
        )
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        _print_tables(found, rows)
    _end(rows, len(plan.specs), store)


def _end(rows: Sequence[Row], planned: int, store: Path) -> None:
    """Say what was not done, and end with its status."""
    from .store import DONE

    bad = [row for row in rows if row.status != DONE]
    for row in bad:
        typer.echo(f"{row.status}: {_label(row)}: {row.error}", err=True)
    typer.echo(f"{len(rows) - len(bad)} of {planned} cells in {store}", err=True)
    if bad:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    store: Annotated[Path, typer.Argument(help="SQLite file of results.")] = STORE,
    html: Annotated[Path | None, typer.Option(help="Write one page that needs no network.")] = None,
    md: Annotated[Path | None, typer.Option(help="Write Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every figure as a line of CSV.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write LaTeX tables.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="Only these suites.")] = None,
    as_json: Json = False,
) -> None:
    """Write what a store holds: of every suite its last run."""
    from . import report, tables
    from .store import Store

    chapters = tables.chapters(Store(store, read_only=True), suite)
    writers = {report.write_html: html, report.write_markdown: md, report.write_csv: csv, report.write_latex: latex}
    for write, path in writers.items():
        if path is not None:
            write(chapters, path)
            typer.echo(f"wrote {path}", err=True)
    if as_json:
        print_json(
            [{"suite": each.suite.name, "rows": [dataclasses.asdict(row) for row in each.rows]} for each in chapters]
        )
    elif not any(writers.values()):
        for chapter in chapters:
            typer.echo(f"\n{chapter.suite.title}")
            _print_tables(chapter.suite, chapter.rows)


@app.command("ls")
def ls_command(as_json: Json = False) -> None:
    """List the suites that come with the runner."""
    from .suite import read_suite, shipped

    found = [read_suite(name) for name in shipped()]
    if as_json:
        print_json([{"name": each.name, "version": each.version, "title": each.title} for each in found])
    else:
        print_table(["suite", "version", "what"], [[each.name, str(each.version), each.title] for each in found])


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a suite, for editors."""
    from .suite import json_schema

    print_json(json_schema())


@app.command("show")
def show_command(suite: Suite, setting: Setting = None, as_json: Json = False) -> None:
    """Print the cells of a suite with every choice resolved. Nothing is run, and the data need not be there."""
    from .cells import cells
    from .suite import overrides, read_suite

    found = cells(read_suite(suite), overrides(setting or []))
    if as_json:
        print_json([cell.model_dump(mode="json") for cell in found])
    else:
        print_table(["cell"], [[cell.label()] for cell in found])


def _data(context: typer.Context, suite: str, data: Path | None) -> Path:
    from .embedded import NAMES, prepare

    source = context.get_parameter_source("data")
    if suite in NAMES and (source is None or source.name != "COMMANDLINE"):
        return prepare()  # suites whose data come with the runner need no folder, whatever the variable says
    if data is None:
        return Path.cwd()
    if not data.is_dir():
        raise OptionError(f"--data {data}: it is no folder")
    return data.absolute()


def _change(setting: list[str] | None, **given: Any) -> Axis:
    from .suite import overrides

    axes = {"limit": "task.limit", "batch_size": "task.batch_size"}
    words = list(setting or [])
    words += [f"{axes.get(key, key)}={value}" for key, value in given.items() if value is not None]
    return overrides(words)


def _engine(name: str | None, jobs: int, address: str | None, option: list[str] | None) -> Engine:
    import pydantic

    from spikeplug.errors import nearest
    from spikeplug.plugins import get_class

    if address is not None and name not in (None, "ray"):
        raise OptionError(f"--address {address}: it is for --engine ray, not for {name}")
    name = name or ("ray" if address else "processes" if jobs > 1 else "local")
    cls = get_class("engine", name)
    given = settings(option or []) | ({"address": address} if address else {})
    known = {field.name for field in dataclasses.fields(cls)} - {"jobs"}
    for key in given:
        if key not in known:
            raise OptionError(
                f"-o {key}: engine '{name}' has no such option{nearest(key, known)} It has: {sorted(known)}"
            )
    if name == "local" and jobs > 1:
        raise OptionError(f"-j {jobs}: --engine local runs one cell at a time; leave --engine out")
    try:
        engine: Engine = pydantic.TypeAdapter(cls).validate_python({"jobs": jobs, **given})
    except pydantic.ValidationError as error:
        found = error.errors()[0]
        raise OptionError(f"-o {found['loc'][0]}={found['input']}: {found['msg']}") from None
    return engine


def _print_plan(plan: Plan, force: bool, as_json: bool) -> None:
    rows = [
        [each[:12], plan.cell(each).label(), "done" if each in plan.finished and not force else "to run"]
        for each in plan.specs
    ]
    if as_json:
        print_json([dict(zip(("id", "cell", "status"), row, strict=True)) for row in rows])
    else:
        print_table(["cell", "what", "status"], rows)


def _warn(plan: Plan, force: bool) -> None:
    """Say what the store has that is not quite what is asked for."""
    if plan.stale and not force:
        typer.echo(
            f"warning: {len(plan.stale)} finished cells were measured with other code; --force redoes them", err=True
        )
    if plan.otherwise:
        typer.echo(
            f"note: {len(plan.otherwise)} cells are in the store as measured with "
            f"{', '.join(plan.changed) or 'other files'}; those rows stay, and these cells are run",
            err=True,
        )


def _print_tables(suite: SuiteFile, rows: list[Row]) -> None:
    from .tables import text_tables

    for title, head, lines in text_tables(suite, rows):
        typer.echo(f"\n{title}")
        print_table(head, lines)


def _label(row: Row) -> str:
    from .spec import Cell

    return Cell.model_validate(row.cell).label()


@contextlib.contextmanager
def _bars(total: int) -> Iterator[Any]:
    """A bar for the sweep and one for the cell, on stderr; lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        sweep, cell = bar.add_task("sweep", total=total), bar.add_task("", total=None)

        def arrived(row: Row) -> None:
            bar.advance(sweep)
            line = f"{row.status:<5} {row.seconds:7.1f} s  {_label(row)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        def watch(stage: str, done: int, of: int | None) -> None:
            bar.update(cell, description=stage, completed=done, total=of)

        yield arrived, watch
