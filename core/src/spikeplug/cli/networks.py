"""The commands that work on networks: `convert`, `eval`, `train` and `export`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeplug import plugins as registry
from spikeplug.errors import OptionError

from .console import (
    Device,
    Dtype,
    Images,
    Json,
    Model,
    language,
    need_file,
    print_json,
    print_table,
    progress,
    refuse_both,
    settings,
    vision,
)

if TYPE_CHECKING:
    from spikeplug.config import ConversionConfig
    from spikeplug.conversion.report import ConversionReport


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
    statistics: Annotated[
        Path | None, typer.Option(help="File to keep what sites saw in; read where it exists, for another recipe.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what speaks against it; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Convert a network and write the spiking one to a folder: a language model, or with --images an image network."""
    from spikeplug.config import ConversionConfig
    from spikeplug.conversion.bundle import check_writable, save
    from spikeplug.conversion.verbs import convert, report

    config, beside = ConversionConfig.resolve(recipe, settings(setting)), dict[str, Any]()
    if dry_run:
        _plan(model, recipe, config, images, weights, dtype, as_json)
        return
    if out is None:
        raise OptionError("where to write is missing: give --out FOLDER, or --dry-run to write nothing")
    check_writable(out, overwrite=force)
    if images is not None:
        refuse_both("--calibrate", calibrate)
        with progress() as watch:
            spiking = vision().convert(
                model, recipe, config, images, weights=weights, count=count, statistics=statistics, watch=watch
            )
    else:
        text = need_file(calibrate, "--calibrate TEXT, or --images for an image network")
        architecture = language()
        opened = architecture.open(model, dtype=dtype, device=device)
        batches = architecture.calibration(opened, text, seqlen=seqlen, tokens=calibrate_tokens, config=config)
        dense, beside["tokenizer"] = opened.model, opened.tokenizer
        with progress() as watch:
            spiking = convert(dense, config, calibration=batches, statistics=statistics, inplace=True, watch=watch)
    save(spiking, out, overwrite=force, **beside)
    _say_converted(report(spiking), config, out, as_json)


def _say_converted(found: ConversionReport, config: ConversionConfig, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(out), "config": config.model_dump(mode="json"), "report": found.to_dict()})
    else:
        typer.echo(str(found).splitlines()[0])
        typer.echo(f"wrote {out}")


def _plan(
    model: str, recipe: str, config: Any, images: Path | None, weights: Path | None, dtype: str, as_json: bool
) -> None:
    """Print what a conversion would make of a network; end with status 1 where something speaks against it."""
    from spikeplug.conversion.verbs import plan

    if images is None:
        found = plan(language().open(model, dtype=dtype, device="cpu").model, config)
    else:
        found = vision().planned(model, recipe, config, images, weights=weights)
    if as_json:
        print_json(found.summary())
    else:
        typer.echo(str(found))
    if found.problems:
        raise typer.Exit(1)


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
        refuse_both("--ppl", ppl)
        _eval_images(model, images, weights, count, batch, framework, execution, device, as_json)
        return
    ppl = need_file(ppl, "--ppl TEXT, or --images for an image network")
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

    from spikeplug.conversion.bundle import check_writable, save

    built = registry.get_trainer(trainer, **settings(setting))
    check_writable(out, overwrite=force)
    need_file(text, "--text TEXT")
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
