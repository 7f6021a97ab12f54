"""One server for all tests that talk to one, and a browser for those of its page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext

from tests.e2e.browsing import chromium
from tests.e2e.serving import Served, make_models, serving


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model behind HTTP, as a user would start it."""
    folder = tmp_path_factory.mktemp("serve")
    with serving(make_models(folder), folder) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """A headless Chromium; tests that take it are marked `needs_chromium`."""
    with chromium(tmp_path_factory.mktemp("chromium")) as context:
        yield context
