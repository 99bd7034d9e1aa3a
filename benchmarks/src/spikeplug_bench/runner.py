"""Runs a suite: what is left to do, on an engine, into a store."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikeplug.conversion.architecture import Watch, unwatched

from .cell import spec_of
from .cells import cells
from .engines import Engine, Local
from .identity import code_digest, fingerprint, point_of
from .spec import Cell
from .store import DONE, Row, Run, Store
from .suite import Axis, Suite


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cells of a suite and what the store has of them.

    Attributes:
        specs: what `run_cell` takes, by id, in order.
        finished: ids that are done.
        stale: finished ones that were measured with other source code of the same version.
        otherwise: ids that are not done, but as the same point of a suite are: with other versions or other files.
        changed: versions that differ there, as `torch 2.10.0 -> 2.11.0`.
    """

    specs: dict[str, dict[str, Any]]
    finished: frozenset[str]
    stale: frozenset[str]
    otherwise: frozenset[str] = frozenset()
    changed: tuple[str, ...] = ()

    @property
    def left(self) -> list[str]:
        """Ids that are to be run."""
        return [each for each in self.specs if each not in self.finished]

    def cell(self, id: str) -> Cell:
        """The cell of an id."""
        return Cell.model_validate(self.specs[id]["cell"])


def plan(suite: Suite, store: Store | None, data: Path, change: Axis | None = None, *, cache: Path) -> Plan:
    """What there is to do.

    Args:
        store: None where there is none yet.
        data: folder that the suite's paths are relative to.
        change: axes in the place of the suite's, as of `overrides`.
        cache: folder for what may be kept between cells.

    Raises:
        SpikeplugError: a cell cannot be what it says.
    """
    fingerprint.cache_clear()  # files may be others than at an earlier call in this process
    specs = {spec["id"]: spec for spec in (spec_of(cell, data, cache) for cell in cells(suite, change))}
    statuses = store.statuses() if store else {}
    finished = {each for each in specs if statuses.get(each, ("",))[0] == DONE}
    stale = {each for each in finished if statuses[each][1] != code_digest()}
    known = store.points() if store else {}
    points = {each: point_of(Cell.model_validate(specs[each]["cell"])) for each in specs if each not in finished}
    otherwise = {each: known[point] for each, point in points.items() if point in known}
    changed = {
        f"{name} {then.get(name, 'none')} -> {now}"
        for each, others in otherwise.items()
        for then in others
        for name, now in specs[each]["versions"].items()
        if then.get(name) != now
    }
    return Plan(specs, frozenset(finished), frozenset(stale), frozenset(otherwise), tuple(sorted(changed)))


def run(
    suite: Suite,
    store: Store,
    data: Path,
    *,
    change: Axis | None = None,
    planned: Plan | None = None,
    engine: Engine | None = None,
    force: bool = False,
    arrived: Callable[[Row], None] = lambda row: None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Run the cells of a suite that the store has not finished, and return the rows of all of them, in order.

    Every row is on disk before the next one is waited for, so whatever ends this process loses running cells alone, and
    the same call goes on.

    Args:
        data: folder that the suite's paths are relative to.
        change: axes in the place of the suite's, as of `overrides`.
        planned: what `plan` said of all of these, if it was asked before.
        engine: where cells run; by default in this process.
        force: run finished cells again.
        arrived: called with every row that comes in.
        watch: follows the running cell.

    Raises:
        SpikeplugError: the suite cannot be run, or the store cannot be written.
    """
    engine = engine or Local()
    found = planned or plan(suite, store, data, change, cache=cache_of(store.path))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    definition = suite.model_dump(mode="json")
    names = {each: spec["cell"]["name"] for each, spec in found.specs.items()}
    store.record(Run(now, suite.name, suite.version, definition, change or {}, names))
    wanted = list(found.specs) if force else found.left
    if force:
        for each in wanted:
            for file in cache_of(store.path).glob(f"answers-{each[:32]}*"):
                file.unlink()
    try:
        for text in engine.run([json.dumps(found.specs[each]) for each in wanted], watch):
            row = Row(**json.loads(text))
            store.put(row, replace=force)
            arrived(row)
    finally:
        engine.close()
    return store.named(names)


def cache_of(store: Path) -> Path:
    """Folder beside a store for what may be kept between cells: calibration statistics, answers of a model."""
    return store.absolute().parent / f"{store.stem}-cache"
