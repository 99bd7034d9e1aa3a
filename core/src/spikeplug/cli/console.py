"""What the commands share: their common options, progress, and how they print."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeplug import plugins as registry
from spikeplug.errors import ConversionError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spikeplug.conversion.architecture import LanguageArchitecture

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
    from spikeplug.conversion.architecture import LanguageArchitecture

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


def need_file(path: Path | None, wanted: str) -> Path:
    """Refuse a missing text before a model is loaded for it."""
    if path is None:
        raise OptionError(f"what to work on is missing: give {wanted}")
    if not path.is_file():
        raise OptionError(f"cannot read the text {path}: {'it is no file' if path.exists() else 'it does not exist'}")
    return path


def refuse_both(option: str, given: object) -> None:
    if given is not None:
        raise OptionError(f"{option} is for language models, --images for image networks: give one of them")


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
