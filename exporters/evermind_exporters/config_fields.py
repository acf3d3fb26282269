"""Take a configuration apart: every field is checked, none is passed over."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from evermind_manifests.errors import ConfigError

Value = TypeVar("Value")

# Dimensions are stored as u32 wherever a header has them.
MAX_DIM = 2**32 - 1


class ConfigFields:
    """The fields of a raw configuration, each read once; `finish` refuses what nobody read.

    A `default` of None means that the field must be there. All methods raise `ConfigError`
    naming `where`, the field, what was expected and what was found.
    """

    def __init__(self, where: str, raw: Mapping[str, Any]) -> None:
        self._where = where
        self._left = dict(raw)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_DIM
    ) -> int:
        """A whole number from `low` to `high`."""
        value = self._take(key, default)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key, f"an integer from {low} to {high}", value)
        return int(value)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> float:
        """A finite number from `low` to `high`."""
        value = self._take(key, default)
        found = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer may be beyond every float
                found = float(value)
        if not math.isfinite(found) or not low <= found <= high:
            self.refuse(key, f"a number from {low:g} to {high:g}", value)
        return found

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", value)
        return bool(value)

    def choice(
        self, key: str, options: Sequence[str], default: str | None = None, *, fold: bool = False
    ) -> str:
        """One of `options`; with `fold`, which are in lower case, in whatever case."""
        value = self._take(key, default)
        if fold and isinstance(value, str):
            value = value.lower()
        if not isinstance(value, str) or value not in options:
            self.refuse(key, f"one of {', '.join(options)}", value)
        return str(value)

    def refuse(self, key: str, expected: str, found: Any) -> None:
        """Raise the `ConfigError` for a value of `key`."""
        raise ConfigError(f"{self._where} config: {key}: expected {expected}, found {found!r}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._take(key, default)
        if not isinstance(value, str):
            self.refuse(key, "a text", value)
        return str(value)

    def fixed(self, key: str, value: Value) -> Value:
        """`value`, which may be stated but not changed."""
        found = self._left.pop(key, value)
        if type(found) is not type(value) or found != value:
            self.refuse(key, repr(value), found)
        return value

    def finish(self) -> None:
        """Raise `ConfigError` for fields that no one asked for."""
        if self._left:
            raise ConfigError(
                f"{self._where} config: unknown fields: {', '.join(sorted(self._left))}"
            )

    def _take(self, key: str, default: Any) -> Any:
        value = self._left.pop(key, default)
        if value is None:
            self.refuse(key, "a value", None)
        return value
