"""Sweeps on a Ray cluster of two nodes on this machine, one of which is lost."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spikeplug_bench import engines, runner
from spikeplug_bench.store import DONE, Store
from spikeplug_bench.suite import overrides

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow
HERE = "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as own:
        own.bind((HERE, 0))
        return int(own.getsockname()[1])


def _kill(node: subprocess.Popen) -> None:
    """Kill a node and all it has started. `ray stop` would end every Ray process of the machine."""
    processes = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)


@pytest.fixture
def environment():
    """Of every process of a cluster: a token, which Ray reads as it is imported."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    return {**os.environ, **token, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cluster(environment):
    """Address of a cluster, and its second node."""
    address = f"{HERE}:{_free_port()}"
    start = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--node-ip-address={HERE}", "--num-cpus=1"]
    start += ["--object-store-memory=100000000", "--disable-usage-stats"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    port = f"--port={address.rpartition(':')[2]}"
    nodes = [subprocess.Popen([*start, "--head", port, "--include-dashboard=false"], **quiet)]
    try:
        nodes.append(subprocess.Popen([*start, f"--address={address}"], **quiet))
        yield address, nodes[1]
    finally:
        for node in nodes:
            if node.poll() is None:
                _kill(node)


def _alive(address: str, environment: dict[str, str]) -> int:
    code = f"import ray; ray.init('{address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def test_a_lost_node_costs_no_cell(codes, codes_file, tmp_path, cluster, environment):
    address, second = cluster
    steps = "steps=2,3,4,5,6,7,8"
    one = runner.run(codes, Store(tmp_path / "a.db"), tmp_path, change=overrides([steps]))
    for _ in range(20):
        if _alive(address, environment) == 2:
            break
        time.sleep(1)
    else:
        pytest.fail("the second node did not come up")
    command = [sys.executable, "-m", "spikeplug", "bench", "run", str(codes_file), "-s", steps, "--engine", "ray"]
    command += ["--address", address, "--store", str(tmp_path / "b.db"), "--data", str(tmp_path)]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while driver.poll() is None:
        if (tmp_path / "b.db").exists() and Store(tmp_path / "b.db").rows():
            break
        time.sleep(0.1)
    _kill(second)
    _, said = driver.communicate(timeout=240)
    assert driver.returncode == 0, said
    two = Store(tmp_path / "b.db").rows([row.id for row in one])
    assert len(two) == 14
    assert {row.status for row in two} == {DONE}
    assert [(row.id, row.metrics) for row in one] == [(row.id, row.metrics) for row in two]


def test_a_cluster_of_its_own(codes, tmp_path):
    rows = runner.run(codes, Store(tmp_path / "a.db"), tmp_path, engine=engines.Ray(jobs=2))
    assert {row.status for row in rows} == {DONE}
    assert not ray.is_initialized()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
