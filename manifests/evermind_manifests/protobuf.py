"""A small, strict reader of the protobuf wire format: enough to look into an ONNX file.

Every length is checked against what is there, and a field that a message's description
does not list is refused: what this reader does not know, it cannot vouch for.
Source: the protobuf encoding specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from .errors import GraphError

_VARINT: Final = 0
_FIXED64: Final = 1
_LENGTH: Final = 2
_FIXED32: Final = 5

Kind: TypeAlias = Literal["number", "numbers", "one", "many", "skip"]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message, and what to make of it.

    `number`: a single varint; `numbers`: repeated ones, packed or not; `one` and `many`:
    a single or repeated string, byte string or submessage; `skip`: known, not looked at.
    """

    name: str
    kind: Kind


Description: TypeAlias = Mapping[int, Field]


def describe(
    *,
    number: Mapping[str, int] | None = None,
    numbers: Mapping[str, int] | None = None,
    one: Mapping[str, int] | None = None,
    many: Mapping[str, int] | None = None,
    skip: Sequence[int] = (),
) -> Description:
    """A message's description from field names and numbers; `skip` needs no names."""
    kinds: dict[Kind, Mapping[str, int]] = {
        "number": number or {},
        "numbers": numbers or {},
        "one": one or {},
        "many": many or {},
        "skip": {str(code): code for code in skip},
    }
    return {
        code: Field(name, kind) for kind, fields in kinds.items() for name, code in fields.items()
    }


class Message:
    """A parsed message: raw values by field name; submessages stay bytes until asked for."""

    __slots__ = ("_numbers", "_views")

    def __init__(self, data: memoryview, description: Description, where: str) -> None:
        """Raises `GraphError` for bytes that are not this message and nothing else."""
        self._numbers: dict[str, list[int]] = {}
        self._views: dict[str, list[memoryview]] = {}
        for code, value in _fields(data, where):
            field = description.get(code)
            if field is None:
                raise GraphError(f"{where}: field {code} is not known here")
            if field.kind == "skip":
                continue
            if isinstance(value, memoryview) and field.kind in ("one", "many"):
                self._views.setdefault(field.name, []).append(value)
            elif isinstance(value, memoryview) and field.kind == "numbers":
                self._numbers.setdefault(field.name, []).extend(_packed(value, where))
            elif isinstance(value, int) and field.kind in ("number", "numbers"):
                self._numbers.setdefault(field.name, []).append(value)
            else:
                raise GraphError(f"{where}.{field.name}: the wire type does not fit")
            # Readers differ on which of two counts, or merge them.
            if field.kind in ("number", "one") and self.count(field.name) > 1:
                raise GraphError(f"{where}.{field.name}: stands more than once")

    def count(self, name: str) -> int:
        """How often a field stands."""
        return len(self._numbers.get(name, ())) + len(self._views.get(name, ()))

    def integer(self, name: str, default: int = 0) -> int:
        """A single number."""
        values = self._numbers.get(name)
        return values[0] if values else default

    def integers(self, name: str) -> tuple[int, ...]:
        """Repeated numbers."""
        return tuple(self._numbers.get(name, ()))

    def text(self, name: str) -> str:
        """A single string; empty where it is missing."""
        views = self._views.get(name)
        return decode_text(views[0], name) if views else ""

    def view(self, name: str) -> memoryview | None:
        """A single submessage or byte string."""
        views = self._views.get(name)
        return views[0] if views else None

    def views(self, name: str) -> tuple[memoryview, ...]:
        """Repeated submessages or byte strings."""
        return tuple(self._views.get(name, ()))


def decode_text(view: memoryview, where: str) -> str:
    """A UTF-8 string. Raises `GraphError`."""
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise GraphError(f"{where}: not UTF-8") from error


def _fields(data: memoryview, where: str) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of each field in order: a varint as int, all else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position, where)
        code, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position, where)
            yield code, value
            continue
        if wire == _LENGTH:
            length, position = _varint(data, position, where)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise GraphError(f"{where}: wire type {wire} at byte {position}")
        end = position + length
        if end > len(data):
            raise GraphError(f"{where}: field {code} ends at {end}, its message at {len(data)}")
        yield code, data[position:end]
        position = end


def _varint(data: memoryview, position: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise GraphError(f"{where}: cut short at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), position
    raise GraphError(f"{where}: a number of more than 10 bytes at {position}")


def _packed(data: memoryview, where: str) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position, where)
        yield value
