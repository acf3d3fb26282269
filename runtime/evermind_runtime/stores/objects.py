"""Packages in an object store: `s3://`, `gs://`, `az://`, and for trials `file://`, `memory://`.

Through obstore: one small wheel with the clients of all three clouds, which read their usual
environment variables (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from evermind_manifests.errors import (
    LocationError,
    MissingExtraError,
    MissingFileError,
    NetworkError,
    TruncatedError,
)

from .options import RemoteOptions
from .remote import RemoteStore, TransientError
from .urls import Url

if TYPE_CHECKING:
    import obstore
    from obstore.store import ObjectStore

_CHUNK = 256 * 1024
_EVERYTHING = 1 << 62


def connect(url: Url, options: RemoteOptions) -> tuple[ObjectStore, str]:
    """obstore's store for a package folder, or for the folder of a `.zip` with its name.

    Raises `MissingExtraError` without obstore, `LocationError` for what it refuses.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ImportError as error:
        raise MissingExtraError("obstore", "s3", f"Reading {url.shown}") from error
    if url.scheme == "memory":
        return MemoryStore(), ""
    name = ""
    if not url.is_folder:
        path, _, name = url.path.rpartition("/")
        url = replace(url, path=path)
    extra: dict[str, Any] = {}
    if url.scheme != "file":
        # Broken bodies are resumed here, requests that fail before are repeated there.
        wait = timedelta(seconds=options.timeout * (options.retries + 1))
        extra["retry_config"] = {"max_retries": options.retries, "retry_timeout": wait}
        extra["client_options"] = {"connect_timeout": timedelta(seconds=options.timeout)}
    try:
        return from_url(url.target, **extra), name
    except (BaseError, ValueError, OSError) as error:
        raise LocationError(f"{url.shown}: {_first_line(error)}") from error


class ObjectReader(RemoteStore):
    """A package folder in an object store, or (as the path `""`) one file there."""

    def __init__(self, store: ObjectStore, location: str, options: RemoteOptions, name: str = ""):
        """`name` is the file that `""` means."""
        super().__init__(location, options)
        self._store = store
        self._name = name

    def open_body(self, path: str, offset: int, length: int | None) -> ObjectBody:
        """See `RemoteStore.open_body`."""
        import obstore

        options: dict[str, Any] = {}
        if offset or length is not None:
            options["range"] = (offset, offset + (_EVERYTHING if length is None else length))
        try:
            result = obstore.get(self._store, path or self._name, options=options)  # type: ignore[arg-type]
        except Exception as error:
            self._fail(path, offset, error)
            raise
        return ObjectBody(result)

    def ask_size(self, path: str) -> int:
        """See `RemoteStore.ask_size`."""
        import obstore

        self.count(requests=1)
        try:
            return int(obstore.head(self._store, path or self._name)["size"])
        except Exception as error:
            self._fail(path, 0, error)
            raise

    def paths(self) -> Iterable[str]:
        """See `Store.paths`."""
        import obstore

        self.check_open()
        found = [str(item["path"]) for batch in obstore.list(self._store) for item in batch]
        return sorted(
            path for path in found if not any(part.startswith(".") for part in path.split("/"))
        )

    def _fail(self, path: str, offset: int, error: Exception) -> None:
        """Raise what an error of obstore's means, if it is one."""
        import obstore

        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            raise MissingFileError(f"{self.place(path)}: there is no such object") from None
        # Each cloud has its own words for a range past the end: look, rather than parse them.
        if offset and offset >= (size := self.ask_size(path)):
            raise TruncatedError(
                f"{self.place(path)}: expected bytes from {offset}, the file has {size}"
            )
        text = _first_line(error)
        denied = (
            obstore.exceptions.PermissionDeniedError,
            obstore.exceptions.UnauthenticatedError,
            PermissionError,
        )
        if isinstance(error, denied):
            raise NetworkError(
                f"{self._where(path)}: access denied",
                hint="Credentials come from the environment, e.g. AWS_ACCESS_KEY_ID.",
            ) from error
        if isinstance(error, obstore.exceptions.BaseError | OSError):
            raise TransientError(text) from error


class ObjectBody:
    """One object's bytes as they come."""

    def __init__(self, result: obstore.GetResult) -> None:
        self.offset = int(result.range[0])
        self.total: int | None = int(result.meta["size"])
        self.tag = result.meta.get("e_tag")
        self._result = result

    def chunks(self) -> Iterator[memoryview]:
        """See `Body.chunks`."""
        import obstore

        try:
            for chunk in self._result.stream(min_chunk_size=_CHUNK):
                yield memoryview(chunk)
        except (obstore.exceptions.BaseError, OSError) as error:
            raise TransientError(_first_line(error)) from error

    def close(self) -> None:
        """See `Body.close`."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
