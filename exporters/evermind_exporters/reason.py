"""What another library's exception says, for a message of our own."""

from __future__ import annotations

_MOST = 300


def reason(error: BaseException) -> str:
    """Its first line, and the second where that is a heading; at most 300 characters.

    Its type if it says nothing, or no more than a key.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"{type(error).__name__}: {lines[0]}"[:_MOST]
    heading = lines[0].endswith(":") and len(lines) > 1
    return " ".join(lines[: 2 if heading else 1])[:_MOST]
