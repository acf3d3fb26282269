"""docs/format.md says what the code does: codes, fields, operators, limits."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from evermind_manifests import manifest
from evermind_manifests.dtypes import ITEMSIZE
from evermind_manifests.graph import CONTRIB_OPS, FORBIDDEN_OPS
from evermind_manifests.paths import ALLOWED_SUFFIXES
from evermind_manifests.problems import CODES

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text("utf-8")


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_listed(code: str) -> None:
    info = CODES[code]
    kind = " (warning)" if info.severity == "warning" else " (3)" if info.integrity else ""
    assert f"| `{code}` | {info.level}{kind} | {info.meaning} | {info.remedy} |" in TEXT


def test_no_code_is_listed_that_does_not_exist() -> None:
    table = TEXT[TEXT.index("| code | level |") :]
    assert table.count("\n| `") == len(CODES)


@pytest.mark.parametrize(
    "struct",
    [
        manifest.Manifest,
        manifest.Kind,
        manifest.TensorSpec,
        manifest.Layer,
        manifest.Shard,
        manifest.Plan,
        manifest.ValueSpec,
        manifest.StateSpec,
        manifest.GraphStep,
        manifest.ExpertsStep,
        manifest.FusedExperts,
        manifest.Router,
        manifest.Tokenizer,
        manifest.Generation,
        manifest.Card,
        manifest.Parameters,
        manifest.FileEntry,
    ],
)
def test_every_field_is_listed(struct: type[msgspec.Struct]) -> None:
    missing = [name for name in struct.__struct_fields__ if name not in TEXT]
    assert missing == []


def test_lists_are_complete() -> None:
    for suffix in ALLOWED_SUFFIXES:
        assert f"{suffix} " in TEXT or f"{suffix}`" in TEXT
    for op in CONTRIB_OPS | FORBIDDEN_OPS:
        assert f"`{op}`" in TEXT
    for dtype, size in ITEMSIZE.items():
        assert f"`{dtype}` {size}" in TEXT.replace("\n", " ")
