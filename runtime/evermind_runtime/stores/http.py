"""Packages on a web server: any static host, a CDN, a signed URL of an object store.

The client is urllib3: a thread-safe pool of kept-alive connections, no async runtime, no
dependencies of its own, and it lets us have what must not be automatic: redirects, retries
and decoding are ours. It is imported when the first such package is opened.

A whole file is asked for without a range, so that every server and cache can serve it; only
parts (shards in a pool or a zip, the rest of a broken body) need ranges. A server that
answers a range with 200 and the whole file is read up to the part wanted.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from evermind_manifests.errors import (
    IntegrityError,
    LocationError,
    MissingExtraError,
    MissingFileError,
    NetworkError,
    TruncatedError,
)

from .options import RemoteOptions
from .remote import RemoteStore, TransientError
from .urls import Url, is_public

if TYPE_CHECKING:
    import urllib3

_CHUNK = 64 * 1024
_MAX_REDIRECTS = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,16})-(\d{1,16})/(\d{1,16}|\*)", re.ASCII)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,16})", re.ASCII)


class HttpStore(RemoteStore):
    """A package folder below an http(s) URL, or (as the path `""`) one file at it."""

    def __init__(self, url: Url, options: RemoteOptions) -> None:
        """Nothing is requested yet. Raises `MissingExtraError` without urllib3."""
        super().__init__(url.shown, options)
        self._url = url
        self._client = HttpClient(url, options)

    def open_body(self, path: str, offset: int, length: int | None) -> HttpBody:
        """See `RemoteStore.open_body`."""
        headers = {}
        known = self._sizes.get(path)
        if offset or (length is not None and length != known):
            last = "" if length is None else str(offset + length - 1)
            headers["Range"] = f"bytes={offset}-{last}"
        response = self._client.request("GET", self._url.below(path), headers)
        try:
            return self._body(response, path, offset, length)
        except BaseException:
            response.close()
            raise

    def ask_size(self, path: str) -> int:
        """See `RemoteStore.ask_size`: by HEAD, or where that is refused by a range of one byte."""
        self.count(requests=1)
        response = self._client.request("HEAD", self._url.below(path), {})
        response.release_conn()
        size = response.headers.get("Content-Length", "")
        if response.status == 200 and size.isdecimal() and not _encoding(response):
            return int(size)
        if response.status in (404, 410):
            raise self._missing(path, response.status)
        self.count(requests=1)
        try:
            body = self.open_body(path, 0, 1)
        except TruncatedError:
            return 0  # no server has a first byte of an empty file
        body.close()
        if body.total is None:
            raise NetworkError(f"{self._where(path)}: the server does not say how long it is")
        return body.total

    def close(self) -> None:
        """See `Store.close`."""
        super().close()
        self._client.close()

    def _body(
        self, response: urllib3.BaseHTTPResponse, path: str, offset: int, length: int | None
    ) -> HttpBody:
        status = response.status
        if status in (404, 410):
            raise self._missing(path, status)
        if status == 416:
            found = _UNSATISFIED.fullmatch(response.headers.get("Content-Range", ""))
            raise TruncatedError(
                f"{self.place(path)}: expected {length or 1} bytes from {offset},"
                f" the file has {found[1] if found else 'fewer'}",
            )
        if status not in (200, 206):
            raise NetworkError(
                f"{self._where(path)}: the server answers {status}", hint=_HINTS.get(status)
            )
        if encoding := _encoding(response):
            raise NetworkError(
                f"{self._where(path)}: the server sends it {encoding[:40]}-encoded",
                hint="Serve packages as they are: ranges and lengths of compressed files mean"
                " nothing.",
            )
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        # A weak tag promises the same meaning, not the same bytes.
        tag = None if tag is None or tag.startswith("W/") else tag
        if status == 200:
            size = response.headers.get("Content-Length", "")
            return HttpBody(response, 0, int(size) if size.isdecimal() else None, tag)
        where = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(where)
        if match is None or int(match[1]) != offset or int(match[2]) < offset:
            last = "" if length is None else str(offset + length - 1)
            raise TransientError(
                f"asked for bytes {offset}-{last}, the server sends {where[:60] or 'no range'!r}",
                final=IntegrityError,
            )
        return HttpBody(response, offset, None if match[3] == "*" else int(match[3]), tag)

    def _missing(self, path: str, status: int) -> MissingFileError:
        return MissingFileError(f"{self.place(path)}: the server has no such file ({status})")


_HINTS = {
    401: "The server wants credentials: https://user:password@host/…, or a signed URL.",
    403: "The server refuses: check the credentials, or whether a signed URL has expired.",
}


class HttpBody:
    """The body of one response, as it comes."""

    def __init__(
        self,
        response: urllib3.BaseHTTPResponse,
        offset: int,
        total: int | None,
        tag: str | None,
    ) -> None:
        self.offset = offset
        self.total = total
        self.tag = tag
        self._response = response
        self._ended = False

    def chunks(self) -> Iterator[bytes]:
        """See `Body.chunks`."""
        import urllib3

        while True:
            try:
                # read1, as read would wait until all of the chunk is there.
                chunk = self._response.read1(_CHUNK, decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise TransientError(_reason(error)) from error
            if not chunk:
                self._ended = True
                return
            yield chunk

    def close(self) -> None:
        """See `Body.close`."""
        # A connection with bytes still to come is of no use to the next request.
        if self._ended or getattr(self._response, "length_remaining", None) == 0:
            self._response.release_conn()
        else:
            self._response.close()


class HttpClient:
    """Sends requests: contained, with credentials for the URL's own server only."""

    def __init__(self, url: Url, options: RemoteOptions) -> None:
        """Raises `MissingExtraError` without urllib3."""
        try:
            import urllib3
        except ImportError as error:
            raise MissingExtraError("urllib3", "http", f"Reading {url.shown}") from error
        self._url = url
        self._guard = AddressGuard(url.host, options.allow_private)
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "evermind-pack"}
        self._secrets = dict(options.headers)
        if url.auth:
            self._secrets["Authorization"] = url.auth
        self._timeout = urllib3.Timeout(connect=options.timeout, read=options.timeout)
        self._pool = urllib3.PoolManager(
            num_pools=8, maxsize=2 * options.concurrency, retries=False, timeout=self._timeout
        )
        self._pool.pool_classes_by_scheme = _guarded_pools(self._guard)
        self._reached = False

    def request(
        self, method: str, url: Url, headers: Mapping[str, str], body: Any = None
    ) -> urllib3.BaseHTTPResponse:
        """The response with its body unread, redirects followed.

        Raises `TransientError`, `NetworkError`, or `LocationError` for a redirect that leads
        where it may not.
        """
        import urllib3

        for _ in range(_MAX_REDIRECTS + 1):
            sent = {**self._headers, **headers}
            if url.origin == self._url.origin:
                sent |= self._secrets
            try:
                response = self._pool.request(
                    method,
                    url.target,
                    headers=sent,
                    body=body,
                    preload_content=False,
                    decode_content=False,
                    redirect=False,
                    retries=False,
                )
            except RefusedAddress as error:
                raise LocationError(
                    f"{self._url.shown}: a redirect leads to {error.address}, which is no public"
                    " address",
                    hint="Allow it with allow_private (`--allow-private`) if you know the server.",
                ) from None
            except (urllib3.exceptions.HTTPError, OSError) as error:
                self._fail(url, error)
            self._reached = True
            if response.status in _TRANSIENT:
                response.close()
                pause = response.headers.get("Retry-After", "")
                raise TransientError(
                    f"the server answers {response.status}",
                    pause=float(pause) if pause.isdecimal() else 0.0,
                )
            target = response.headers.get("Location")
            if response.status not in _REDIRECTS or not target:
                return response
            response.close()
            if method not in ("GET", "HEAD"):
                raise NetworkError(
                    f"{url.shown}: the server redirects a {method}; give the address it means"
                )
            url = self._follow(url, target)
        raise NetworkError(f"{self._url.shown}: more than {_MAX_REDIRECTS} redirects")

    def close(self) -> None:
        """Close the connections that are idle."""
        self._pool.clear()

    def _follow(self, url: Url, target: str) -> Url:
        new = url.redirected(target)
        if url.scheme == "https" and new.scheme != "https":
            raise LocationError(f"{url.shown}: redirects from https to http, which is refused")
        return new

    def _fail(self, url: Url, error: Exception) -> None:
        """Raise what an error of the client means."""
        import urllib3

        reason = f"{url.host}: {_reason(error)}"
        if isinstance(error, urllib3.exceptions.SSLError):
            raise NetworkError(
                f"{url.shown}: no secure connection: {_reason(error)}",
                hint="The server's certificate is not valid for this name, or not trusted here.",
            ) from error
        connecting = urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError
        if isinstance(error, connecting) and not self._reached:
            # Nothing was ever there: more likely a mistake than a fault.
            raise NetworkError(
                f"{url.shown}: {_reason(error)}",
                hint="Check the address and the network; --offline uses what is in the cache.",
            ) from error
        raise TransientError(reason) from error


