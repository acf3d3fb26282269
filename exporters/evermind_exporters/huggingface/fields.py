"""Reading a `config.json`: fields by any of their names, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evermind_manifests.errors import ConfigError

_MOST = 2**31 - 1
_SHOWN = 80


class Fields:
    """A config's fields. What is null counts as absent, as in transformers."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, *names: str) -> bool:
        """Whether any of these is there."""
        return any(self.values.get(name) is not None for name in names)

    def count(
        self, *names: str, default: int | None = None, least: int = 0, most: int = _MOST
    ) -> int:
        """A whole number under the first of these names; a list of equal ones is that one.

        Raises `ConfigError` for anything else, and where there is none and no default.
        """
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(
                    f"{self.where}: {name}: expected a whole number from {least} to {most}, "
                    f"found {str(value)[:_SHOWN]}"
                )
            return value
        if default is None:
            raise ConfigError(f"{self.where}: expected the field {' or '.join(names)}")
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false. Raises `ConfigError` for anything else."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(
                f"{self.where}: {name}: expected true or false, found {str(value)[:_SHOWN]}"
            )
        return value

    def text(self, *names: str) -> str:
        """Text under the first of these names, or none."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if not isinstance(value, str):
                    raise ConfigError(
                        f"{self.where}: {name}: expected text, found {str(value)[:_SHOWN]}"
                    )
                return value
        return ""

    def texts(self, name: str, length: int) -> list[str] | None:
        """A list of so many texts, or nothing. Raises `ConfigError`."""
        value = self.values.get(name)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) < length
            or not all(isinstance(item, str) for item in value)
        ):
            raise ConfigError(f"{self.where}: {name}: expected {length} names, one for each layer")
        return value[:length]

    def counts(self, name: str) -> list[int]:
        """A list of whole numbers, by default empty. Raises `ConfigError`."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise ConfigError(f"{self.where}: {name}: expected a list of whole numbers")
        return value

    def within(self, name: str) -> Fields | None:
        """The object under this name, or nothing. Raises `ConfigError`."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {name}: expected an object")
        return Fields(value, f"{self.where}: {name}")
