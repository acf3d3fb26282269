"""A package in one uncompressed zip: every member is a plain range of the file.

The archive is read strictly, and nothing in it can be understood in two ways: members
are stored (not compressed) and not encrypted, names are unique, ranges do not overlap,
the local header repeats the central one, and nothing precedes or follows the archive.
Source of the layout: PKWARE APPNOTE 6.3, sections 4.3 and 4.5.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final, TypeAlias

from .descriptor import Descriptor
from .errors import ManifestError, MissingFileError, PathError, TruncatedError
from .location import open_regular
from .paths import check_path
from .store import Store, read_exactly, read_whole

LOCAL: Final = struct.Struct("<4s5H3L2H")
CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
END: Final = struct.Struct("<4s4H2LH")
END64: Final = struct.Struct("<4sQ2H2L4Q")
LOCATOR64: Final = struct.Struct("<4sLQL")

LOCAL_SIGNATURE: Final = b"PK\x03\x04"
CENTRAL_SIGNATURE: Final = b"PK\x01\x02"
END_SIGNATURE: Final = b"PK\x05\x06"
END64_SIGNATURE: Final = b"PK\x06\x06"
LOCATOR64_SIGNATURE: Final = b"PK\x06\x07"

UTF8_NAMES: Final = 1 << 11
ZIP64_EXTRA: Final = 0x0001
FULL16: Final = 0xFFFF
FULL32: Final = 0xFFFF_FFFF

_MAX_DIRECTORY_BYTES = 512 * 1024 * 1024


# Fills a buffer from an offset of the archive; the text names the place in errors.
Reader: TypeAlias = Callable[[int, memoryview, str], None]


@dataclass(slots=True)
class Member:
    """One file of the archive; `data` is -1 until its local header has been checked.

    It lies between `header`, where its local header begins, and `limit`.
    """

    name: str
    crc: int
    size: int
    header: int
    limit: int = 0
    data: int = -1


class ZipStore(Store):
    """A package in one uncompressed zip file.

    Raises `LocationError` if there is no such file, `ManifestError` or `TruncatedError` if it
    is no such zip.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.location = os.fspath(file)
        fd, size = open_regular(file)
        self._file = Descriptor(fd, self.location)
        try:
            self._members = read_directory(partial(read_exactly, fd), size, self.location)
        except BaseException:
            self._file.close()
            raise

    def size(self, path: str) -> int:
        """See `Store.size`."""
        with self._member(path) as (_, member):
            return member.size

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`."""
        with self._member(path) as (fd, member):
            if offset < 0 or offset + buffer.nbytes > member.size:
                raise TruncatedError(
                    f"{path}: expected {buffer.nbytes} bytes from {offset}, the file has"
                    f" {member.size}"
                )
            read_exactly(fd, member.data + offset, buffer, path)

    def read(self, path: str, *, limit: int) -> bytes:
        """See `Store.read`."""
        with self._member(path) as (fd, member):
            return read_whole(fd, member.data, member.size, path, limit)

    def paths(self) -> Iterable[str]:
        """See `Store.paths`."""
        with self._file.use():
            return sorted(
                name
                for name in self._members
                if not any(part.startswith(".") for part in name.split("/"))
            )

    def open_extent(self, path: str, flags: int = 0) -> tuple[int, int, int]:
        """(descriptor, offset, length) of a member, as `DirectoryStore.open_extent`."""
        with self._member(path) as (fd, member):
            # Through the open descriptor, so that it is the same file even if it was replaced.
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | flags)
            return own, member.data, member.size

    def close(self) -> None:
        """See `Store.close`."""
        self._file.close()

    @contextmanager
    def _member(self, path: str) -> Iterator[tuple[int, Member]]:
        """The archive's descriptor, in use, and the member."""
        with self._file.use() as fd:
            member = self._members.get(path)
            if member is None:
                raise MissingFileError(f"{path}: not found in {self.location}")
            if member.data < 0:
                # Two threads may both do this; they find the same number.
                member.data = find_data(partial(read_exactly, fd), member, self.location)
            yield fd, member


def read_directory(read: Reader, size: int, where: str) -> dict[str, Member]:
    """The members of an archive of `size` bytes. Raises `ManifestError` or `TruncatedError`."""
    count, begin, length = _find_directory(read, size, where)
    if length > _MAX_DIRECTORY_BYTES:
        raise ManifestError(f"{where}: central directory: {length:,} bytes is too much")
    data = bytearray(length)
    read(begin, memoryview(data), where)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        member, position = _read_member(data, position, where)
        if member is None:
            continue
        if member.name in members:
            raise ManifestError(f"{where}: two members are named {member.name!r}")
        members[member.name] = member
    if position != length:
        raise ManifestError(f"{where}: central directory: {length - position} bytes are left over")
    ordered = sorted(members.values(), key=lambda member: member.header)
    for one, other in pairwise(ordered):
        one.limit = other.header
    if ordered:
        ordered[-1].limit = begin
    for member in ordered:
        if member.header + LOCAL.size + len(member.name.encode()) + member.size > member.limit:
            raise ManifestError(f"{where}: {member.name} overlaps what follows it")
    return members


def find_data(read: Reader, member: Member, location: str) -> int:
    """Where the member's bytes begin, once its local header agrees with the central one."""
    where = f"{location}: {member.name}"
    head = bytearray(LOCAL.size)
    read(member.header, memoryview(head), where)
    signature, _, flags, method, _, _, crc, stored, size, name_len, extra_len = LOCAL.unpack(head)
    rest = bytearray(name_len + extra_len)
    read(member.header + LOCAL.size, memoryview(rest), where)
    if FULL32 in (stored, size):
        sizes = _zip64_values(bytes(rest[name_len:]), where)
        if len(sizes) != 2:
            raise ManifestError(f"{where}: the local header has no ZIP64 sizes")
        size, stored = sizes
    found = (signature, flags & ~UTF8_NAMES, method, crc, stored, size, bytes(rest[:name_len]))
    expected = (
        LOCAL_SIGNATURE, 0, 0, member.crc, member.size, member.size, member.name.encode()
    )  # fmt: skip
    for field, one, other in zip(
        ("signature", "flags", "method", "crc", "stored size", "size", "name"),
        expected,
        found,
        strict=True,
    ):
        if one != other:
            raise ManifestError(
                f"{where}: local header: {field}: expected {one!r} (central directory),"
                f" found {other!r}"
            )
    data: int = member.header + LOCAL.size + name_len + extra_len
    if data + member.size > member.limit:
        raise ManifestError(
            f"{where}: ends at {data + member.size}, what follows begins at {member.limit}"
        )
    return data


def _find_directory(read: Reader, size: int, where: str) -> tuple[int, int, int]:
    """(members, offset, bytes) of the central directory, which must end where it is described."""
    if size < END.size:
        raise TruncatedError(f"{where}: {size} bytes are too few for a zip")
    tail = bytearray(min(size, END.size + LOCATOR64.size))
    read(size - len(tail), memoryview(tail), where)
    signature, disk, first_disk, here, count, length, begin, comment = END.unpack_from(
        tail, len(tail) - END.size
    )
    if signature != END_SIGNATURE or comment:
        raise ManifestError(
            f"{where}: expected a zip without a comment, found no end record in the last"
            f" {END.size} bytes",
            hint="The file may be cut short: compare its length, or fetch it again.",
        )
    end = size - END.size
    is_64 = FULL16 in (disk, first_disk, here, count) or FULL32 in (length, begin)
    if is_64 and len(tail) > END.size:
        locator = LOCATOR64.unpack_from(tail, 0)
        if locator[0] == LOCATOR64_SIGNATURE:
            end = locator[2]
            if end != size - END.size - LOCATOR64.size - END64.size:
                raise ManifestError(f"{where}: the ZIP64 end record is not where it should be")
            record = bytearray(END64.size)
            read(end, memoryview(record), where)
            signature, _, _, _, disk, first_disk, here, count, length, begin = END64.unpack(record)
            if signature != END64_SIGNATURE:
                raise ManifestError(f"{where}: the ZIP64 end record is damaged")
    if disk or first_disk or here != count:
        raise ManifestError(f"{where}: a zip in several parts is not a package")
    if begin + length != end:
        raise ManifestError(
            f"{where}: central directory: expected to end at {end}, found {begin + length}"
        )
    return count, begin, length


def _read_member(data: bytearray, position: int, where: str) -> tuple[Member | None, int]:
    """The next entry of the central directory (None for a folder), and where it ends."""
    if position + CENTRAL.size > len(data):
        raise ManifestError(f"{where}: central directory: cut short at byte {position}")
    (
        signature, _, _, flags, method, _, _, crc, stored, size, name_len, extra_len, comment_len,
        disk, _, attributes, header,
    ) = CENTRAL.unpack_from(data, position)  # fmt: skip
    name_at = position + CENTRAL.size
    extra_at = name_at + name_len
    end = extra_at + extra_len + comment_len
    if signature != CENTRAL_SIGNATURE or end > len(data):
        raise ManifestError(f"{where}: central directory: damaged at byte {position}")
    try:
        name = data[name_at:extra_at].decode()
    except UnicodeDecodeError as error:
        raise PathError(f"{where}: a member's name is not UTF-8") from error
    if name.endswith("/") and size == 0:
        return None, end
    try:
        # Hidden files may lie in the archive, but are no part of the package.
        check_path("/".join(part.lstrip(".") for part in name.split("/")))
    except PathError as error:
        raise PathError(f"{where}: {error.message}") from None
    place = f"{where}: {name}"
    if method:
        raise ManifestError(
            f"{place}: expected a stored member, found compression method {method}",
            hint="Make the archive without compression, e.g. with `zip -0`.",
        )
    if flags & ~UTF8_NAMES:
        raise ManifestError(
            f"{place}: flags {flags:#06x}: encrypted or streamed members are not read"
        )
    if stat.S_ISLNK(attributes >> 16):
        raise ManifestError(f"{place}: a symlink; packages have none")
    wide = [value for value in (size, stored, header) if value == FULL32]
    values = _zip64_values(bytes(data[extra_at : extra_at + extra_len]), place) if wide else []
    if len(values) < len(wide):
        raise ManifestError(f"{place}: the central directory has no ZIP64 sizes")
    queue = iter(values)
    size, stored, header = (
        next(queue) if value == FULL32 else value for value in (size, stored, header)
    )
    if disk or stored != size:
        raise ManifestError(f"{place}: stored size: expected {size}, found {stored}")
    return Member(name, crc, size, header), end


def _zip64_values(extra: bytes, where: str) -> list[int]:
    """The 64-bit numbers of the ZIP64 extra field, in the order they stand."""
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if tag == ZIP64_EXTRA:
            if len(body) != length:
                raise ManifestError(f"{where}: the ZIP64 extra field is cut short")
            return [value for (value,) in struct.iter_unpack("<Q", body[: length // 8 * 8])]
        position += 4 + length
    return []