class RefusedAddress(Exception):  # noqa: N818
    """A connection was made to an address that redirects may not lead to.

    No `OSError`: urllib3 would take it for a broken connection.
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"{address} is refused")
        self.address = address


class AddressGuard:
    """Whom we may talk to: the host the user named, and public addresses.

    The address checked is the one the socket is connected to, so a name that resolves
    differently the second time gains nothing. If the user's own host lies at a private
    address, so may those it redirects to.
    """

    def __init__(self, host: str, allow_private: bool) -> None:
        self._host = host
        self._allow = allow_private
        self._lock = threading.Lock()

    def check(self, host: str, address: str) -> None:
        """Raise `RefusedAddress` for a private address behind another host's name."""
        public = is_public(address)
        with self._lock:
            if host.rstrip(".").lower() == self._host:
                self._allow |= not public
            elif not public and not self._allow:
                raise RefusedAddress(address)


def _guarded_pools(guard: AddressGuard) -> dict[str, Any]:
    """urllib3's connection pools, whose connections are shown to the guard when they are made."""
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    def checked(connection: HTTPConnection, made: socket.socket) -> socket.socket:
        try:
            guard.check(connection.host, made.getpeername()[0])
        except BaseException:
            made.close()
            raise
        return made

    class GuardedConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return checked(self, super()._new_conn())

    class GuardedSecureConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return checked(self, super()._new_conn())

    class GuardedPool(HTTPConnectionPool):
        ConnectionCls = GuardedConnection

    class GuardedSecurePool(HTTPSConnectionPool):
        ConnectionCls = GuardedSecureConnection

    return {"http": GuardedPool, "https": GuardedSecurePool}


def _encoding(response: urllib3.BaseHTTPResponse) -> str:
    """How the body is encoded; `""` if it is not."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _reason(error: BaseException) -> str:
    """What went wrong in plain words; the client's own may repeat a URL with its secrets."""
    import urllib3.exceptions as kinds

    causes = (error.__cause__, error.__context__, *error.args)
    if isinstance(error, kinds.NameResolutionError):
        return "the host's name cannot be resolved"
    if isinstance(error, kinds.NewConnectionError | kinds.ProtocolError):
        systems = [one.strerror for one in causes if isinstance(one, OSError) and one.strerror]
        return systems[0] if systems else "the connection broke"
    if isinstance(error, kinds.ConnectTimeoutError):
        return "no connection in time"
    if isinstance(error, kinds.ReadTimeoutError):
        return "no answer in time"
    if isinstance(error, kinds.SSLError):
        found = [str(one.verify_message) for one in causes if hasattr(one, "verify_message")]
        return found[0] if found else "the handshake failed"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
