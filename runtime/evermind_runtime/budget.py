"""Memory budgets: what a user writes, and what a package needs. Pure."""

from __future__ import annotations

import re

from evermind_manifests.errors import BudgetError
from evermind_manifests.manifest import Manifest

from .layers import all_bytes, cycle_bytes, expert_layers, step_bytes

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_MOST = 2.0**53
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*")


def parse_budget(text: str | int, manifest: Manifest) -> int:
    """Bytes for `"64MiB"`, `"1.5GB"`, `"25%"` of all expert bytes, or a plain number.

    Raises `BudgetError` for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    return parse_size(text, total_expert_bytes(manifest))


def parse_size(text: object, total: int | None, field: str = "budget") -> int:
    """The same where shares are of `total` bytes; `None` where there is nothing to share.

    Raises `BudgetError`, naming `field`.
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "?")
    units: dict[str, float] = {**_UNITS}
    expected = "bytes, or a size like '256MiB' or '2GB'"
    if total is not None:
        units["%"] = total / 100
        expected = "bytes, a size like '256MiB' or '2GB', or a share like '25%'"
    if unit not in units or number > _MOST:
        raise BudgetError(f"{field}: expected {expected}, found {str(text)[:80]!r}")
    return int(number * units[unit])


def total_expert_bytes(manifest: Manifest) -> int:
    """What all experts take when every one is resident."""
    return all_bytes(expert_layers(manifest))


def working_set_bytes(manifest: Manifest) -> int:
    """The least budget that works: slots for the experts one token needs in one layer."""
    return step_bytes(expert_layers(manifest))


def token_cycle_bytes(manifest: Manifest) -> int:
    """The experts one token passes through, over all layers."""
    return cycle_bytes(expert_layers(manifest))


def check_budget(budget: int, manifest: Manifest) -> None:
    """Raise `BudgetError`, with the number that would do, if not even one step fits."""
    needed = working_set_bytes(manifest)
    if budget < needed:
        raise BudgetError(
            f"budget: {budget:,} bytes cannot hold the experts of one step, "
            f"which take {needed:,} bytes",
            hint=f"Give at least {needed} bytes; {token_cycle_bytes(manifest)} hold all the "
            f"experts one token passes through.",
        )
