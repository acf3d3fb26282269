"""The pure parts: which ranges to fetch, what an address is, what a Range header asks for."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
from evermind_manifests.errors import InputError, LocationError
from evermind_manifests.package import open_package
from evermind_runtime.serving.ranges import ByteRange, UnsatisfiableError, parse_ranges
from evermind_runtime.stores import RemoteOptions
from evermind_runtime.stores.blobs import Blob, blobs_by_path, plan_fetches
from evermind_runtime.stores.options import default_cache_bytes
from evermind_runtime.stores.urls import is_public, is_url, parse_location, parse_url
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packages import export, lm_source


@st.composite
def layouts(draw: st.DrawFn) -> list[Blob]:
    """Blobs that do not overlap, in one to three files, in any order; some wanted twice."""
    blobs = []
    for path in "abc"[: draw(st.integers(1, 3))]:
        at = 0
        for _ in range(draw(st.integers(0, 12))):
            at += draw(st.integers(0, 300))
            size = draw(st.integers(1, 400))
            digest = hashlib.sha256(f"{path}{at}".encode()).hexdigest()
            blobs.append(Blob(digest, path, at, size))
            at += size
    doubled = draw(st.lists(st.sampled_from(blobs), max_size=3)) if blobs else []
    return draw(st.permutations([*blobs, *doubled]))


@given(layouts(), st.integers(0, 200), st.integers(1, 2000))
def test_fetches(blobs: list[Blob], max_gap: int, max_bytes: int) -> None:
    fetches = plan_fetches(blobs, max_gap=max_gap, max_bytes=max_bytes)
    planned = [blob for fetch in fetches for blob in fetch.blobs]
    assert sorted(planned, key=str) == sorted(set(blobs), key=str)  # each once, none forgotten
    order = {blob.digest: at for at, blob in reversed(list(enumerate(blobs)))}
    urgency = [min(order[blob.digest] for blob in fetch.blobs) for fetch in fetches]
    assert urgency == sorted(urgency)
    for fetch in fetches:
        assert {blob.path for blob in fetch.blobs} == {fetch.path}
        assert fetch.offset == fetch.blobs[0].offset
        assert fetch.offset + fetch.bytes == fetch.blobs[-1].end
        assert len(fetch.blobs) == 1 or fetch.bytes <= max_bytes
        for one, other in pairwise(fetch.blobs):
            assert 0 <= other.offset - one.end <= max_gap
    # Nothing that could share a request has two: neighbours differ by gap or by size.
    for path in {fetch.path for fetch in fetches}:
        runs = sorted((f for f in fetches if f.path == path), key=lambda fetch: fetch.offset)
        for left, right in pairwise(runs):
            gap = right.offset - left.offset - left.bytes
            together = right.blobs[0].end - left.offset
            assert gap > max_gap or together > max_bytes


@pytest.mark.parametrize("layout", ["files", "pool"])
def test_blobs_cover_a_package(tmp_path: Path, layout: str) -> None:
    with open_package(export(lm_source(), tmp_path / "lm", layout=layout)) as package:
        manifest = package.manifest
    blobs = blobs_by_path(manifest)
    assert blobs.keys() == manifest.files.keys()
    assert sum(map(len, blobs.values())) == len(manifest.shards) + sum(
        not path.startswith("experts/") for path in manifest.files
    )
    for path, members in blobs.items():
        assert all(one.end <= other.offset for one, other in pairwise(members))
        assert members[-1].end <= manifest.files[path].bytes


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:0001::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_urls() -> None:
    url = parse_location(
        "HTTPS://us%40er:p%3Aw@Example.org:8443/a%20b/pkg/manifest.json?sig=secret"
    )
    assert url.shown == "https://example.org:8443/a%20b/pkg/"
    assert url.below("experts/größe x.moe0").target == (
        "https://example.org:8443/a%20b/pkg/experts/gr%C3%B6%C3%9Fe%20x.moe0?sig=secret"
    )
    assert "secret" not in url.shown
    assert url.auth == "Basic dXNAZXI6cDp3"
    assert url.redirected("/other").auth is None
    assert url.redirected("/x/manifest.json").path == "/x/manifest.json"
    assert url.redirected("//cdn.example.net/x").host == "cdn.example.net"
    assert url.origin == ("https", "example.org", 8443)
    assert parse_url("https://example.org").origin == ("https", "example.org", 443)
    assert not parse_url("s3://bucket/p/model.zip").is_folder
    for bad in ("file:///etc/passwd", "gopher://x/", "javascript://x", "http://[::1"):
        with pytest.raises(LocationError):
            url.redirected(bad)


@pytest.mark.parametrize(
    "host", ["a\\b", "%41", "a%b", "-a", "[v1.x%00]", "a,b", "a'b", "[::1%25eth0]", "a;b", "¨"]
)
def test_hosts_that_two_parsers_would_read_differently(host: str) -> None:
    with pytest.raises(LocationError):
        parse_url(f"http://{host}/")


@settings(max_examples=60)
@given(st.text(max_size=20).map("http://{}".format))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        url = parse_url(text)
    except LocationError:
        return
    assert parse_url(url.target).target == url.target


def test_paths_are_no_urls() -> None:
    assert not any(map(is_url, ("a/b", "/a", "C:\\x", "a:b", "./http://x", Path("http://x"), 3)))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-9", [(0, 10)]),
        ("bytes=90-", [(90, 100)]),
        ("bytes=-10", [(90, 100)]),
        ("bytes=-1000", [(0, 100)]),
        ("bytes=0-1000", [(0, 100)]),
        ("bytes=0-0, 99-99", [(0, 1), (99, 100)]),
        ("bytes=0-0, 100-", [(0, 1)]),
        ("lines=1-2", None),
        ("bytes=100-", UnsatisfiableError),
        ("bytes=-0", UnsatisfiableError),
        ("bytes=5-4", UnsatisfiableError),
        ("bytes=", UnsatisfiableError),
        ("bytes=-", UnsatisfiableError),
        ("bytes=a-b", UnsatisfiableError),
        ("bytes=0-99,0-99", UnsatisfiableError),
        ("bytes=" + ",".join(["0-0"] * 17), UnsatisfiableError),
        ("bytes=" + "9" * 30 + "-", UnsatisfiableError),
        ("bytes=٣-٤", UnsatisfiableError),
    ],
)
def test_range_headers(header: str | None, expected: object) -> None:
    if expected is UnsatisfiableError:
        with pytest.raises(UnsatisfiableError):
            parse_ranges(header, 100)
        return
    found = parse_ranges(header, 100)
    assert (found and [(one.begin, one.end) for one in found]) == expected


@given(st.text(alphabet="bytes=0123456789-, ", max_size=30), st.integers(0, 50))
def test_ranges_stay_inside(header: str, size: int) -> None:
    try:
        found = parse_ranges(header, size)
    except UnsatisfiableError:
        return
    for one in found or []:
        assert isinstance(one, ByteRange)
        assert 0 <= one.begin < one.end <= size


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (
        {"digest": "A" * 64},
        {"concurrency": 0},
        {"retries": -1},
        {"timeout": 0.0},
        {"cache_bytes": -1},
    ):
        with pytest.raises(InputError):
            RemoteOptions(**wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("EVERMIND_CACHE_SIZE", "2GiB")
    assert default_cache_bytes() == 2 << 30
    for wrong_size in ("10%", "much"):
        monkeypatch.setenv("EVERMIND_CACHE_SIZE", wrong_size)
        with pytest.raises(InputError, match="EVERMIND_CACHE_SIZE"):
            default_cache_bytes()
    monkeypatch.delenv("EVERMIND_CACHE_SIZE")
    for value, offline in (("1", True), ("0", False), ("", False), ("yes", True)):
        monkeypatch.setenv("EVERMIND_OFFLINE", value)
        assert RemoteOptions().offline is offline
