"""A package at a URL is planned for without a byte of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import pytest

from tests.cli.command_line import call
from tests.network.server import Server
from tests.packages import export, lm_source
from tests.runtime.test_forecast import MACHINE


def test_only_the_manifest_is_fetched(
    serve: Callable[..., Server], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_pack.planning.measure_machine", lambda *_, **__: MACHINE)
    monkeypatch.setenv("EVERMIND_CACHE", str(tmp_path / "cache"))
    package = export(lm_source(), tmp_path / "lm")
    server = serve(package)
    code, out, err = call(capsys, "plan", server.url, "--json")
    assert (code, err) == (0, "")
    here = json.loads(call(capsys, "plan", package, "--json")[1])
    there = json.loads(out)
    assert there["sizes"] == here["sizes"]
    assert here["forecasts"][-1]["plan"] == "resident"
    assert there["notes"] == ["fetching it is not part of any figure"]
    assert {path.rpartition("/")[2] for path in server.requests} == {"manifest.json"}
    with em.load(server.url) as model:
        assert there["forecasts"][-1]["plan"] == model.plan.name == "half"
