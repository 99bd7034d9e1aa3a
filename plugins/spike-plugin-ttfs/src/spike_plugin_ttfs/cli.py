"""The command `spikeplug explain`. It imports what is heavy when it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikeplug.cli import print_json, print_table

if TYPE_CHECKING:
    from .explain import SiteBound


def explain_command(
    model: Annotated[Path, typer.Argument(help="A folder that `spikeplug convert` wrote.")],
    error: Annotated[float, typer.Option(help="Wanted largest error, as a share of the largest magnitude.")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say site by site how large the error of a first-spike code can be, and what number of steps makes it small."""
    from spikeplug.conversion.bundle import load

    from .explain import explain

    found = explain(load(model), error)
    if as_json:
        print_json({"error": error, "sites": [{**dataclasses.asdict(each), "total": each.total} for each in found]})
        return
    head = ["site", "T", "seen", "code's range", "clipping", "quantization", f"T for {error:g}"]
    print_table(head, [_row(each) for each in found])
    clipped = sum(each.clipping > each.quantization for each in found)
    typer.echo(
        "largest |error| of a number within what calibration saw is at most clipping + quantization (Theorem 3); "
        f"clipping is the larger part at {clipped} of {len(found)} sites"
    )


def _row(each: SiteBound) -> list[str]:
    seen, span = f"{each.low:.4g} .. {each.high:.4g}", f"{each.a:.4g} .. {each.b:.4g}"
    needed = "too many" if each.needed is None else str(each.needed)
    return [each.site, str(each.steps), seen, span, f"{each.clipping:.3g}", f"{each.quantization:.3g}", needed]
