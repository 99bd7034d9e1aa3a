"""`spikeplug demo`: a real language model made spiking under every installed recipe, as a table and a page."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spikeplug.conversion.architecture import Opened, Watch

PROMPT = "Gravity is the force that"
NEW_TOKENS = 32


def demo(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or 'smollm2'.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("demo"),
    tokens: Annotated[int, typer.Option(help="Tokens to measure perplexity on.")] = 2048,
    calibrate_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 4096,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Convert a language model with every recipe that fits one, compare, and write a page with a plot."""
    import json

    from spikeplug.cli import language, progress
    from spikeplug.errors import SpikeplugError

    page = _writable(out / "index.html")
    architecture = language()
    with tempfile.TemporaryDirectory() as folder, quiet():
        calibration, test = _texts(Path(folder))
        with progress() as watch:
            watch("loading", 0, 1)
            opened = architecture.open(model, dtype="auto", device="cpu")
        rows, measure = [], _Measure(architecture, calibration, test, seqlen, tokens, calibrate_tokens)
        for recipe in [None, *_fitting()]:
            try:
                with progress() as measure.watch:
                    rows.append(measure(opened, recipe))
            except SpikeplugError as error:
                if recipe is None:
                    raise
                typer.echo(f"warning: recipe '{recipe}' is left out: {error}", err=True)
    for row in rows:
        row["change"] = row["perplexity"] / rows[0]["perplexity"] - 1
    page.write_text(render(rows, model))
    if as_json:
        typer.echo(json.dumps({"rows": rows, "page": str(page)}, indent=2))
        return
    _print(rows)
    typer.echo(f"page: {page}")


def _writable(page: Path) -> Path:
    """Refuse, before any work is done, a page that could not be written."""
    from spikeplug.errors import OptionError

    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        new = not page.exists()
        page.open("a").close()
        if new:
            page.unlink()
    except OSError as error:
        raise OptionError(f"cannot write the page to {page.parent}: {error.strerror or error}") from None
    return page


