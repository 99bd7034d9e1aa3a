"""The store: what is committed stays, whatever happens."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sqlite3

import pytest

from spikeplug.errors import BundleError, OptionError
from spikeplug_bench.store import DONE, SCHEMA, Row, Run, Store


def _row(id: str, status: str = DONE, **more) -> Row:
    empty = {"metrics": {"x": 0.1}, "timing": {}, "protocol": {"a": "b"}, "detail": {}, "config": {}, "versions": {}}
    return Row(
        id=id, point="p", name="n", status=status, cell={"steps": 4}, inputs={}, code="c", hardware={}, seed=0,
        started="now", seconds=1.5, **{**empty, **more},
    )  # fmt: skip


def test_rows_come_back_as_they_went_in(tmp_path):
    store = Store(tmp_path / "a.db")
    rows = [_row("1"), _row("2", "error", error="é \n")]
    for row in rows:
        store.put(row)
    run = Run("now", "s", 1, {"format": 1}, {"steps": [4]}, {"2": "a", "1": "b", "0": "c"})
    store.record(run)
    store.close()
    again = Store(tmp_path / "a.db", read_only=True)
    assert again.rows() == rows
    assert again.rows(["2", "0", "1"]) == rows[::-1]
    assert again.runs() == [run]
    assert again.statuses() == {"1": (DONE, "c"), "2": ("error", "c")}


def test_a_finished_row_is_kept_and_an_unfinished_one_is_not(tmp_path):
    store = Store(tmp_path / "a.db")
    store.put(_row("1", "error"))
    store.put(_row("1", metrics={"x": 1}))
    store.put(_row("1", metrics={"x": 2}))
    assert store.rows()[0].metrics == {"x": 1}
    store.put(_row("1", metrics={"x": 3}), replace=True)
    assert store.rows()[0].metrics == {"x": 3}


def test_what_is_no_store_of_ours_is_left_alone(tmp_path):
    newer, other, text = tmp_path / "newer.db", tmp_path / "other.db", tmp_path / "text.db"
    Store(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA + 1}")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    text.write_text("no database, and longer than the head of one " * 20)
    for path, says in ((newer, "newer spikeplug-bench"), (other, "no store of results"), (text, "no store of results")):
        before = path.read_bytes()
        with pytest.raises(BundleError, match=says):
            Store(path)
        assert path.read_bytes() == before
    with pytest.raises(OptionError, match="there is no store"):
        Store(tmp_path / "none.db", read_only=True)
    with pytest.raises(OptionError, match="its folder does not exist"):
        Store(tmp_path / "no" / "a.db")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(Store, "_open", refuse)
    with pytest.raises(OptionError, match=r"cannot open the store .*readonly"):
        Store(tmp_path / "a.db")


def test_a_full_disk_costs_no_committed_row(tmp_path):
    store = Store(tmp_path / "a.db")
    store.put(_row("1"))
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count={pages + 2}")

    def fill() -> None:
        for index in range(2, 100):
            store.put(_row(str(index), detail={"long": "x" * 4000}))

    with pytest.raises(BundleError, match=r"database or disk is full. What it held before is safe"):
        fill()
    kept = len(store.rows())
    store.close()
    again = Store(tmp_path / "a.db")
    assert len(again.rows()) == kept >= 1
    assert again._connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    again.put(_row("new"))


def test_a_store_that_is_damaged_is_one_line(tmp_path):
    path = tmp_path / "a.db"
    store = Store(path)
    for index in range(40):
        store.put(_row(str(index), detail={"long": "x" * 4000}))
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:40960] + b"\xff" * (len(whole) - 40960))
    with pytest.raises(BundleError, match=r"cannot read the store .*\.recover"):
        Store(path, read_only=True).rows()


def test_a_store_in_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.db"
    store = Store(path)
    store.put(_row("1"))
    store.close()
    really = Store._open

    def refuse(self, read_only, how):
        if how == "mode=ro":
            raise sqlite3.OperationalError("attempt to write a readonly database")
        really(self, read_only, how)

    monkeypatch.setattr(Store, "_open", refuse)
    assert Store(path, read_only=True).rows() == [_row("1")]
    # What is in a log that cannot be read would be missing.
    (tmp_path / "a.db-wal").write_bytes(b"x")
    with pytest.raises(OptionError, match="readonly"):
        Store(path, read_only=True)


def _write(path: str, worker: int, rows: int) -> None:
    store = Store(path)
    for index in range(rows):
        store.put(_row(f"{worker}-{index}"))
        store.put(_row(f"shared-{index}"))


def test_eight_processes_lose_nothing(tmp_path):
    path, rows = tmp_path / "a.db", 12
    context = multiprocessing.get_context("fork")  # a test module cannot be imported by a new process
    workers = [context.Process(target=_write, args=(path, worker, rows)) for worker in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    found = Store(path).rows()
    assert len(found) == 9 * rows
    assert all(dataclasses.replace(row, id="") == _row("") for row in found)
