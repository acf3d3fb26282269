"""What a validator reports: problems with a code, a place, what is wrong and what to do.

`CODES` is the one registry: docs/format.md lists it, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from .errors import EvermindPackError

Severity: TypeAlias = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `place` is a file, field or tensor, `remedy` says what to do.

    `integrity` marks stored bytes that are not the ones described: exit code 3.
    """

    code: str
    severity: Severity
    place: str
    message: str
    remedy: str
    integrity: bool

    def __str__(self) -> str:
        return f"{self.severity}[{self.code}] {self.place}: {self.message}"


@dataclass(frozen=True, slots=True)
class Code:
    """What every problem of one code has in common; `level` is the one that finds it first."""

    level: Literal["structure", "files", "deep", "run"]
    meaning: str
    remedy: str
    severity: Severity = "error"
    integrity: bool = False


_REEXPORT = "Export the package again with a current evermind-pack."
_REFETCH = "The file was changed or damaged after packaging: fetch or copy it again."
_WRITER = "This is a fault of the program that wrote the package: report it there."

CODES: Final[dict[str, Code]] = {
    "not-a-package": Code(
        "structure",
        "there is no package at this location, or its container cannot be read",
        "Give a package's folder or its single-file .zip.",
    ),
    "manifest-invalid": Code(
        "structure", "manifest.json breaks its schema", "Compare the field with docs/format.md."
    ),
    "manifest-unsupported": Code(
        "structure",
        "another schema version, or a feature this version does not know",
        "Upgrade evermind-pack, or ask for a package without the feature.",
    ),
    "unknown-key": Code(
        "structure",
        "the manifest has a key this version does not know",
        "Check the spelling; a later version may have written it.",
        severity="warning",
    ),
    "bad-path": Code(
        "structure",
        "a path is absolute, climbs out of the package or is not portable",
        "Rename the file; use relative paths of plain characters.",
    ),
    "file-kind": Code(
        "structure",
        "the file's suffix is not on the allow-list",
        "Leave the file out: a package holds data and graphs only.",
    ),
    "path-collision": Code(
        "structure",
        "two paths are the same on a file system that ignores case, or a file is also a folder",
        "Rename one of the two.",
    ),
    "unlisted-file": Code(
        "structure", "a file is used but not named in `files`", "Add it to `files`, or re-export."
    ),
    "kind-layout": Code("structure", "a kind's tensors do not fit its shards", _WRITER),
    "layer-invalid": Code(
        "structure", "a layer stands twice, has an unknown kind, or top_k > experts", _WRITER
    ),
    "shard-missing": Code("structure", "an expert has no shard", _REEXPORT),
    "shard-surplus": Code("structure", "a shard belongs to no expert, or to one twice", _REEXPORT),
    "shard-range": Code(
        "structure", "a shard is misaligned, outside its file, or overlaps another", _REEXPORT
    ),
    "shard-size": Code("structure", "a shard is not as long as its kind says", _REEXPORT),
    "digest-conflict": Code(
        "structure", "a whole-file shard and its file have different digests", _REEXPORT
    ),
    "plan-undefined": Code("structure", "a step reads a value nothing has produced", _WRITER),
    "plan-redefined": Code("structure", "a value is produced twice", _WRITER),
    "plan-output": Code("structure", "an output or state of the plan is never produced", _WRITER),
    "plan-experts": Code(
        "structure", "a layer's experts do not run exactly once per program", _WRITER
    ),
    "plan-weights": Code("structure", "a step binds weights, but nothing is resident", _WRITER),
    "plan-pools": Code(
        "structure", "a step binds pools that it may not, or that the experts do not have", _WRITER
    ),
    "variant": Code("structure", "a variant is not of the same function as the plan", _WRITER),
    "state-too-large": Code(
        "structure", "a state would need more than 64 GiB", "Export with a shorter context."
    ),
    "state-shape": Code(
        "structure",
        "a state that is no buffer grows along another dimension than its first, or a buffer has "
        "not exactly one named dimension, or what is no buffer is bf16",
        _WRITER,
    ),
    "state-buffer": Code(
        "structure", "a buffer is used otherwise than by the graph that fills it", _WRITER
    ),
    "parameters": Code("structure", "more parameters are active than there are", _WRITER),
    "tokenizer": Code("structure", "the tokenizer needs a file and names none", _REEXPORT),
    "no-parity": Code(
        "structure",
        "no parity.json: that the package computes the right function cannot be checked",
        "Export with parity cases.",
        severity="warning",
    ),
    "missing-file": Code(
        "files", "a file is missing, or is not a regular file", _REFETCH, integrity=True
    ),
    "size-mismatch": Code(
        "files", "a file is longer or shorter than described", _REFETCH, integrity=True
    ),
    "shard-header": Code(
        "files", "a shard's head is damaged or of another version", _REFETCH, integrity=True
    ),
    "stray-file": Code(
        "files",
        "a file lies in the package that the manifest does not name",
        "Remove it, or keep it elsewhere: nothing checks it.",
        severity="warning",
    ),
    "unreadable": Code(
        "files", "a file could not be read", "Check the disk and the permissions.", integrity=True
    ),
    "digest-mismatch": Code(
        "deep", "a file's sha256 is not the one described", _REFETCH, integrity=True
    ),
    "shard-content": Code(
        "deep",
        "a shard's header differs from the manifest, or is malformed",
        _REFETCH,
        integrity=True,
    ),
    "resident-header": Code("deep", "resident.safetensors is malformed", _REFETCH, integrity=True),
    "source-map": Code(
        "deep", "source.json does not fit the tensors that the package holds", _WRITER
    ),
    "non-finite": Code(
        "deep",
        "weights are infinite or NaN",
        "Check the training run; the package computes what the model did.",
        severity="warning",
    ),
    "graph-invalid": Code("deep", "a graph is not a well-formed ONNX model", _REEXPORT),
    "graph-forbidden": Code(
        "deep",
        "a graph uses an operator, domain or feature that packages may not use",
        "Do not run it. Export from a source you trust.",
    ),
    "graph-external": Code(
        "deep",
        "a graph's external data lies outside the tensors it may use",
        "Do not run it. Export from a source you trust.",
    ),
    "graph-interface": Code(
        "deep", "a graph's inputs or outputs are not those the plan or the kind binds", _WRITER
    ),
    "parity": Code("run", "the package does not compute what parity.json expects", _REEXPORT),
}


def problem(code: str, place: str, message: str, remedy: str | None = None) -> Problem:
    """A `Problem` with its code's severity, remedy (unless a better one is given) and kind."""
    info = CODES[code]
    return Problem(code, info.severity, place, message, remedy or info.remedy, info.integrity)


def problem_of(code: str, place: str, error: EvermindPackError) -> Problem:
    """A `Problem` from an error, whose message may begin with the place too."""
    return problem(code, place, error.message.removeprefix(f"{place}: "))


def raise_errors(
    problems: Sequence[Problem], where: str, error: type[EvermindPackError], *, shown: int = 5
) -> None:
    """Raise `error` naming the first few problems and their count; warnings raise nothing."""
    errors = [item for item in problems if item.severity == "error"]
    if not errors:
        return
    lines = [f"{where}: {len(errors)} problem{'s' if len(errors) > 1 else ''}"]
    lines += [f"  {item.place}: {item.message} [{item.code}]" for item in errors[:shown]]
    if len(errors) > shown:
        lines.append(f"  … and {len(errors) - shown} more")
    raise error("\n".join(lines), hint=errors[0].remedy)
