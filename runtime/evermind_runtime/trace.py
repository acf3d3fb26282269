"""Routing traces: which experts every token was routed to, in the order the steps ran.

A trace is JSON lines: a head that makes it readable without its package, then one line per
step of a layer with a row of expert ids for each token (a decode step has one, a prefill
step a chunk). A row leaves out experts with a gate of 0, which are not needed:

    {"schema":"evermind.trace/1","package":"<sha256>","layers":[{"layer":0,"experts":16,…},…]}
    {"layer":0,"tokens":[[3,7]]}

Lines that give one token's experts in all layers are read too, without a head:

    {"tok":1,"layers":[[6,8],[7,16],…]}
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Count, Sha256
from msgspec import Struct

from .layers import ExpertLayer

SCHEMA: Final = "evermind.trace/1"
# Whole lines are written in blocks of about this size; a killed run loses the last one.
_BLOCK_BYTES = 16 * 1024


class TraceStep(Struct, frozen=True, forbid_unknown_fields=True):
    """One step of one layer: for every token, oldest first, its experts."""

    layer: Count
    tokens: tuple[tuple[Count, ...], ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace. `package` is the digest of the package it was recorded from."""

    layers: tuple[ExpertLayer, ...]
    steps: tuple[TraceStep, ...]
    package: str | None = None
    #: Whether `layers` was recorded; else it is guessed from the ids, with one byte an expert.
    recorded_layers: bool = True

    @property
    def tokens(self) -> int:
        """How many tokens the busiest layer routed."""
        counts: dict[int, int] = {}
        for step in self.steps:
            counts[step.layer] = counts.get(step.layer, 0) + len(step.tokens)
        return max(counts.values(), default=0)

    def of(self, layers: Sequence[ExpertLayer], where: str) -> Trace:
        """The same steps over the layers of a package. Raises `InputError` if they do not fit."""
        _check_steps(layers, self.steps, where)
        return replace(self, layers=tuple(layers), recorded_layers=True)


class TraceWriter:
    """Writes a trace while a model runs. Safe to use from several threads."""

    def __init__(
        self, path: str | os.PathLike[str], package: str, layers: Sequence[ExpertLayer]
    ) -> None:
        """Creates or replaces the file."""
        self._file = Path(path).open("wb")  # noqa: SIM115
        self._lock = threading.Lock()
        head = {"schema": SCHEMA, "package": package, "layers": layers}
        self._lines = [msgspec.json.encode(head).decode() + "\n"]
        self._pending = 0
        self.flush()

    def write(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """Add one step."""
        rows = ",".join([f"[{','.join(map(str, row))}]" for row in tokens])
        line = f'{{"layer":{layer},"tokens":[{rows}]}}\n'
        with self._lock:
            if self._file.closed:
                return
            self._lines.append(line)
            self._pending += len(line)
            if self._pending >= _BLOCK_BYTES:
                self._flush()

    def flush(self) -> None:
        """Hand everything so far to the operating system."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Flush and close; steps after that are not recorded."""
        with self._lock:
            if not self._file.closed:
                self._flush()
                self._file.close()

    def _flush(self) -> None:
        self._file.write("".join(self._lines).encode())
        self._file.flush()
        self._lines.clear()
        self._pending = 0


class _Head(Struct, forbid_unknown_fields=True):
    schema: str
    package: Sha256
    layers: tuple[ExpertLayer, ...]


class _TokenLine(Struct, forbid_unknown_fields=True):
    layers: tuple[tuple[Count, ...], ...]
    tok: int = 0


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace in either form.

    A last line that a killed run left unfinished is dropped. Raises `InputError` for a file
    that cannot be read or anything in it that is not as above.
    """
    name = os.fspath(path)
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    numbered = [(at, line) for at, line in enumerate(lines[:-1], 1) if line.strip()]
    if lines[-1].strip() and _is_json(lines[-1]):
        numbered.append((len(lines), lines[-1]))
    if not numbered:
        raise InputError(f"{name}: expected a routing trace, found no line")
    if b'"schema"' in numbered[0][1]:
        return _read_steps(numbered, name)
    return _read_tokens(numbered, name)


def _read_steps(lines: Sequence[tuple[int, bytes]], where: str) -> Trace:
    head = _decode(_HEAD, lines[0], where)
    if head.schema != SCHEMA:
        raise InputError(f"{where}: schema: expected {SCHEMA!r}, found {head.schema[:80]!r}")
    if len({layer.layer for layer in head.layers}) != len(head.layers):
        raise InputError(f"{where}: layers: a layer stands there twice")
    steps = tuple(_decode(_STEP, line, where) for line in lines[1:])
    _check_steps(head.layers, steps, where)
    return Trace(head.layers, steps, head.package)


def _read_tokens(lines: Sequence[tuple[int, bytes]], where: str) -> Trace:
    tokens = [_decode(_TOKEN, line, where).layers for line in lines]
    steps = tuple(
        TraceStep(layer, (experts,)) for token in tokens for layer, experts in enumerate(token)
    )
    experts = 1 + max((expert for token in tokens for row in token for expert in row), default=0)
    layers = tuple(
        ExpertLayer(layer=layer, experts=experts, top_k=max(1, len(row)), bytes=1)
        for layer, row in enumerate(tokens[0])
    )
    _check_steps(layers, steps, where)
    return Trace(layers, steps, recorded_layers=False)


def _check_steps(layers: Sequence[ExpertLayer], steps: Sequence[TraceStep], where: str) -> None:
    by_number = {layer.layer: layer for layer in layers}
    for at, step in enumerate(steps):
        layer = by_number.get(step.layer)
        if layer is None:
            raise InputError(f"{where}: step {at}: there is no layer {step.layer}")
        if not step.tokens:
            raise InputError(f"{where}: step {at}: expected a token or more, found none")
        for row in step.tokens:
            if len(set(row)) != len(row) or len(row) > layer.top_k:
                raise InputError(
                    f"{where}: step {at}, layer {step.layer}: expected at most {layer.top_k} "
                    f"different experts a token, found {list(row)}"
                )
            if max(row, default=0) >= layer.experts:
                raise InputError(
                    f"{where}: step {at}, layer {step.layer}: expected experts below "
                    f"{layer.experts}, found {max(row)}"
                )


def _decode(decoder: msgspec.json.Decoder[Any], line: tuple[int, bytes], where: str) -> Any:
    number, data = line
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(
            f"{where}: line {number}: {error}",
            hint="A routing trace is what `evermind-pack trace PKG … -o FILE` writes.",
        ) from error


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


_HEAD = msgspec.json.Decoder(_Head)
_STEP = msgspec.json.Decoder(TraceStep)
_TOKEN = msgspec.json.Decoder(_TokenLine)
