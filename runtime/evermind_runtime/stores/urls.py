"""Addresses of packages: parsed once, shown without their secrets, contained.

A URL may carry a user and password, or a query that is a key to the files (a signed URL).
Both go to the server that the user named, and neither ever stands in a message.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import quote, unquote, urljoin, urlsplit

from evermind_manifests.errors import LocationError
from evermind_manifests.location import shorten
from evermind_manifests.manifest import MANIFEST_NAME

HTTP_SCHEMES: Final = frozenset({"http", "https"})
OBJECT_SCHEMES: Final = frozenset({"s3", "gs", "az", "abfs", "abfss", "file", "memory"})

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9._])?")
_PORTS = {"http": 80, "https": 443}
# What a path may hold unquoted (RFC 3986, pchar) beside what quote() always leaves.
_PATH_SAFE = "/!$&'()*+,;=:@%"


def is_url(location: object) -> bool:
    """Whether `location` is text with a scheme, and so no path of this machine."""
    return isinstance(location, str) and _URL.match(location) is not None


@dataclass(frozen=True, slots=True)
class Url:
    """An http(s) or object store address; `path` is as it is sent, percent-encoded."""

    scheme: str
    host: str
    port: int | None
    path: str
    query: str = ""
    auth: str | None = None

    @property
    def origin(self) -> tuple[str, str, int | None]:
        """What credentials belong to: scheme, host and port."""
        return self.scheme, self.host, self.port or _PORTS.get(self.scheme)

    @property
    def is_folder(self) -> bool:
        """Whether files lie below it; else it is one `.zip` file."""
        return not self.path.lower().endswith(".zip")

    @property
    def shown(self) -> str:
        """For messages and records: neither credentials nor query."""
        return shorten(f"{self.scheme}://{self._netloc}{self.path}")

    @property
    def target(self) -> str:
        """The whole address, with its query and without credentials."""
        query = f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{self._netloc}{self.path}{query}"

    @property
    def _netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    def below(self, path: str) -> Url:
        """The address of a package's file; `""` is this address itself."""
        if not path:
            return self
        return replace(self, path=self.path.rstrip("/") + "/" + quote(path, safe="/"))

    def redirected(self, location: str) -> Url:
        """Where a `Location` header points. Raises `LocationError` for anything but http(s)."""
        try:
            joined = urljoin(self.target, location)
        except ValueError:
            raise LocationError(f"{self.shown}: redirects to a malformed address") from None
        url = parse_url(joined)
        if url.scheme not in HTTP_SCHEMES:
            raise LocationError(f"{self.shown}: redirects to a {url.scheme}: address")
        # Credentials in a redirect are the server's idea, not the user's.
        return replace(url, auth=None)


def parse_url(text: str) -> Url:
    """Parse and normalise. Raises `LocationError` for what is malformed or has another scheme."""
    try:
        parts = urlsplit(text)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode() if parts.hostname else ""
    except (ValueError, UnicodeError):
        # The error's own words may repeat a password.
        raise LocationError("a URL is malformed: expected scheme://host/path") from None
    scheme = parts.scheme.lower()
    if scheme not in HTTP_SCHEMES | OBJECT_SCHEMES:
        known = ", ".join(sorted(HTTP_SCHEMES | OBJECT_SCHEMES))
        raise LocationError(f"{scheme}: packages are not read from there; expected {known}")
    if not host and scheme not in ("file", "memory"):
        raise LocationError(f"{scheme}://: a URL without a host")
    # No character that another parser could take for the end of the host.
    if host and not (_HOST.fullmatch(host) or _is_ipv6(host)):
        raise LocationError(f"{scheme}://{host[:80]!r}: is no host's name or address")
    if any(ord(character) <= 32 or ord(character) == 127 for character in text):
        raise LocationError("a URL holds a space or a control character: percent-encode it")
    path = quote(parts.path, safe=_PATH_SAFE)
    if scheme in HTTP_SCHEMES:
        path = path or "/"
    auth = None
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        auth = "Basic " + base64.b64encode(secret.encode()).decode()
    return Url(scheme, host, port, path, parts.query, auth)


def parse_location(text: str) -> Url:
    """The URL of a package as a user names it: that of its manifest means the folder."""
    url = parse_url(text)
    if url.path.endswith("/" + MANIFEST_NAME):
        return replace(url, path=url.path[: -len(MANIFEST_NAME)])
    return url


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet.

    Private, loopback, link-local, multicast and reserved addresses are not, nor are IPv6
    forms that carry such an IPv4 address (mapped, 6to4, Teredo, the NAT64 prefix).
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