def _fitting() -> Iterator[str]:
    """Names of the recipes that fit a language model; one that cannot be loaded is said, not raised."""
    from spikeplug import plugins
    from spikeplug.errors import PluginError

    for name in plugins.registry().names("recipe"):
        try:
            if "lm" in plugins.get_recipe(name).targets:
                yield name
        except PluginError as error:
            typer.echo(f"warning: {error}", err=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars and notes off the screen while ours are on it."""
    from transformers.utils import logging

    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()


class _Measure:
    """Everything a row of the demo needs, measured on one model."""

    def __init__(
        self,
        architecture: Any,
        calibration: Path,
        test: Path,
        seqlen: int,
        tokens: int,
        calibrate_tokens: int,
    ) -> None:
        self.architecture, self.calibration, self.test = architecture, calibration, test
        self.seqlen, self.tokens, self.calibrate_tokens = seqlen, tokens, calibrate_tokens
        self.watch: Watch = lambda stage, done, of: None
        self.statistics: dict[str, Any] = {}

    def __call__(self, dense: Opened, recipe: str | None) -> dict[str, Any]:
        from spikeplug.conversion.architecture import Opened
        from spikeplug.conversion.record import conversion_of

        opened, steps, code = dense, None, "floating point"
        if recipe is not None:
            opened = Opened(self._convert(dense, recipe), dense.tokenizer, dense.name)
            encoder, _ = conversion_of(opened.model).config.build()
            steps, code = encoder.steps, str(encoder)
        found = self.architecture.perplexity(
            opened, self.test, seqlen=self.seqlen, tokens=self.tokens, watch=self._named(recipe or "dense")
        )
        return {
            "recipe": recipe or "dense",
            "code": code,
            "steps": steps,
            "perplexity": found["perplexity"],
            "spikes_per_token": found.get("spikes", {}).get("per_token"),
            "tokens_per_second": found["tokens_per_second"],
            "protocol": found["protocol"],
            "macs_share": found.get("report", {}).get("macs_share", {}),
            "sentence": _continue(opened),
        }

    def _convert(self, opened: Opened, recipe: str) -> Any:
        """What `spikeplug.convert` does; recipes with the same sites share what was observed at them."""
        import spikeplug
        from spikeplug.coding.site import sites

        config = spikeplug.ConversionConfig.resolve(recipe, {})
        batches = self.architecture.calibration(
            opened, self.calibration, seqlen=self.seqlen, tokens=self.calibrate_tokens, config=config
        )
        model = spikeplug.prepare(opened.model, config, batches)
        watch = self._named(recipe)
        waiting = {name for name, site in sites(model).items() if site.static and site.observes}
        if config.passes or not waiting <= set(self.statistics):
            found = spikeplug.observe(model, batches, watch=watch)
            if not config.passes:
                self.statistics.update(found)
        else:
            found = self.statistics
        spikeplug.fit(model, found, watch=watch)
        return spikeplug.set_execution(model, config.execution)

    def _named(self, recipe: str) -> Watch:
        return lambda stage, done, of: self.watch(f"{recipe}: {stage}", done, of)


def _texts(folder: Path) -> tuple[Path, Path]:
    """English text that every Python has, in two parts that share no paragraph: calibration and test."""
    from pydoc_data import topics

    # Some topics repeat paragraphs of others.
    everything = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    paragraphs = list(dict.fromkeys(everything.split("\n\n")))
    half = len(paragraphs) // 2
    calibration, test = folder / "pydoc topics, first half", folder / "pydoc topics, second half"
    calibration.write_text("\n\n".join(paragraphs[:half]), encoding="utf-8")
    test.write_text("\n\n".join(paragraphs[half:]), encoding="utf-8")
    return calibration, test


def _continue(opened: Opened) -> str:
    inputs = opened.tokenizer(PROMPT, return_tensors="pt")
    model: Any = opened.model
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    sentence, stop, _ = str(opened.tokenizer.decode(ids[0], skip_special_tokens=True)).partition(". ")
    return sentence.strip() + stop.strip()


def _cells(row: dict[str, Any]) -> list[str]:
    spikes = row["spikes_per_token"]
    return [
        row["recipe"],
        "-" if row["steps"] is None else str(row["steps"]),
        f"{row['perplexity']:.3f}" if row["perplexity"] < 1e5 else f"{row['perplexity']:.2e}",
        "-" if row["recipe"] == "dense" else f"{row['change']:+.2%}" if row["change"] < 100 else "far off",
        "-" if spikes is None else f"{spikes:,.0f}",
        f"{row['tokens_per_second']:.0f}",
    ]


HEAD = ["recipe", "steps", "perplexity", "change", "spikes / token", "tokens / s"]


def _protocol(row: dict[str, Any]) -> str:
    protocol = row["protocol"]
    return (
        f"{protocol['model']} in {protocol['dtype']}; {protocol['tokens']} tokens of {protocol['text']}, "
        f"SHA-256 {protocol['sha256'][:12]}, windows of {protocol['seqlen']}, stride {protocol['stride']}, "
        f"BOS {'yes' if protocol['bos'] else 'no'}, {protocol['targets']} targets"
    )


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for index, name in enumerate(HEAD):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*_cells(row))
    console = Console()
    console.print(table)
    console.print(f"\n{_protocol(rows[0])}; spikes are counted while the speed is measured\n", highlight=False)
    for row in rows:
        console.print(f"[bold]{row['recipe']}[/bold]: {row['sentence']}", highlight=False)


def render(rows: list[dict[str, Any]], model: str) -> str:
    """The page: table, plot, sentences and protocol in one HTML file that needs nothing else."""
    from importlib.resources import files

    from jinja2 import Environment

    template = files("spikeplug_transformers").joinpath("demo.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    table = [(row, _cells(row)) for row in rows]
    return page.render(model=model, head=HEAD, table=table, protocol=_protocol(rows[0]), plot=_plot(rows))


def _plot(rows: list[dict[str, Any]]) -> str:
    """Perplexity of every recipe against the dense model's, as inline SVG."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "spikeplug", "font.size": 11}):
        figure = Figure(figsize=(7, 0.6 + 0.5 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        names = [row["recipe"] + ("" if row["steps"] is None else f", {row['steps']} steps") for row in rows]
        values = [row["perplexity"] for row in rows]
        bars = axes.barh(names, values, color=["#8a8f98", *["#2f6fde"] * (len(rows) - 1)], height=0.6)
        axes.bar_label(bars, [_cells(row)[2] for row in rows], padding=4)
        axes.axvline(values[0], color="#8a8f98", linewidth=1, linestyle=":")
        if max(values) > 20 * min(values):
            axes.set_xscale("log")
        axes.margins(x=0.25)
        axes.invert_yaxis()
        axes.set_xlabel("perplexity (lower is better)")
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]
