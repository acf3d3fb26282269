"""Upload to an object store: S3, Google Cloud Storage, Azure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evermind_manifests.errors import MissingFileError

from ..stores.media import media_type
from ..stores.objects import ObjectReader, connect
from ..stores.options import RemoteOptions
from ..stores.remote import TransientError
from ..stores.urls import Url
from .upload import UploadTarget


class ObjectTarget(UploadTarget):
    """A prefix of a bucket."""

    def __init__(self, url: Url, options: RemoteOptions) -> None:
        """Raises `MissingExtraError` without obstore, `LocationError`."""
        self._objects, _ = connect(url, options)
        self._plain = url.scheme in ("file", "memory")
        super().__init__(url.shown, ObjectReader(self._objects, url.shown, options), options)

    def send(self, path: str, size: int, open_body: Callable[[], object]) -> str | None:
        """See `UploadTarget.send`; obstore splits large files into parts."""
        import obstore

        # Local stores have no place for them.
        attributes = None if self._plain else {"Content-Type": media_type(path)}
        body: Any = open_body()
        try:
            result = obstore.put(self._objects, path, body, attributes=attributes)
        except obstore.exceptions.BaseError as error:
            raise TransientError(str(error).splitlines()[0][:200]) from error
        return result["e_tag"]

    def look(self, path: str) -> tuple[int, str | None]:
        """See `UploadTarget.look`."""
        import obstore

        try:
            meta = obstore.head(self._objects, path)
        except FileNotFoundError:
            raise MissingFileError(f"{path}: there is no such object") from None
        except obstore.exceptions.BaseError as error:
            raise TransientError(str(error).splitlines()[0][:200]) from error
        return int(meta["size"]), meta["e_tag"]
