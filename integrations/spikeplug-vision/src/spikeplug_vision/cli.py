"""The command `spikeplug diagnose`. It imports what is heavy when it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from spikeplug.cli import print_json, print_table
from spikeplug.errors import OptionError


def diagnose_command(
    model: Annotated[str, typer.Argument(help="A folder of an image network that `spikeplug convert` wrote.")],
    images: Annotated[Path, typer.Option(help="A folder of images, a CIFAR root, an ImageNet root.")],
    count: Annotated[int, typer.Option(help="Images to run.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say where an image network loses what: site by site, beside its dense counterpart."""
    from spikeplug_vision.images import Vision

    if count < 1:
        raise OptionError(f"--count {count}: at least 1 is needed")
    found = Vision().diagnose(model, images, count)
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
        return
    head = ["site", "kind", "spikes a neuron", "negative", "error", "left, mean", "left, 99.9 %"]
    rows = []
    for each in found:
        left = ["-" if value is None else f"{value:.3f}" for value in (each.residual, each.residual_999)]
        rows.append([each.site, each.kind, f"{each.spikes:.2f}", f"{each.negative:.1%}", f"{each.error:.4f}", *left])
    print_table(head, rows)
