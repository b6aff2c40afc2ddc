from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptq4sam.errors import ConfigError, DependencyError
from ptq4sam.sweep.cluster import Cluster
from ptq4sam.sweep.scheduler import schedule
from ptq4sam.sweep.store import Store
from tests.sweep.fake_workers import FakeWorker, task


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'ptq4sam\[ray\]'"):
        Cluster(FakeWorker, "auto")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two cores in processes of its own."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ptq4sam[ray]'")
    from ray.cluster_utils import Cluster as Local

    # Workers of Ray find what this process finds.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    local = Local(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": 100 * 2**20,
            "include_dashboard": False,
        },
    )
    yield local.address
    local.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_two_workers_on_a_cluster_and_one_that_dies(address: str, tmp_path: Path) -> None:
    labels = ["slow", "slow", "exits", "slow", "fails", "slow"]
    tasks = [task(str(number), label) for number, label in enumerate(labels)]
    with Cluster(FakeWorker, address) as pool, Store(tmp_path / "s.sqlite") as store:
        assert pool.free == 2
        state = schedule(tasks, pool, store, {})
    records = [state.records[str(number)] for number in range(len(labels))]
    assert [record.status == "done" for record in records] == [one == "slow" for one in labels]
    assert records[2].error.startswith("its worker died")
    done = [record for record in records if record.status == "done"]
    assert {record.worker for record in done} == {"worker 0 of 2", "worker 1 of 2"}
    assert os.getpid() not in {record.metrics["process"] for record in done}


def test_more_workers_than_the_cluster_has(address: str) -> None:
    with pytest.raises(ConfigError, match="asked for 3 workers, but the Ray cluster has 2 cores"):
        Cluster(FakeWorker, address, 3)
