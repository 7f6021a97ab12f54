"""One server for all tests that talk to one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.serving import Served, make_models, serving


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model behind HTTP, as a user would start it."""
    folder = tmp_path_factory.mktemp("serve")
    with serving(make_models(folder), folder) as server:
        yield server
