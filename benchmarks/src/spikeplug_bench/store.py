"""The store: one SQLite file, one row for each cell, written by the driver alone and committed as a row arrives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikeplug.errors import BundleError, OptionError

SCHEMA = 1
"""Version of the tables, in `PRAGMA user_version`."""

DONE = "done"
STATUSES = (DONE, "error", "oom", "died")
"""`oom`: out of memory, also after smaller batches; `died`: the process that ran it ended."""

_TABLES = """
CREATE TABLE cells (
    id TEXT PRIMARY KEY,
    point TEXT NOT NULL,
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    cell TEXT NOT NULL,
    metrics TEXT NOT NULL,
    timing TEXT NOT NULL,
    protocol TEXT NOT NULL,
    detail TEXT NOT NULL,
    config TEXT NOT NULL,
    versions TEXT NOT NULL,
    inputs TEXT NOT NULL,
    code TEXT NOT NULL,
    hardware TEXT NOT NULL,
    seed INTEGER NOT NULL,
    started TEXT NOT NULL,
    seconds REAL NOT NULL,
    error TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX cells_point ON cells (point);
CREATE TABLE runs (
    number INTEGER PRIMARY KEY,
    started TEXT NOT NULL,
    suite TEXT NOT NULL,
    version INTEGER NOT NULL,
    definition TEXT NOT NULL,
    overrides TEXT NOT NULL,
    cells TEXT NOT NULL
);
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a cell.

    Attributes:
        metrics: figures that a second run gives again; `timing`: those that it does not.
        protocol: how they were measured.
        detail: by site or by task.
        config: the conversion with every choice resolved.
        code: SHA-256 of the source of core and plugins.
    """

    id: str
    point: str
    name: str
    status: str
    cell: dict[str, Any]
    metrics: dict[str, Any]
    timing: dict[str, Any]
    protocol: dict[str, Any]
    detail: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, str]
    code: str
    hardware: dict[str, Any]
    seed: int
    started: str
    seconds: float
    error: str = ""


@dataclasses.dataclass
class Measured:
    """What a task found: see `Row`."""

    metrics: dict[str, Any]
    protocol: dict[str, Any]
    timing: dict[str, Any] = dataclasses.field(default_factory=dict)
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `spikeplug bench run`: which suite, with what changes, its cells' ids in order and models' names."""

    started: str
    suite: str
    version: int
    definition: dict[str, Any]
    overrides: dict[str, Any]
    cells: dict[str, str]


_COLUMNS = [field.name for field in dataclasses.fields(Row)]
_JSON = [field.name for field in dataclasses.fields(Row) if str(field.type).startswith("dict")]


class Store:
    """Rows in a SQLite file in WAL mode, each one on disk before `put` returns.

    Several drivers may use one file on one host; SQLite's WAL does not work on network file systems.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open a store, or make one.

        Raises:
            OptionError: there is none to read, or its folder cannot be written.
            BundleError: the file is no store, or one of a newer version.
        """
        self.path = path
        if read_only and not path.is_file():
            raise OptionError(f"there is no store {path}: `spikeplug bench run SUITE --store {path}` makes one")
        if not read_only and not path.parent.is_dir():
            raise OptionError(f"cannot write the store {path}: its folder does not exist")
        try:
            try:
                self._open(read_only, "mode=ro" if read_only else "mode=rwc")
            except sqlite3.OperationalError:
                # SQLite reads a WAL store only where it can write beside it, unless it is told that nobody else writes.
                log = path.with_name(f"{path.name}-wal")
                if not read_only or (log.exists() and log.stat().st_size):
                    raise
                self._open(read_only, "immutable=1")
        except sqlite3.OperationalError as error:
            raise OptionError(f"cannot open the store {path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise BundleError(f"{path} is no store of results: {error}") from None

    def _open(self, read_only: bool, how: str) -> None:
        where = f"{self.path.absolute().as_uri()}?{how}"
        self._connection = sqlite3.connect(where, uri=True, timeout=60, isolation_level=None)
        self._connection.execute("PRAGMA synchronous=FULL")
        if self._version() == 0 and read_only:
            raise BundleError(f"{self.path} is no store of results")
        if self._version() == 0:
            with self._transaction():
                # Another driver may have made the tables in the meantime.
                if self._version() == 0:
                    self._make()
        if self._version() > SCHEMA:
            raise BundleError(
                f"{self.path} was written by a newer spikeplug-bench (store version {self._version()}, this one reads "
                f"{SCHEMA}): pip install --upgrade spikeplug-bench"
            )
        if not read_only:
            self._to_wal()

    def _version(self) -> int:
        version: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
        return version

    def _make(self) -> None:
        if self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise BundleError(f"{self.path} is a database, but no store of results")
        for statement in _TABLES.split(";"):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA user_version={SCHEMA}")

    def _to_wal(self) -> None:
        """Change the journal, which SQLite does not wait for where another driver reads in that moment."""
        for _ in range(600):
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                time.sleep(0.1)
        raise OptionError(f"cannot open the store {self.path}: another process has locked it for a minute")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise BundleError(
                f"cannot write to the store {self.path}: {error}. What it held before is safe; the same command goes on"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def put(self, row: Row, *, replace: bool = False) -> None:
        """Store a row; one that is done is kept, unless `replace` and the new one is done too.

        Raises:
            BundleError: it cannot be written, as where the disk is full; earlier rows are safe.
        """
        values = [json.dumps(v) if key in _JSON else v for key, v in dataclasses.asdict(row).items()]
        marks = ", ".join("?" * len(_COLUMNS))
        with self._transaction():
            kept = self._connection.execute("SELECT status FROM cells WHERE id = ?", (row.id,)).fetchone()
            if kept is None or kept[0] != DONE or (replace and row.status == DONE):
                self._connection.execute(
                    f"INSERT OR REPLACE INTO cells ({', '.join(_COLUMNS)}) VALUES ({marks})", values
                )

    def record(self, run: Run) -> None:
        """Note that a suite was run. Raises BundleError."""
        values = (run.started, run.suite, run.version, *map(json.dumps, (run.definition, run.overrides, run.cells)))
        columns = "started, suite, version, definition, overrides, cells"
        with self._transaction():
            self._connection.execute(f"INSERT INTO runs ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)

    def runs(self) -> list[Run]:
        """All runs, oldest first. Raises BundleError where the file is damaged."""
        columns = "started, suite, version, definition, overrides, cells"
        found = self._read(f"SELECT {columns} FROM runs ORDER BY number")
        return [Run(*row[:3], *map(json.loads, row[3:])) for row in found]

    def rows(self, ids: Sequence[str] | None = None) -> list[Row]:
        """Rows of these ids that there are, in their order; by default all. Raises BundleError."""
        found = self._read(f"SELECT {', '.join(_COLUMNS)} FROM cells ORDER BY name, id")
        rows = {row[0]: self._row(row) for row in found}
        return list(rows.values()) if ids is None else [rows[each] for each in ids if each in rows]

    def named(self, names: Mapping[str, str]) -> list[Row]:
        """Rows of a suite, whose names of models by id these are: another suite may have measured a row. As `rows`."""
        return [dataclasses.replace(row, name=names[row.id]) for row in self.rows(list(names))]

    def statuses(self) -> dict[str, tuple[str, str]]:
        """Id -> status and code of every row. Raises BundleError."""
        return {row[0]: (row[1], row[2]) for row in self._read("SELECT id, status, code FROM cells")}

    def points(self) -> dict[str, list[dict[str, str]]]:
        """Point of a suite -> versions of every row of it that is done. Raises BundleError."""
        found: dict[str, list[dict[str, str]]] = {}
        for point, versions in self._read("SELECT point, versions FROM cells WHERE status = ?", (DONE,)):
            found.setdefault(point, []).append(json.loads(versions))
        return found

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise BundleError(
                f"cannot read the store {self.path}: {error}. `sqlite3 {self.path} .recover` saves what can be read"
            ) from None

    def _row(self, values: Sequence[Any]) -> Row:
        given = dict(zip(_COLUMNS, values, strict=True))
        return Row(**{key: json.loads(value) if key in _JSON else value for key, value in given.items()})
