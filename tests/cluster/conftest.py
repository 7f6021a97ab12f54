"""A Ray of two CPUs, on one node or on two, once for each file of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

# Read when Ray starts; loopback only, so no token is needed.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="module")
def ray_cluster():
    """A fresh local Ray."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a head without CPUs and two nodes of one CPU each."""
    small = {"include_dashboard": False, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    ray.init(address=cluster.address, logging_level="warning")
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()
