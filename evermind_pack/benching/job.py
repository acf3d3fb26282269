"""What one round is asked to do, and what it answers: plain values that cross a pipe as JSON."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from msgspec import Struct


class Job(Struct, frozen=True, kw_only=True):
    """Load `package`, run it once to warm up, then measure.

    `budget` is the most bytes experts may take (`None`: no budget). `prompt` holds the tokens
    of a package that generates; others get `prompt_tokens` rows of random inputs. `seed`
    chooses what is sampled. With `cold` the package's pages leave the page cache before it
    is loaded, and again before what is measured. `options` go to `load` as they are.
    """

    package: str
    budget: int | None
    prompt: list[int] | None
    prompt_tokens: int
    max_new: int
    seed: int
    temperature: float
    cold: bool
    options: dict[str, Any]


class Round(Struct, frozen=True, kw_only=True):
    """One round's figures. Seconds and bytes; those per token are of decoding only.

    `first_seconds` is the time to the first token of a model just loaded, nothing paged in;
    `ttft_seconds` that of the measured run. `disk_bytes` are what came from a disk and not
    from the page cache, `None` where the system does not tell. `rss_bytes` is the process's
    peak. `dropped` says whether the pages left the page cache, `None` if that was not asked.
    `io` is how experts were read, "direct" or "buffered", `plan` how they were held; `threads`
    computed. `warnings` are what loading warned of.
    """

    load_seconds: float
    first_seconds: float
    ttft_seconds: float
    decode_seconds: float
    cpu_seconds: float
    decoded: int
    tokens: list[int]
    hits: int
    misses: int
    bytes_read: int
    disk_bytes: int | None
    peak_expert_bytes: int
    resident_bytes: int
    rss_bytes: int | None
    dropped: bool | None
    io: str
    plan: str
    threads: int
    warnings: list[str]


class Failure(Struct, frozen=True, kw_only=True):
    """A round that raised: an error's class name, and what it says."""

    type: str
    message: str
    hint: str | None = None


def to_line(value: Struct) -> bytes:
    """One line of JSON. Not msgspec's: the bytes of a path need not be UTF-8."""
    return json.dumps(msgspec.to_builtins(value)).encode() + b"\n"
