"""Sweeps on a Ray cluster of two nodes on this machine, one of which is lost."""

from __future__ import annotations

import os

import pytest

from spikeplug_bench import engines, runner
from spikeplug_bench.store import DONE, Store
from spikeplug_bench.suite import overrides

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.second = cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


def test_a_lost_node_costs_no_cell(codes, tmp_path, cluster):
    change = overrides(["steps=2,3,4,5,6,7,8"])
    one = runner.run(codes, Store(tmp_path / "a.db"), tmp_path, change=change)
    arrived = []

    def lose(row):
        if not arrived:
            cluster.remove_node(cluster.second, allow_graceful=False)
        arrived.append(row)

    engine = engines.Ray(address=cluster.address)
    two = runner.run(codes, Store(tmp_path / "b.db"), tmp_path, change=change, engine=engine, arrived=lose)
    assert len(arrived) == len(one) == 14
    assert {row.status for row in two} == {DONE}
    assert [(row.id, row.metrics) for row in one] == [(row.id, row.metrics) for row in two]


def test_a_cluster_of_its_own(codes, tmp_path):
    rows = runner.run(codes, Store(tmp_path / "a.db"), tmp_path, engine=engines.Ray(jobs=2))
    assert {row.status for row in rows} == {DONE}
    assert not ray.is_initialized()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
