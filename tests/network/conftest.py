from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from evermind_runtime.stores import RemoteOptions

from tests.network.server import Behaviour, Server, serving


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(folder, **behaviour)`: a server for the test's duration."""
    with ExitStack() as stack:

        def start(root: Path, **behaviour: object) -> Server:
            return stack.enter_context(serving(root, Behaviour(**behaviour)))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    """Quick to give up, with a cache of its own."""
    return quick(tmp_path / "cache")


def quick(cache: Path, **changes: object) -> RemoteOptions:
    values: dict[str, object] = {
        "cache_folder": cache,
        "cache_bytes": 1 << 30,
        "timeout": 60.0,
        "backoff": 0.001,
        "offline": False,
    }
    return RemoteOptions(**(values | changes))  # type: ignore[arg-type]
