"""One function runs a cell, JSON in and JSON out, in this process or in any other."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.errors import SpikeplugError

from .identity import cell_id, code_digest, inputs, point_of, versions
from .spec import Cell
from .store import DONE

HALVINGS = 3
"""How often a batch that does not fit into memory is halved."""


def spec_of(cell: Cell, data: Path, cache: Path) -> dict[str, Any]:
    """What `run_cell` takes. Raises OptionError where a file that the cell reads is missing."""
    return {
        "id": cell_id(cell, data),
        "cell": cell.model_dump(mode="json"),
        "versions": versions(cell) | {"python": platform.python_version()},
        "inputs": inputs(cell, data),
        "code": code_digest(),
        "data": str(data),
        "cache": str(cache),
    }


def run_cell(text: str, watch: Watch = unwatched) -> str:
    """Run a cell; what goes wrong in it becomes its status and error, and does not leave.

    Args:
        text: JSON of `spec_of`.

    Returns:
        JSON of a `store.Row`.
    """
    spec = json.loads(text)
    cell = Cell.model_validate(spec["cell"])
    if cell.ranks > 1 and "RANK" not in os.environ:
        return _under_torchrun(spec, cell, watch)
    return json.dumps(_run(spec, cell, watch), allow_nan=True)


def _run(spec: dict[str, Any], cell: Cell, watch: Watch) -> dict[str, Any]:
    started, start = datetime.datetime.now(datetime.UTC), time.perf_counter()
    row = empty_row(spec) | {"started": started.isoformat(timespec="seconds")}
    try:
        found, batch_size = _measured(spec, cell, watch)
        row |= {
            "status": DONE,
            "metrics": _plain(found.metrics),
            "timing": _plain(found.timing),
            "protocol": _plain(found.protocol),
            "detail": _plain(found.detail),
            "config": found.config,
        }
        if batch_size is not None:
            row["protocol"]["batch_size"] = f"{batch_size}, halved: larger ones did not fit into memory"
    except Exception as error:  # whatever it is, the sweep goes on and the row says it
        row |= _failed(error)
    row["hardware"] = _hardware(cell.device)
    row["seconds"] = time.perf_counter() - start
    return row


def empty_row(spec: dict[str, Any]) -> dict[str, Any]:
    """A row of a cell of which nothing is known yet."""
    cell = Cell.model_validate(spec["cell"])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "id": spec["id"],
        "point": point_of(cell),
        "name": cell.name,
        "status": "error",
        "cell": spec["cell"],
        "metrics": {},
        "timing": {},
        "protocol": {},
        "detail": {},
        "config": {},
        "versions": spec["versions"],
        "inputs": spec["inputs"],
        "code": spec["code"],
        "hardware": {},
        "seed": cell.seed,
        "started": now,
        "seconds": 0.0,
        "error": "",
    }


def _measured(spec: dict[str, Any], cell: Cell, watch: Watch) -> tuple[Any, int | None]:
    """What the task finds, and the batch size where it had to be halved."""
    from .networks import Context
    from .tasks import measure

    halved: int | None = None
    halvings = 0 if "RANK" in os.environ else HALVINGS  # ranks must stay in step
    for attempt in range(halvings + 1):
        try:
            return measure(Context(cell, spec["id"], Path(spec["data"]), Path(spec["cache"]), watch)), halved
        except Exception as error:
            size = getattr(cell.task, "batch_size", 1)
            if not _out_of_memory(error) or size < 2 or attempt == halvings:
                raise
            halved = size // 2
        _free()
        cell = cell.model_copy(update={"task": cell.task.model_copy(update={"batch_size": halved})})
    raise AssertionError("unreachable")


def _failed(error: Exception) -> dict[str, str]:
    return {"status": "oom" if _out_of_memory(error) else "error", "error": _said(error)}


def _out_of_memory(error: BaseException) -> bool:
    import torch

    if error.__cause__ is not None and _out_of_memory(error.__cause__):
        return True
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, SpikeplugError) else f"{type(error).__name__}: {text or 'no message'}"


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """The same through JSON, so that a row is equal whatever process it comes from."""
    plain: dict[str, Any] = json.loads(json.dumps(found, default=float))
    return plain


def _hardware(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"machine": platform.machine(), "cpu": _cpu(), "threads": torch.get_num_threads()}
    if device != "cpu" and torch.cuda.is_available():
        found["accelerators"] = sorted({torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())})
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _under_torchrun(spec: dict[str, Any], cell: Cell, watch: Watch) -> str:
    """A cell of several ranks: `torchrun` runs them, the first one's row counts."""
    from .networks import Context, convert_for_ranks

    try:
        if cell.model is not None and cell.model.parallel != "data":
            convert_for_ranks(Context(cell, spec["id"], Path(spec["data"]), Path(spec["cache"]), watch))
    except Exception as error:
        return json.dumps(empty_row(spec) | _failed(error))
    # Nothing is ever written to this pipe: ranks end when this process, and with it the other end, is gone.
    ours, theirs = os.pipe()
    with os.fdopen(ours) as stdin, os.fdopen(theirs, "w"), tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "cell.json", Path(folder) / "row.json"
        given.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.ranks}"]
        command += ["-m", "spikeplug_bench.cell", str(given), str(out)]
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, check=False)
        if out.is_file():
            return out.read_text()
        last = [line for line in done.stderr.splitlines() if "Error" in line][:1] or done.stderr.splitlines()[-1:]
        return json.dumps(empty_row(spec) | {"status": "died", "error": f"torchrun {cell.ranks}: {''.join(last)}"})


def end_with(gone: Callable[[], object]) -> None:
    """End this process as soon as a call returns: nothing runs on behind a driver that was killed."""

    def watch() -> None:
        gone()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main() -> None:
    end_with(sys.stdin.read)
    given, out = map(Path, sys.argv[1:])
    row = run_cell(given.read_text())
    if os.environ.get("RANK", "0") == "0":
        out.write_text(row)
    # A rank that fails must end, or the others would wait for it.
    sys.exit(json.loads(row)["status"] != DONE)


if __name__ == "__main__":
    _main()
