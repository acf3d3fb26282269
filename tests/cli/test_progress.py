"""The bar on a terminal: a stage shows its own count, and none of the stage before it."""

from __future__ import annotations

import io
import re

import pytest

from evermind_pack.cli.terminal import stages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stage_that_counts_nothing_shows_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with stages() as (stage, advance):
        stage("copying")
        advance(3 * 1024, 4 * 1024)
        stage("waiting")
    _, waiting = screen.getvalue().split("waiting", 1)
    assert "/?" not in screen.getvalue()
    assert "KiB" not in waiting
    assert re.search(r"\d:\d\d:\d\d", waiting)
    screen.truncate(0)
    with stages() as (stage, advance):
        stage("copying")
        advance(3 * 1024, 4 * 1024)
    assert "3.0/4.0 KiB" in screen.getvalue()
