"""Engines: where cells run. Each takes what `run_cell` takes and gives its rows back as they arrive."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ClassVar

from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.errors import OptionError

from .cell import empty_row, end_with, run_cell


@dataclasses.dataclass
class Engine(ABC):
    """Base of engines, which the hook `spikeplug_engines` brings. Fields are options.

    Attributes:
        jobs: cells at a time.
    """

    name: ClassVar[str]
    jobs: int = 1

    @abstractmethod
    def run(self, specs: Sequence[str], watch: Watch = unwatched) -> Iterator[str]:
        """Rows, as JSON, in whatever order they arrive: one of every spec, also of one whose process ended.

        Args:
            specs: JSON of what `run_cell` takes.
            watch: follows the cell that runs, where the engine can tell.
        """

    def close(self) -> None:  # noqa: B027 - most engines leave nothing running
        """Stop what is running."""


def died(spec: str, why: str) -> str:
    """The row of a cell whose process ended."""
    return json.dumps(empty_row(json.loads(spec)) | {"status": "died", "error": why})


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


@dataclasses.dataclass
class Local(Engine):
    """One after the other, in this process."""

    name: ClassVar[str] = "local"

    def run(self, specs: Sequence[str], watch: Watch = unwatched) -> Iterator[str]:
        for spec in specs:
            yield run_cell(spec, watch)


TIMED = "throughput"


def _timed_apart(specs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cells that measure no time, and those that do, which beside others would measure those too."""
    found: tuple[list[str], list[str]] = ([], [])
    for spec in specs:
        found[json.loads(spec)["cell"]["task"]["kind"] == TIMED].append(spec)
    return found


@dataclasses.dataclass
class Processes(Engine):
    """In `jobs` processes of this machine. What one that dies was running is tried again alone.

    Cells that measure time come last and one at a time. Processes end with this one, however it ends.
    """

    name: ClassVar[str] = "processes"

    def run(self, specs: Sequence[str], watch: Watch = unwatched) -> Iterator[str]:
        others, timed = _timed_apart(specs)
        yield from self._together(others)
        for spec in timed:
            yield self._alone(spec)

    def _together(self, specs: Sequence[str]) -> Iterator[str]:
        waiting, suspects = list(specs), list[str]()
        while waiting:
            done: set[str] = set()
            with self._pool(self.jobs) as pool:
                futures = {pool.submit(run_cell, spec): spec for spec in waiting}
                try:
                    for future in concurrent.futures.as_completed(futures):
                        yield future.result()
                        done.add(futures[future])
                except BrokenProcessPool:
                    # Which of the running cells it was cannot be known: each of them is tried alone.
                    left = [spec for spec in waiting if spec not in done]
                    suspects, waiting = left[: self.jobs], left[self.jobs :]
                else:
                    waiting = []
                finally:
                    for future in futures:
                        future.cancel()
            for spec in suspects:
                yield self._alone(spec)
            suspects = []

    def _pool(self, jobs: int) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // jobs)
        return concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (threads,))

    def _alone(self, spec: str) -> str:
        with self._pool(1) as pool:
            try:
                return pool.submit(run_cell, spec).result()
            except BrokenProcessPool:
                return died(spec, "its process ended without a word: killed, or out of memory")


def _begin(threads: int) -> None:
    """Begin a process of a pool: it ends with the driver, and takes its share of the cores."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    end_with(driver.join)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@dataclasses.dataclass
class Ray(Engine):
    """On a Ray cluster; a cell whose node is lost is tried again elsewhere. Cells that measure time come last, alone.

    Attributes:
        address: of the cluster; None: one on this machine.
        gpus: share of a GPU that a cell gets.
        retries: how often a cell is tried again when its node or process is lost.
    """

    name: ClassVar[str] = "ray"
    address: str | None = None
    gpus: float = 0.0
    retries: int = 3

    def run(self, specs: Sequence[str], watch: Watch = unwatched) -> Iterator[str]:
        ray = _package("ray", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            # Without an address Ray would look for the last cluster of this machine, and wait for one that is gone.
            started = {"address": self.address} if self.address else {"address": "local", "include_dashboard": False}
            ray.init(**started, log_to_driver=False)
        remote = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=self.retries)(run_cell)
        others, timed = _timed_apart(specs)
        yield from self._together(ray, remote, others, self.jobs if self.jobs > 1 else len(others))
        yield from self._together(ray, remote, timed, 1)

    def _together(self, ray: Any, remote: Any, specs: Sequence[str], jobs: int) -> Iterator[str]:
        left, running = list(specs), dict[Any, str]()
        while left or running:
            while left and len(running) < jobs:
                spec = left.pop(0)
                running[remote.remote(spec)] = spec
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                spec = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield died(spec, _cause(error))

    def close(self) -> None:
        _package("ray", "ray").shutdown()


@dataclasses.dataclass
class Slurm(Engine):
    """As jobs of Slurm, by submitit.

    Attributes:
        folder: of logs, on a file system that all nodes see.
        partition, minutes, gpus, cpus, memory_gb: of every job.
        cluster: `slurm`, or `local` to try it without one.
    """

    name: ClassVar[str] = "slurm"
    folder: str = "slurm-logs"
    partition: str | None = None
    minutes: int = 240
    gpus: int = 0
    cpus: int = 4
    memory_gb: int = 32
    cluster: str = "slurm"

    def run(self, specs: Sequence[str], watch: Watch = unwatched) -> Iterator[str]:
        submitit = _package("submitit", "slurm")
        try:
            executor = submitit.AutoExecutor(folder=Path(self.folder), cluster=self.cluster)
        except RuntimeError as error:
            raise OptionError(f"--engine slurm: {error}; on a machine without Slurm use -j N") from None
        executor.update_parameters(
            timeout_min=self.minutes, cpus_per_task=self.cpus, gpus_per_node=self.gpus, mem_gb=self.memory_gb
        )
        if self.cluster == "slurm":
            more = {"slurm_partition": self.partition} if self.partition else {}
            executor.update_parameters(slurm_array_parallelism=max(1, self.jobs), **more)
        self._jobs = dict(zip(executor.map_array(run_cell, list(specs)), specs, strict=True))
        for job in submitit.helpers.as_completed(list(self._jobs)):
            try:
                yield job.result()
            except Exception as error:  # a job that was killed, or that Slurm lost
                yield died(self._jobs[job], f"job {job.job_id}: {_cause(error)}")

    def close(self) -> None:
        for job in getattr(self, "_jobs", {}):
            job.cancel()


def _package(name: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise OptionError(f"--engine {extra} needs a package: pip install spikeplug-bench[{extra}]") from None
