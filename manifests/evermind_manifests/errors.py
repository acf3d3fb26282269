"""Every error a package, its format or its runtime can raise.

One base, `EvermindPackError`; the leaves also inherit the builtin a caller would catch
anyway. A message names the file, the field, what was expected and what was found; `hint`
says what to do about it, and `exit_code` is what the command line ends with.
"""

from __future__ import annotations

from typing import ClassVar


class EvermindPackError(Exception):
    """Base of all errors raised on purpose; `str(error)` is written for the person who sees it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ManifestError(EvermindPackError, ValueError):
    """manifest.json is malformed or contradicts itself."""


class UnsupportedError(ManifestError):
    """The package asks for a schema, feature, dtype or file kind this version does not know."""


class PathError(ManifestError):
    """A path in a package is absolute, climbs out, or is not portable."""


class GraphError(ManifestError):
    """An ONNX file is malformed, or uses something that packages may not."""


class ShardError(EvermindPackError, ValueError):
    """A shard's header or layout is malformed or differs from what the manifest says."""

    exit_code: ClassVar[int] = 3


class IntegrityError(EvermindPackError, ValueError):
    """Stored bytes are not the bytes the manifest describes."""

    exit_code: ClassVar[int] = 3


class DigestError(IntegrityError):
    """A file's sha256 differs from the manifest's."""


class ShardDigestError(DigestError):
    """A shard's sha256 differs from the manifest's."""


class TruncatedError(IntegrityError, EOFError):
    """A file is shorter than the range that was to be read."""


class MissingFileError(IntegrityError, FileNotFoundError):
    """A file the manifest names is not there, or is not a regular file."""

    # OSError's own __str__ would hide the message.
    __str__ = EvermindPackError.__str__


class ChangedError(IntegrityError):
    """A file on a server was replaced while it was being read."""


class NetworkError(EvermindPackError, ConnectionError):
    """A server cannot be reached, refuses, or does not do what HTTP promises."""

    __str__ = EvermindPackError.__str__


class OfflineError(NetworkError):
    """Bytes are needed that are not in the cache, and the network may not be used."""


class LocationError(EvermindPackError, FileNotFoundError):
    """A place the user named does not exist, may not be read, or is no file or folder."""

    exit_code: ClassVar[int] = 2
    __str__ = EvermindPackError.__str__


class CheckpointError(EvermindPackError, ValueError):
    """A model file to read (checkpoint, safetensors, config.json) is malformed."""


class ConfigError(EvermindPackError, ValueError):
    """A model's or trainer's configuration cannot be honoured."""

    exit_code: ClassVar[int] = 2


class ExportError(EvermindPackError, RuntimeError):
    """A package could not be written."""


class ContentError(ExportError):
    """What would be written is wrong, and would be so again: it is not worth keeping."""


class InputError(EvermindPackError, ValueError):
    """An array, prompt or option handed in does not fit the model."""

    exit_code: ClassVar[int] = 2


class TemplateError(EvermindPackError, ValueError):
    """A chat template is malformed, fails, or takes more time or memory than it may."""


class BudgetError(EvermindPackError, ValueError):
    """The expert budget is too small for one step; the message gives the number that would do."""

    exit_code: ClassVar[int] = 2


class DeviceError(EvermindPackError, RuntimeError):
    """The device or thread setting asked for cannot be had here."""

    exit_code: ClassVar[int] = 2


class NonFiniteError(EvermindPackError, ArithmeticError):
    """A state or output that must stay finite became infinite or NaN."""


class ClosedError(EvermindPackError, ValueError):
    """A package or model was used after it had been closed."""


class ForkedError(EvermindPackError, RuntimeError):
    """A model was used in a process forked from the one that loaded it."""


class MissingExtraError(EvermindPackError, ImportError):
    """An optional dependency is needed; the message names the extra to install."""

    exit_code: ClassVar[int] = 2
    __str__ = EvermindPackError.__str__

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the Python package {module!r}, which is not installed",
            hint=f"Install it with: pip install 'evermind-pack[{extra}]'",
        )
