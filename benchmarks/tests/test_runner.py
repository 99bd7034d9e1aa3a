"""Running: what is left is run, what fails is a row, what ends the process costs nothing that was finished."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spikeplug.cli import main
from spikeplug.errors import OptionError
from spikeplug_bench import engines, runner, tasks
from spikeplug_bench.cell import run_cell, spec_of
from spikeplug_bench.spec import Cell
from spikeplug_bench.store import DONE, Store
from spikeplug_bench.suite import overrides, parse_suite
from spikeplug_bench.tables import tables

MODEL = {"source": "no model, so that its cells fail", "calibration": {"text": "t.txt"}}
CLI = [sys.executable, "-m", "spikeplug", "bench"]


def _metrics(rows):
    return {row.id: (row.status, row.metrics, row.protocol, row.detail) for row in rows}


def test_a_second_run_has_nothing_to_do_and_force_does_it_again(codes, tmp_path):
    store, arrived = Store(tmp_path / "a.db"), []
    first = runner.run(codes, store, tmp_path, arrived=arrived.append)
    assert len(first) == len(arrived) == 6
    assert {row.status for row in first} == {DONE}
    assert runner.run(codes, store, tmp_path, arrived=arrived.append) == first
    assert len(arrived) == 6
    again = runner.run(codes, store, tmp_path, arrived=arrived.append, force=True)
    assert len(arrived) == 12
    assert _metrics(again) == _metrics(first)


def test_one_seed_gives_the_same_figures_and_another_gives_others(codes, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rows = runner.run(codes, Store(tmp_path / f"{name}.db"), tmp_path, change=overrides([f"seed={seed}"]))
        found.append([row.metrics for row in rows])
    assert found[0] == found[1]
    assert all(a["mse"] != b["mse"] for a, b in zip(found[0], found[2], strict=True))


def test_a_cell_that_fails_is_a_row_and_is_tried_again(codes, tmp_path, monkeypatch):
    store = Store(tmp_path / "a.db")
    whole = tasks._MEASURES["reconstruction"]

    def fails(context, task):
        if context.cell.steps == 4:
            raise RuntimeError("this one\nbreaks")
        return whole(context, task)

    monkeypatch.setitem(tasks._MEASURES, "reconstruction", fails)
    rows = runner.run(codes, store, tmp_path)
    bad = [row for row in rows if row.status != DONE]
    assert len(rows) == 6
    assert [(row.status, row.error) for row in bad] == [("error", "RuntimeError: this one breaks")] * 2
    assert "error: RuntimeError: this one breaks" in str([table.rows for table in tables(codes, rows)])
    monkeypatch.undo()
    arrived = []
    assert {row.status for row in runner.run(codes, store, tmp_path, arrived=arrived.append)} == {DONE}
    assert len(arrived) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory")])
def test_what_does_not_fit_is_halved_and_said(error, tmp_path, monkeypatch):
    sizes = []

    def measure(context):
        sizes.append(context.cell.task.batch_size)
        if sizes[-1] > fits:
            raise error
        return tasks.Measured({"x": 1.0}, {"batch_size": sizes[-1]})

    monkeypatch.setattr(tasks, "measure", measure)
    (tmp_path / "images").mkdir()
    task = {"kind": "accuracy", "images": "images"}
    given = {"name": "a", "model": {"source": "m:f"}, "recipe": "dense", "task": task}
    spec = json.dumps(spec_of(Cell.model_validate(given), tmp_path, tmp_path))
    fits = 4
    row = json.loads(run_cell(spec))
    assert sizes == [16, 8, 4]
    assert row["status"] == DONE
    assert row["protocol"]["batch_size"].startswith("4, halved")
    fits, sizes[:] = 0, []
    row = json.loads(run_cell(spec))
    assert row["status"] == "oom"
    assert sizes == [16, 8, 4, 2]


def test_a_device_that_is_not_there_is_a_row(shapes_like, tmp_path):
    row = json.loads(run_cell(json.dumps(spec_of(shapes_like, tmp_path, tmp_path))))
    assert row["status"] == "error"
    assert row["hardware"]["cpu"]


def test_a_forced_run_that_fails_keeps_what_was_done(codes, tmp_path, monkeypatch):
    store = Store(tmp_path / "a.db")
    first = runner.run(codes, store, tmp_path)
    monkeypatch.setitem(tasks._MEASURES, "reconstruction", lambda context, task: 1 / 0)
    arrived = []
    assert runner.run(codes, store, tmp_path, force=True, arrived=arrived.append) == first
    assert {row.error for row in arrived} == {"ZeroDivisionError: division by zero"}


def test_changed_code_is_said_and_not_mixed_silently(codes, tmp_path, monkeypatch):
    store = Store(tmp_path / "a.db")
    runner.run(codes, store, tmp_path)
    plan = runner.plan(codes, store, tmp_path, cache=tmp_path)
    assert not plan.stale
    assert not plan.left
    monkeypatch.setattr(runner, "code_digest", lambda: "other")
    assert len(runner.plan(codes, store, tmp_path, cache=tmp_path).stale) == 6


def test_other_versions_are_other_cells(codes, tmp_path, monkeypatch):
    store = Store(tmp_path / "a.db")
    runner.run(codes, store, tmp_path)
    monkeypatch.setattr("spikeplug_bench.identity._version", lambda name: "9.9")
    plan = runner.plan(codes, store, tmp_path, cache=tmp_path)
    assert len(plan.left) == len(plan.otherwise) == 6
    assert "torch 9.9" not in plan.changed
    assert any(each.startswith("torch ") and each.endswith(" -> 9.9") for each in plan.changed)
    runner.run(codes, store, tmp_path)
    assert not runner.plan(codes, store, tmp_path, cache=tmp_path).otherwise
    rows = store.rows()
    assert len(rows) == 12
    assert len({row.point for row in rows}) == 6


def test_a_file_that_changes_between_two_calls_is_seen(tmp_path):
    grid = {"model": "net", "recipe": "dense", "task": {"kind": "accuracy", "images": "images"}}
    suite = parse_suite({"format": 1, "name": "a", "title": "a", "models": {"net": {"source": "m:f"}}, "grids": [grid]})
    (tmp_path / "images").mkdir()
    found = set()
    for text in ("one", "two", "one"):
        (tmp_path / "images" / "a.png").write_text(text)
        found |= set(runner.plan(suite, None, tmp_path, cache=tmp_path).specs)
    assert len(found) == 2


@pytest.fixture
def shapes_like():
    """A cell on a device that no machine has."""
    model = {"source": "spikeplug_bench.embedded:shapes_cnn"}
    task = {"kind": "accuracy", "images": "."}
    return Cell.model_validate({"name": "a", "model": model, "recipe": "dense", "task": task, "device": "nowhere"})


# Engines


def test_processes_give_what_one_process_gives(codes, tmp_path):
    one = runner.run(codes, Store(tmp_path / "a.db"), tmp_path)
    two = runner.run(codes, Store(tmp_path / "b.db"), tmp_path, engine=engines.Processes(jobs=2))
    assert _metrics(one) == _metrics(two)


def test_timed_cells_run_alone_and_last(monkeypatch):
    def spec(name, kind):
        return json.dumps({"id": name, "cell": {"task": {"kind": kind}}})

    engine, together = engines.Processes(jobs=2), []
    monkeypatch.setattr(engine, "_together", lambda specs: iter(together.extend(specs) or ["others"]))
    monkeypatch.setattr(engine, "_alone", lambda spec: f"alone {json.loads(spec)['id']}")
    specs = [spec("a", "throughput"), spec("b", "energy"), spec("c", "throughput")]
    assert list(engine.run(specs)) == ["others", "alone a", "alone c"]
    assert together == [specs[1]]


DYING = """
import json, os, signal
from spikeplug_bench import cell

