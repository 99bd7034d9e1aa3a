"""The command line: results on stdout, progress and errors on stderr, exit status 1 and one line for a user error."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import spikeplug
from spikeplug import plugins as registry
from spikeplug.errors import ConversionError, OptionError, PluginError, SpikeplugError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spikeplug.architecture import LanguageArchitecture

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Turn pretrained networks into spiking ones under coding schemes that are plugins.",
)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

TERMINATED = 143
"""Exit status after SIGTERM."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Model = Annotated[
    str,
    typer.Argument(
        help="Language model: a folder, a hub id, a .gguf file, or 'smollm2'. "
        "Image network: a torchvision or timm name, cifar_resnet20, module:function, or a folder."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Image network: a folder of images or of a folder per class, a CIFAR root, an ImageNet root."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="As torch names it: cpu, cuda, cuda:1, mps.")]


def main() -> None:
    """Entry point of the console script."""
    # A plain kill unwinds as Ctrl-C does, so that no draft of a folder stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    with _one_line():
        for part in registry.registry().plugins:
            for command in part.parts:
                if command.kind == "command":
                    _add(command)
        try:
            app()
        finally:
            sys.stdout.flush()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except SpikeplugError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        # typer turns Ctrl-C into this status without a word.
        if end.code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
        raise
    except OSError as error:
        # Most often results that cannot be written: a full disk, a reader that went away. Python flushes once more at
        # its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


_ADDED: set[registry.Part] = set()
"""Commands of plugins that `main` has added in this process."""


def _add(command: registry.Part) -> None:
    """Add a plugin's command. One that cannot be imported must not take the others with it."""
    if command in _ADDED:
        return
    taken = {each.name for each in app.registered_commands} | {each.name for each in app.registered_groups}
    if command.name in taken:
        sys.stderr.write(f"warning: command '{command.name}' of plugin '{command.plugin}' is left out: it is taken\n")
        return
    try:
        registry.registry().find("command", command.name)
        brought = command.load()
    except PluginError as error:
        sys.stderr.write(f"warning: {error}\n")
        return
    _ADDED.add(command)
    if isinstance(brought, typer.Typer):
        app.add_typer(brought, name=command.name)
    else:
        app.command(command.name)(brought)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spikeplug {spikeplug.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@app.command("plugins")
def plugins_command(
    as_json: Json = False,
    probe: Annotated[bool, typer.Option(help="Import everything, each plugin in a process of its own.")] = False,
) -> None:
    """List the installed plugins, the sound and the broken ones."""
    found: list[dict[str, Any]] = []
    for plugin in registry.registry().plugins:
        broken = registry.probe(plugin) if probe else plugin.broken
        found.append(
            {
                "name": plugin.name,
                "distribution": plugin.dist,
                "version": plugin.version,
                "api": plugin.api,
                "brings": {kind: [part.name for part in plugin.parts if part.kind == kind] for kind in plugin.hooks},
                "status": f"broken: {broken}" if broken else "ok",
                "import_ms": round(plugin.import_ms, 1),
            }
        )
    if as_json:
        print_json(found)
    else:
        rows = [[*map(str, list(each.values())[:4]), _brings(each["brings"]), str(each["status"])] for each in found]
        print_table(["plugin", "distribution", "version", "api", "brings", "status"], rows)


@app.command("ls")
def ls_command(
    kind: Annotated[str, typer.Argument(help="recipes, encoders, neurons, approximators, passes, trainers, ...")],
    as_json: Json = False,
) -> None:
    """List the installed parts of a kind."""
    singular = {"passes": "pass"}.get(kind, kind if kind in registry.KINDS else kind.removesuffix("s"))
    found = registry.registry()
    parts = [part for name in found.names(singular) for part in found.parts[singular, name]]
    rows = [{"name": part.name, "plugin": part.plugin, "object": part.path} for part in parts]
    if as_json:
        print_json(rows)
    else:
        print_table(["name", "plugin", "object"], [list(row.values()) for row in rows])


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Look for mixtures of packages that do not work together, and say how to mend them."""
    from spikeplug.doctor import examine

    checks = examine()
    if as_json:
        print_json(checks)
    else:
        print_table(["check", "status", "what", "remedy"], [list(check.values()) for check in checks])
    if any(check["status"] == "problem" for check in checks):
        raise typer.Exit(1)


@app.command("convert")
def convert_command(
    model: Model,
    recipe: Annotated[str, typer.Option(help="Name of a recipe: `spikeplug ls recipes`.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="Language model: text file to calibrate on.")] = None,
    images: Images = None,
    weights: Annotated[Path | None, typer.Option(help="State dict of the image network: .safetensors, .pth.")] = None,
    count: Annotated[int, typer.Option(help="Images to calibrate on.")] = 1000,
    setting: Annotated[list[str], typer.Option("-s", metavar="KEY=VALUE", help="An option of the recipe.")] = [],  # noqa: B006
    calibrate_tokens: Annotated[int, typer.Option(help="Tokens of the text to use.")] = 16384,
    seqlen: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 512,
    observed: Annotated[
        Path | None, typer.Option(help="File to keep what sites saw in; read where it exists, for another recipe.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Image network: print the plan and what speaks against it; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Convert a network and write the spiking one to a folder: a language model, or with --images an image network."""
    from spikeplug.bundle import check_writable, save
    from spikeplug.config import ConversionConfig
    from spikeplug.conversion.verbs import convert, report

    config = ConversionConfig.resolve(recipe, settings(setting))
    if dry_run:
        _plan(model, recipe, config, images, weights, as_json)
        return
    if out is None:
        raise OptionError("where to write is missing: give --out FOLDER, or --dry-run to write nothing")
    check_writable(out, overwrite=force)
    if images is not None:
        _refuse_both("--calibrate", calibrate)
        with progress() as watch:
            spiking = vision().convert(
                model, recipe, config, images, weights=weights, count=count, observed=observed, watch=watch
            )
        save(spiking, out, overwrite=force)
        found = report(spiking)
    else:
        text = _need_file(calibrate, "--calibrate TEXT, or --images for an image network")
        architecture = language()
        opened = architecture.open(model, dtype=dtype, device=device)
        batches = architecture.calibration(opened, text, seqlen=seqlen, tokens=calibrate_tokens, config=config)
        with progress() as watch:
            spiking = convert(opened.model, config, calibration=batches, observed=observed, inplace=True, watch=watch)
        save(spiking, out, overwrite=force, tokenizer=opened.tokenizer)
        found = report(spiking)
    if as_json:
        print_json({"out": str(out), "config": config.model_dump(mode="json"), "report": found.to_dict()})
    else:
        typer.echo(str(found).splitlines()[0])
        typer.echo(f"wrote {out}")


def _plan(model: str, recipe: str, config: Any, images: Path | None, weights: Path | None, as_json: bool) -> None:
    """Print what a conversion would make of an image network; end with status 1 where something speaks against it."""
    if images is None:
        raise OptionError("--dry-run plans image networks: give --images FOLDER; language models have no plan yet")
    found = vision().planned(model, recipe, config, images, weights=weights)
    if as_json:
        print_json(found.summary())
    else:
        typer.echo(str(found))
    if found.problems:
        raise typer.Exit(1)


@app.command("eval")
def eval_command(
    model: Model,
    ppl: Annotated[Path | None, typer.Option(help="Language model: text file to measure perplexity on.")] = None,
    images: Images = None,
    weights: Annotated[Path | None, typer.Option(help="State dict of a dense image network.")] = None,
    count: Annotated[int | None, typer.Option(help="Use only so many images.")] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    framework: Annotated[
        str, typer.Option(help="torch, spikingjelly or snntorch: what an image network runs in.")
    ] = "torch",
    seqlen: Annotated[int, typer.Option(help="Tokens in a window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.")] = None,
    execution: Annotated[str | None, typer.Option(help="fused or stepped.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a network, spiking or dense, with protocol, speed and spikes: perplexity, or with --images accuracy."""
    from spikeplug.conversion.verbs import set_execution

    if images is not None:
        _refuse_both("--ppl", ppl)
        _eval_images(model, images, weights, count, batch, framework, execution, device, as_json)
        return
    ppl = _need_file(ppl, "--ppl TEXT, or --images for an image network")
    architecture = language()
    opened = architecture.open(model, dtype=dtype, device=device)
    if execution is not None:
        set_execution(opened.model, execution)  # type: ignore[arg-type]
    with progress() as watch:
        result = architecture.perplexity(opened, ppl, seqlen=seqlen, tokens=max_tokens, watch=watch)
    if as_json:
        print_json(result)
        return
    typer.echo(f"perplexity {result['perplexity']:.4f}")
    typer.echo("protocol   " + ", ".join(f"{key} {value}" for key, value in result["protocol"].items()))
    counted = ", spikes counted" if "spikes" in result else ""
    typer.echo(f"speed      {result['tokens_per_second']:.1f} tokens/s{counted}")
    if "spikes" in result:
        typer.echo(f"spikes     {result['spikes']['per_token']:,.0f} per token, {result['spikes']['total']:,} in all")
        found = result["energy"]
        memory = f"{found['ratio_with_memory']:.3f} x with memory and neurons"
        typer.echo(f"energy     {found['ratio']:.3f} x dense, {memory}")
        typer.echo(f"           {found['assumptions']}")


def _eval_images(
    model: str,
    images: Path,
    weights: Path | None,
    count: int | None,
    batch: int,
    framework: str,
    execution: str | None,
    device: str,
    as_json: bool,
) -> None:
    from spikeplug.conversion.verbs import set_execution

    if batch < 1:
        raise OptionError(f"--batch {batch}: at least 1 is needed")
    if count is not None and count < 1:
        raise OptionError(f"--count {count}: at least 1 is needed")
    opened = vision().open(model, weights)
    if execution is not None:
        set_execution(opened, execution)  # type: ignore[arg-type]
    with progress() as watch:
        result = vision().evaluate(
            opened, images, count=count, framework=framework, device=device, batch=batch, watch=watch
        )
    if as_json:
        print_json(result)
        return
    typer.echo("protocol   " + ", ".join(f"{key} {value}" for key, value in result["protocol"].items()))
    for name in ("dense", "spiking"):
        if name not in result:
            continue
        found = result[name]
        known = found["top1"] is not None
        accuracy = f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}" if known else "no labels"
        typer.echo(f"{name:<10} {accuracy}, {found['ms_per_image']:.1f} ms per image")
    if "spiking" in result:
        found = result["spiking"]
        where = f"in {found['framework']}, {found['steps_to_result']} steps to the result"
        typer.echo(f"           {found['agreement']:.2%} of predictions agree; {where}")
    if "energy" in result:
        found = result["energy"]
        typer.echo(f"spikes     {result['spikes']['per_image']:,.0f} per image")
        typer.echo(
            f"energy     {found['ratio']:.3f} x dense, {found['ratio_with_memory']:.3f} x with memory and neurons"
        )
        typer.echo(f"           {found['assumptions']}")


@app.command("train")
def train_command(
    model: Annotated[str, typer.Argument(help="A folder that `spikeplug convert` wrote.")],
    text: Annotated[Path, typer.Option(help="Text file to train on.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    trainer: Annotated[str, typer.Option(help="Name of a trainer: `spikeplug ls trainers`.")] = "ste",
    setting: Annotated[list[str], typer.Option("-s", metavar="KEY=VALUE", help="An option of the trainer.")] = [],  # noqa: B006
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows in a batch.")] = 4,
    tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of the state; default: OUT with .checkpoint.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Fine-tune a converted language model. The same command goes on where a killed one stopped."""
    import shutil

    import torch

    from spikeplug.bundle import check_writable, save

    built = registry.get_trainer(trainer, **settings(setting))
    check_writable(out, overwrite=force)
    _need_file(text, "--text TEXT")
    if batch < 1:
        raise OptionError(f"--batch {batch}: at least 1 is needed")
    kept = checkpoint or out.with_name(f"{out.name}.checkpoint")
    architecture = language()
    opened = architecture.open(model, dtype="auto", device=device)
    windows = architecture.windows(opened, text, seqlen=seqlen, tokens=tokens)
    batches = [torch.cat(list(windows[start : start + batch])) for start in range(0, len(windows), batch)]
    with progress() as watch:
        losses = built.train(opened.model, batches, checkpoint=kept, watch=watch)
    save(opened.model, out, overwrite=force, tokenizer=opened.tokenizer)
    if checkpoint is None:
        shutil.rmtree(kept, ignore_errors=True)
    if as_json:
        print_json({"out": str(out), "trainer": str(built), "losses": losses})
    else:
        head, tail = losses[: max(1, len(losses) // 10)], losses[-max(1, len(losses) // 10) :]
        typer.echo(f"loss {sum(head) / len(head):.4f} (first tenth) -> {sum(tail) / len(tail):.4f} (last tenth)")
        typer.echo(f"wrote {out}")


@app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(help="A folder that `spikeplug convert` wrote.")],
    to: Annotated[str, typer.Option(help="Name of an exporter: `spikeplug ls exporters`.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    images: Annotated[
        Path | None, typer.Option(help="Images that ranges and accuracy are measured on: as of `spikeplug eval`.")
    ] = None,
    count: Annotated[int, typer.Option(help="Use only so many images.")] = 256,
    setting: Annotated[list[str], typer.Option("-s", metavar="KEY=VALUE", help="An option of the exporter.")] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a converted image network in another tool's format, and say what that changed."""
    built = registry.get_exporter(to, **settings(setting))
    if out.is_dir() or (out.exists() and not force):
        raise OptionError(f"{out} {'is a folder' if out.is_dir() else 'exists'}: choose another file, or --force")
    if count < 1:
        raise OptionError(f"--count {count}: at least 1 is needed")
    opened = vision().open(model)
    samples: list[Any] = []
    if images is not None:
        found = vision().images(images, opened, count)
        batches = list(found.batches())
        of_all = iter(found.labels or [])
        samples = [(x, list(itertools.islice(of_all, len(x))) or None) for x in batches]
    with progress() as watch:
        report = built.export(opened, out, samples, watch=watch)
    if as_json:
        print_json({"out": str(out), "exporter": str(built), **report})
        return
    for title, rows in report.items():
        if isinstance(rows, list) and rows:
            print_table(
                [each.replace("_", " ") for each in rows[0]], [[_short(each) for each in row.values()] for row in rows]
            )
        elif isinstance(rows, dict):
            typer.echo(f"{title:<10} " + ", ".join(f"{key} {_short(value)}" for key, value in rows.items()))
        elif rows is not None:
            typer.echo(f"{title:<10} {rows}")
    typer.echo(f"wrote {out}")


def _short(value: object) -> str:
    return "-" if value is None else f"{value:.2%}" if isinstance(value, float) else str(value)


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from `key=value` words: a value is JSON where it is, else text; lists may be written with commas.

    Raises:
        OptionError: a word has no `=`.
    """
    from spikeplug.config import ConversionConfig

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise OptionError(f"'-s {pair}': write it as -s key=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        listed = key in ("include", "exclude", "passes") and key in ConversionConfig.model_fields
        found[key] = text.split(",") if listed and isinstance(value, str) else value
    return found


def language() -> LanguageArchitecture:
    """The architecture that opens language models.

    Raises:
        UnknownNameError: its plugin is not installed.
    """
    from spikeplug.architecture import LanguageArchitecture

    architecture = registry.get_class("architecture", "transformers")()
    if not isinstance(architecture, LanguageArchitecture):
        raise ConversionError(f"architecture 'transformers' is a {type(architecture).__name__}, not a language one")
    return architecture


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr, and the function `watch(stage, done, of)` that moves it. No bar where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, of: bar.update(task, description=stage, completed=done, total=of)


def vision() -> Any:
    """What opens image networks. Raises UnknownNameError when its plugin is not installed."""
    return registry.get_class("architecture", "vision")()


def _need_file(path: Path | None, wanted: str) -> Path:
    """Refuse a missing text before a model is loaded for it."""
    if path is None:
        raise OptionError(f"what to work on is missing: give {wanted}")
    if not path.is_file():
        raise OptionError(f"cannot read the text {path}: {'it is no file' if path.exists() else 'it does not exist'}")
    return path


def _refuse_both(option: str, given: object) -> None:
    if given is not None:
        raise OptionError(f"{option} is for language models, --images for image networks: give one of them")


def _brings(parts: dict[str, list[str]]) -> str:
    def listed(names: list[str]) -> str:
        return ", ".join(names) if len(names) <= 24 else f"{len(names)} of them"

    return "; ".join(f"{kind}: {listed(names)}" for kind, names in parts.items())


def print_json(data: object) -> None:
    """Print what a command found on stdout."""
    typer.echo(json.dumps(data, indent=2))


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    # Without a terminal, rich would cut the columns to 80.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
