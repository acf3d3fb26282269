"""A single-file package on a server: the zip's directory is read once, members by ranges."""

from __future__ import annotations

from collections.abc import Iterable

from evermind_manifests.errors import IntegrityError, MissingFileError, TruncatedError
from evermind_manifests.zip_store import Member, Reader, find_data, read_directory

from .remote import RemoteStore, Sink, StreamStore

# The directory of a package with some hundred shards, in the request that finds it.
_TAIL_BYTES = 64 * 1024
# A local header with its padding: read together with the member's bytes up to this size.
_MAX_HEAD_BYTES = 64 * 1024


class RemoteZip(StreamStore):
    """The files inside one uncompressed zip on a server; it owns `archive`.

    Held to the rules of `ZipStore`. A member's local header is checked when it is first
    read, in the same request as its bytes.
    """

    def __init__(self, archive: RemoteStore) -> None:
        """Reads the directory. Raises what `ZipStore` raises, or `NetworkError`."""
        self.location = archive.location
        self.options = archive.options
        self.counters = archive.counters
        self._archive = archive
        size = archive.size("")
        begin = max(0, size - _TAIL_BYTES)
        tail = memoryview(bytearray(size - begin))
        archive.read_into("", begin, tail)

        def read(offset: int, buffer: memoryview, where: str) -> None:
            if offset < 0 or offset + len(buffer) > size:
                raise TruncatedError(f"{where}: expected {len(buffer)} bytes from {offset}")
            if offset >= begin:
                buffer[:] = tail[offset - begin : offset - begin + len(buffer)]
            else:
                archive.read_into("", offset, buffer)

        self._members = read_directory(read, size, self.location)

    def size(self, path: str) -> int:
        """See `Store.size`."""
        return self._member(path).size

    def paths(self) -> Iterable[str]:
        """See `Store.paths`."""
        self._archive.check_open()
        return sorted(
            name
            for name in self._members
            if not any(part.startswith(".") for part in name.split("/"))
        )

    def stream(
        self,
        path: str,
        offset: int,
        length: int | None,
        sink: Sink,
        *,
        total: int | None = None,
        limit: int | None = None,
    ) -> None:
        """See `StreamStore.stream`."""
        member = self._member(path)
        if total is not None and total != member.size:
            raise IntegrityError(
                f"{path}: expected {total:,} bytes (manifest.json), the archive has"
                f" {member.size:,}",
                hint=f"The package at {self.location} was changed: load it again.",
            )
        if limit is not None and member.size > limit:
            raise IntegrityError(f"{path}: expected at most {limit:,} bytes, found {member.size:,}")
        if length is None:
            length = member.size - offset
        if offset < 0 or length < 0 or offset + length > member.size:
            raise TruncatedError(
                f"{path}: expected {length} bytes from {offset}, the file has {member.size}"
            )
        if not length:
            return
        head = member.limit - member.size - member.header
        if member.data < 0 and offset == 0 and head <= _MAX_HEAD_BYTES:
            self._stream_with_head(member, head, length, sink)
            return
        if member.data < 0:
            read: Reader = self._read
            if head <= _MAX_HEAD_BYTES:
                begun = bytearray(head)
                self._archive.read_into("", member.header, memoryview(begun))
                read = self._reader_of(begun, member)
            member.data = find_data(read, member, self.location)
        self._archive.stream("", member.data + offset, length, sink)

    def close(self) -> None:
        """See `Store.close`."""
        self._archive.close()

    def _stream_with_head(self, member: Member, head: int, length: int, sink: Sink) -> None:
        """The member's first `length` bytes, after its local header in the same stream."""
        begun = bytearray()
        left = length

        def split(chunk: bytes | memoryview) -> None:
            nonlocal left
            if len(begun) < head:
                missing = head - len(begun)
                begun.extend(chunk[:missing])
                chunk = chunk[missing:]
                if len(begun) < head:
                    return
                member.data = find_data(self._reader_of(begun, member), member, self.location)
                # What the header leaves of it belongs to the member already.
                left -= _forward(memoryview(begun)[member.data - member.header :], sink, left)
            left -= _forward(chunk, sink, left)

        self._archive.stream("", member.header, head + length, split)
        assert left == 0, "data lies before the limit, so all of it was in the range"

    def _reader_of(self, begun: bytearray, member: Member) -> Reader:
        def read(offset: int, buffer: memoryview, where: str) -> None:
            at = offset - member.header
            if at + len(buffer) > len(begun):
                raise TruncatedError(f"{where}: the local header is cut short")
            buffer[:] = begun[at : at + len(buffer)]

        return read

    def _read(self, offset: int, buffer: memoryview, where: str) -> None:
        self._archive.read_into("", offset, buffer)

    def _member(self, path: str) -> Member:
        self._archive.check_open()
        member = self._members.get(path)
        if member is None:
            raise MissingFileError(f"{path}: not found in {self.location}")
        return member


def _forward(chunk: bytes | memoryview, sink: Sink, most: int) -> int:
    """Give the sink up to `most` bytes; how many it was."""
    view = memoryview(chunk)[:most]
    if len(view):
        sink(view)
    return len(view)
