"""Validate a package at rising cost, and report everything that is wrong with it.

Levels: *structure* (the manifest alone), *files* (sizes, kinds of file, shard heads),
*deep* (every digest, shard and graph), *run* (parity, by a function handed in). A level
never stops at its first problem, and a broken manifest is used for what can be known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from .deep import deep_problems
from .diagnose import diagnose_manifest
from .errors import EvermindPackError, PathError, ShardError, TruncatedError
from .manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    package_digest,
)
from .package import Package, read_manifest, shard_place
from .problems import Problem, problem, problem_of
from .shard import PREFIX_BYTES, read_prefix
from .store import Store, open_store

Progress: TypeAlias = Callable[[int, int], None]
Run: TypeAlias = Callable[[Package], list[Problem]]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found; `levels` are those that were carried out, in order."""

    location: str
    digest: str | None
    levels: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are no mere warnings."""
        return tuple(item for item in self.problems if item.severity == "error")

    @property
    def ok(self) -> bool:
        """No errors; warnings are allowed."""
        return not self.errors

    @property
    def exit_code(self) -> int:
        """0 ok, 1 invalid, 3 when stored bytes are not those described."""
        if any(item.integrity for item in self.errors):
            return 3
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "location": self.location,
            "digest": self.digest,
            "levels": list(self.levels),
            "ok": self.ok,
            "exit_code": self.exit_code,
            "problems": [asdict(item) for item in self.problems],
        }

    def render(self) -> str:
        """The report for a person: one problem a paragraph, a verdict at the end."""
        lines: list[str] = []
        for item in self.problems:
            lines += [str(item), f"  {item.remedy}"]
        warnings = len(self.problems) - len(self.errors)
        verdict = "valid" if self.ok else f"not valid: {len(self.errors)} error(s)"
        if warnings:
            verdict += f", {warnings} warning(s)"
        lines.append(f"{self.location}: {verdict} (checked: {', '.join(self.levels)})")
        return "\n".join(lines)


def validate(
    location: str | os.PathLike[str] | Store,
    *,
    deep: bool = False,
    run: Run | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check the package at `location` and report all problems; raises for none of them.

    `run` is called with the opened package if nothing was wrong before, and gives the
    problems it finds. `progress(done, total)` counts the bytes that `deep` has read. A
    store that is handed in stays open.
    """
    if not isinstance(location, str | os.PathLike):
        return _validate(location, deep, run, progress)
    where = os.fspath(location)
    try:
        store = open_store(location)
    except EvermindPackError as error:
        found = problem_of("not-a-package", where, error)
        return Report(where, None, ("structure",), (found,))
    with store:
        return _validate(store, deep, run, progress)


def _validate(store: Store, deep: bool, run: Run | None, progress: Progress | None) -> Report:
    levels = ["structure", "files"]
    try:
        data = read_manifest(store)
    except EvermindPackError as error:
        found = problem_of("not-a-package", store.location, error)
        return Report(store.location, None, ("structure",), (found,))
    digest = package_digest(data)
    diagnosis = diagnose_manifest(data)
    manifest = diagnosis.manifest
    problems = [*diagnosis.problems, *_check_files(store, diagnosis.files)]
    if manifest is None:
        return Report(store.location, digest, tuple(levels), tuple(problems))
    problems += _check_shard_heads(store, manifest)
    if deep:
        levels.append("deep")
        problems += deep_problems(store, manifest, progress or (lambda done, total: None))
    if run is not None and not any(item.severity == "error" for item in problems):
        levels.append("run")
        problems += run(Package(store, manifest, digest))
    return Report(store.location, digest, tuple(levels), tuple(dict.fromkeys(problems)))


def _check_files(store: Store, files: Mapping[str, FileEntry]) -> Iterator[Problem]:
    for path, entry in files.items():
        try:
            found = store.size(path)
        except PathError:
            continue  # reported as bad-path
        except EvermindPackError as error:
            yield problem_of("missing-file", path, error)
            continue
        if found != entry.bytes:
            yield problem("size-mismatch", path, f"expected {entry.bytes:,} bytes, found {found:,}")
    try:
        strays = set(store.paths()) - files.keys() - {MANIFEST_NAME, SIGNATURE_NAME}
    except EvermindPackError as error:
        yield problem_of("unreadable", store.location, error)
        return
    for path in sorted(strays):
        yield problem("stray-file", path, "is not in `files`")


def _check_shard_heads(store: Store, manifest: Manifest) -> Iterator[Problem]:
    """The first 16 bytes of every shard that can be reached."""
    kinds = {entry.layer: manifest.kinds.get(entry.kind) for entry in manifest.layers}
    head = bytearray(PREFIX_BYTES)
    for shard in manifest.shards:
        place = shard_place(shard)
        kind = kinds.get(shard.layer)
        try:
            store.read_into(shard.file, shard.offset, memoryview(head))
            _, data_offset = read_prefix(head, shard.bytes, place)
        except (ShardError, TruncatedError) as error:
            yield problem_of("shard-header", place, error)
            continue
        except EvermindPackError:
            continue  # the file is missing or cannot be read: reported with it
        if kind is not None and kind.tensors and data_offset != kind.tensors[0].offset:
            yield problem(
                "shard-header",
                place,
                f"first tensor: expected at {kind.tensors[0].offset}, found {data_offset}",
            )
