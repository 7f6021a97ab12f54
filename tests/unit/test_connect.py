"""Addresses of clusters that are none are refused at once."""

from __future__ import annotations

import pytest

from core.config import ClusterConfig
from core.errors import ConfigError, InputError
from core.runtime.connect import connect
from core.runtime.submit import submit


@pytest.mark.parametrize("address", ["nonsense", ":6379", "head:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster.address={address}"):
        connect(ClusterConfig(address=address))


def test_an_address_where_nothing_listens_is_refused() -> None:
    with pytest.raises(InputError, match=r"no Ray answers at 127\.0\.0\.1:1 "):
        connect(ClusterConfig(address="127.0.0.1:1"))


def test_a_dashboard_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="no Ray dashboard answers at nonsense"):
        submit("jobs.prepare_data", [], "nonsense")
