"""A Ray of two CPUs, once for each file of tests."""

from __future__ import annotations

import os

import pytest
import ray

# Read when Ray starts; loopback only, so no token is needed.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="module")
def ray_cluster():
    """A fresh local Ray."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()
