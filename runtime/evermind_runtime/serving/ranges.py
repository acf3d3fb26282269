"""The Range header (RFC 9110, section 14), read strictly and bounded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# Each range costs a head and a read; nobody who means well asks for more.
MAX_RANGES: Final = 16

_SPEC = re.compile(r"(\d{0,16})-(\d{0,16})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes from `begin` up to, not including, `end`."""

    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


class UnsatisfiableError(Exception):
    """A range that cannot be served: answer 416."""


def parse_ranges(header: str | None, size: int) -> list[ByteRange] | None:
    """The ranges asked for of a file of `size` bytes, in their order; None for the whole file.

    A unit other than bytes is ignored, as the RFC has it. Ranges past the end are left out.
    Raises `UnsatisfiableError` if none is left, for what is malformed, and for more ranges
    or bytes than a file in pieces can need.
    """
    if header is None:
        return None
    unit, equals, rest = header.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    specs = rest.split(",")
    if len(specs) > MAX_RANGES:
        raise UnsatisfiableError
    found = [one for one in (_parse(spec.strip(), size) for spec in specs) if one is not None]
    if not found or sum(map(len, found)) > size:
        raise UnsatisfiableError
    return found


def _parse(spec: str, size: int) -> ByteRange | None:
    match = _SPEC.fullmatch(spec)
    if match is None or spec == "-":
        raise UnsatisfiableError
    first, last = match[1], match[2]
    if not first:
        count = min(int(last), size)
        return ByteRange(size - count, size) if count else None
    begin = int(first)
    end = int(last) + 1 if last else size
    if end <= begin and last:
        raise UnsatisfiableError
    return ByteRange(begin, min(end, size)) if begin < size else None
