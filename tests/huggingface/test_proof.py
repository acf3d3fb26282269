"""The process that compares a package: what its end says about it, and what it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from evermind_exporters.huggingface import proof
from evermind_exporters.huggingface.proof import parity_error
from evermind_manifests.errors import ContentError, ExportError

from tests.manifests.builders import write_tiny


def ends(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(proof, "_PROGRAM", program)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"was killed \(SIGKILL\), probably by lack of memory$",
        ),
        ("import os; os.abort()", r"was killed \(SIGABRT\)$"),
        ("raise MemoryError('one page more')", "MemoryError: one page more"),
    ],
)
def test_a_process_that_ends_is_no_wrong_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    ends(monkeypatch, program)
    with pytest.raises(ExportError) as caught:
        parity_error(tmp_path)
    assert not isinstance(caught.value, ContentError)
    assert re.search(message, caught.value.message)
    assert caught.value.message.startswith("the package cannot be compared with transformers")


def test_a_difference_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.dumps({"problem": "off by 2", "wrong": True, "error": 2.0})
    ends(monkeypatch, f"print({found!r})")
    with pytest.raises(ContentError, match=r"does not compute what transformers does.*off by 2"):
        parity_error(tmp_path)


def test_a_file_that_is_not_read_back_as_written_is_not(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p")
    (tmp_path / "p/parity.json").write_bytes(b"{}")
    with pytest.raises(ExportError) as caught:
        parity_error(tmp_path / "p")
    assert not isinstance(caught.value, ContentError)
    assert "cannot be compared with transformers" in caught.value.message
