from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.network.server import Behaviour, Server, serving

from .browser import Browser
from .site import make_site, missing


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests; each asks it for a context of its own."""
    if reason := missing():
        pytest.skip(reason)
    with Browser() as browser:
        yield browser


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(package, **behaviour)`: an origin with the package at /package/."""
    with ExitStack() as stack:

        def start(package: Path, **behaviour: object) -> Server:
            site = make_site(tmp_path / f"site{len(list(tmp_path.iterdir()))}", package)
            return stack.enter_context(serving(site, Behaviour(**behaviour)))  # type: ignore[arg-type]

        yield start