def run_cell(text):
    if json.loads(text)["cell"]["steps"] == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return cell.run_cell(text)
"""


def test_a_process_that_dies_takes_no_other_cell_with_it(codes, tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engines, "run_cell", importlib.import_module("dying").run_cell)
    rows = runner.run(codes, Store(tmp_path / "a.db"), tmp_path, engine=engines.Processes(jobs=2))
    assert sorted(row.status for row in rows) == ["died"] * 2 + [DONE] * 4
    assert all(row.cell["steps"] == 8 for row in rows if row.status == "died")


ORPHAN = """
import os, time
from spikeplug_bench.engines import Processes

if __name__ == "__main__":
    pool = Processes(jobs=1)._pool(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processes_end_with_a_driver_that_is_killed(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    driver = subprocess.Popen([sys.executable, tmp_path / "orphan.py"], stdout=subprocess.PIPE, text=True)
    worker = int(driver.stdout.readline())
    assert _lives(worker)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 30
    while _lives(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _lives(worker)


def test_an_engine_without_its_package_says_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"pip install spikeplug-bench\[ray\]"):
        list(engines.Ray().run(["{}"]))


def test_slurm_jobs_give_what_one_process_gives(codes, tmp_path):
    pytest.importorskip("submitit")
    one = runner.run(codes, Store(tmp_path / "a.db"), tmp_path, change=overrides(["steps=2"]))
    slurm = engines.Slurm(folder=str(tmp_path / "logs"), cluster="local", minutes=5)
    two = runner.run(codes, Store(tmp_path / "b.db"), tmp_path, change=overrides(["steps=2"]), engine=slurm)
    assert _metrics(one) == _metrics(two)


# The end of the process


def _run(folder: Path, suite: Path, store: str, *more: str) -> list[str]:
    return [*CLI, "run", str(suite), "--store", str(folder / store), "--data", str(folder), *more]


def _killed(folder: Path, suite: Path, store: str, times: int, seed: int) -> int:
    """Start a run and kill it at random moments, so often; then let it end. Returns how often rows were kept."""
    path, kept = folder / store, 0
    pick = random.Random(seed)
    start = time.perf_counter()
    subprocess.run(_run(folder, suite, "warm.db"), check=True, capture_output=True)
    whole = time.perf_counter() - start
    for _ in range(times):
        process = subprocess.Popen(_run(folder, suite, store), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(pick.uniform(0.2, 1.0) * whole)
        process.kill()
        process.wait()
        if path.exists():
            before = {row.id: row for row in Store(path).rows()}
            kept += bool(before)
            after = {row.id: row for row in Store(path).rows()}
            assert before == after
    subprocess.run(_run(folder, suite, store), check=True, capture_output=True)
    return kept


def test_a_killed_run_goes_on(codes_file, tmp_path):
    _killed(tmp_path, codes_file, "a.db", 2, seed=0)
    assert _metrics(Store(tmp_path / "a.db").rows()) == _metrics(Store(tmp_path / "warm.db").rows())


@pytest.mark.slow
def test_twenty_kills_change_nothing(codes_file, tmp_path):
    assert _killed(tmp_path, codes_file, "a.db", 20, seed=1) > 0
    assert _metrics(Store(tmp_path / "a.db").rows()) == _metrics(Store(tmp_path / "warm.db").rows())


def test_eight_drivers_share_one_store(codes_file, tmp_path):
    command = _run(tmp_path, codes_file, "a.db")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment}
    drivers = [subprocess.Popen(command, **pipes) for _ in range(8)]
    for driver in drivers:
        _, said = driver.communicate()
        assert driver.returncode == 0, said
    store = Store(tmp_path / "a.db")
    assert len(store.rows()) == 6
    assert len(store.runs()) == 8


# The command line


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Runs `spikeplug bench` in this process, in a folder of its own; gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spikeplug", "bench", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run


def test_a_dry_run_runs_nothing(bench, codes_file, tmp_path):
    planned = json.loads(bench("run", codes_file, "--dry-run", "--json")[1])
    assert [each["status"] for each in planned] == ["to run"] * 6
    assert not (tmp_path / "spikeplug-bench.db").exists()
    bench("run", codes_file, "-s", "steps=4")
    forced = json.loads(bench("run", codes_file, "--dry-run", "--force", "--json")[1])
    assert [each["status"] for each in forced] == ["to run"] * 6


def test_data_of_the_runner_are_found_whatever_the_variable_says(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKEPLUG_DATA", str(tmp_path))
    monkeypatch.setattr("spikeplug_bench.embedded.prepare", lambda: tmp_path / "made")
    assert f"is not in the data folder {tmp_path / 'made'}" in bench("run", "smoke", "--dry-run")[2]
    assert f"is not in the data folder {tmp_path}:" in bench("run", "smoke", "--dry-run", "--data", tmp_path)[2]


def test_figures_of_another_suite_have_the_name_that_their_model_has_here(tmp_path):
    def suite(name: str):
        grid = {"model": name, "recipe": "dense", "task": {"kind": "perplexity", "text": "t.txt"}}
        return parse_suite({"format": 1, "name": name, "title": "T", "models": {name: MODEL}, "grids": [grid]})

    (tmp_path / "t.txt").write_text("a text")
    store = Store(tmp_path / "a.db")
    for name in ("one", "two"):
        assert [row.name for row in runner.run(suite(name), store, tmp_path)] == [name]
    assert len(store.rows()) == 1


def test_run_report_and_lists(bench, codes_file):
    rows = json.loads(bench("run", codes_file, "-s", "steps=4", "--limit", "100", "--json")[1])
    assert [row["cell"]["task"]["limit"] for row in rows] == [100, 100]
    code, out, said = bench("run", codes_file)
    assert code == 0
    assert "mean squared error" in out
    assert "6 of 6 cells" in said
    assert {each["status"] for each in json.loads(bench("run", codes_file, "--dry-run", "--json")[1])} == {"done"}
    assert "mean squared error" in bench("report")[1]
    assert "smoke" in bench("ls")[1]
    assert json.loads(bench("schema")[1])["title"] == "Suite"
    assert len(json.loads(bench("show", codes_file, "--json")[1])) == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "smok"], "did you mean 'smoke'"),
        (["run", "SUITE", "--engine", "rai"], "did you mean 'ray'"),
        (["run", "SUITE", "-o", "gpu=1"], "no such option"),
        (["run", "SUITE", "--address", "x", "--engine", "local"], "is for --engine ray"),
        (["run", "SUITE", "-j", "0"], "at least 1"),
        (["run", "SUITE", "-j", "2", "--engine", "local"], "one cell at a time"),
        (["run", "SUITE", "--engine", "ray", "-o", "gpus=abc"], "-o gpus=abc: Input should be a valid number"),
        (["run", "SUITE", "--data", "nowhere"], "no folder"),
        (["run", "SUITE", "--store", "no/a.db"], "folder does not exist"),
        (["run", "SUITE", "-s", "task.encoder=rte"], "unknown encoder 'rte'"),
        (["run", "SUITE", "-s", "step=2"], "did you mean 'steps'"),
        (["report", "none.db"], "there is no store"),
    ],
)
def test_bad_input_is_one_line(bench, codes_file, words, says):
    code, _, said = bench(*(codes_file if word == "SUITE" else word for word in words))
    assert code == 1
    assert says in said
    assert len(said.strip().splitlines()) == 1


def test_a_suite_that_fails_ends_with_a_status(bench, codes_file):
    code, _, said = bench("run", codes_file, "-s", "steps=4", "-s", "options.nonsense=1")
    assert code == 1
    assert "unknown option 'nonsense' of encoder 'rate'" in said
    assert "0 of 2 cells" in said


def test_help_needs_no_torch():
    code = "import sys; from spikeplug_bench import cli, suite, store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
