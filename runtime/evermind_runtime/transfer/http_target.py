"""Upload by HTTP PUT: WebDAV, nginx `dav_methods`, most artifact servers."""

from __future__ import annotations

from collections.abc import Callable

from evermind_manifests.errors import MissingFileError, NetworkError

from ..stores.http import HttpClient, HttpStore
from ..stores.media import media_type
from ..stores.options import RemoteOptions
from ..stores.remote import TransientError
from ..stores.urls import Url
from .upload import UploadTarget


class HttpTarget(UploadTarget):
    """A folder below an http(s) URL."""

    def __init__(self, url: Url, options: RemoteOptions) -> None:
        """Raises `MissingExtraError` without urllib3."""
        super().__init__(url.shown, HttpStore(url, options), options)
        self._url = url
        self._client = HttpClient(url, options)

    def send(self, path: str, size: int, open_body: Callable[[], object]) -> str | None:
        """See `UploadTarget.send`."""
        headers = {"Content-Length": str(size), "Content-Type": media_type(path)}
        response = self._client.request("PUT", self._url.below(path), headers, open_body())
        try:
            # So that the connection can be used again; servers answer with a line at most.
            response.drain_conn()
        finally:
            response.release_conn()
        if response.status not in (200, 201, 204):
            hint = None
            if response.status in (404, 405, 501):
                hint = "The server takes no PUT here: copy the folder in its own way."
            raise NetworkError(
                f"{self.location}: {path}: the server answers {response.status} to PUT", hint=hint
            )
        return response.headers.get("ETag")

    def close(self) -> None:
        """See `Target.close`."""
        super().close()
        self._client.close()

    def look(self, path: str) -> tuple[int, str | None]:
        """See `UploadTarget.look`."""
        response = self._client.request("HEAD", self._url.below(path), {})
        response.release_conn()
        if response.status in (404, 410):
            raise MissingFileError(f"{path}: the server has no such file ({response.status})")
        size = response.headers.get("Content-Length", "")
        if response.status != 200 or not size.isdecimal():
            raise TransientError(f"the server answers {response.status} to HEAD")
        return int(size), response.headers.get("ETag")
