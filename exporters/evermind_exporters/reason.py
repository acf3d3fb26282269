"""What another library's exception says, for a message of our own."""

from __future__ import annotations

_MOST = 300


def reason(error: BaseException) -> str:
    """Its first line, at most 300 characters of it; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:_MOST] if lines else type(error).__name__
