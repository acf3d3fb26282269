"""Text to token ids and back: raw bytes, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from evermind_manifests.errors import InputError, MissingExtraError
from evermind_manifests.package import Package


class TextStream(Protocol):
    """Turns ids into text as they come; a character split over ids waits for its end."""

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly none."""

    def finish(self) -> str:
        """What is left at the end of the sequence."""


class TextCodec(Protocol):
    """A tokenizer."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, among the tokens that begin and end a text.

        Raises `InputError` for what is no Unicode text.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones written out."""

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""


class ByteCodec:
    """Token id = byte value."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(_unicode(text).encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Their UTF-8 text; malformed bytes become U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def stream(self) -> TextStream:
        """Decodes UTF-8; malformed bytes become U+FFFD."""
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < 256 else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class HuggingFaceCodec:
    """A `tokenizers` tokenizer.json, used as transformers does: whole texts, never padded or cut.

    What its post-processor puts around a text (a bos, mostly) is what `special` means.
    """

    def __init__(self, data: bytes, where: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtraError("tokenizers", "text", "This package's tokenizer") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:
            raise InputError(f"{where}: not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._decode_stream = tokenizers.decoders.DecodeStream

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; a special token's own text in it is that token."""
        ids: list[int] = self._tokenizer.encode(_unicode(text), add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special ones written out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def stream(self) -> TextStream:
        """Decodes with all special tokens left in."""
        return _HuggingFaceStream(self._tokenizer, self._decode_stream(skip_special_tokens=False))


class _HuggingFaceStream:
    def __init__(self, tokenizer: object, stream: object) -> None:
        self._tokenizer = tokenizer
        self._stream = stream
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        text: str | None = self._stream.step(self._tokenizer, token)  # type: ignore[attr-defined]
        self._pending = [] if text is not None else [*self._pending, token]
        return text or ""

    def finish(self) -> str:
        if not self._pending:
            return ""
        decode = self._tokenizer.decode  # type: ignore[attr-defined]
        return str(decode(self._pending, skip_special_tokens=False))


def open_codec(package: Package) -> TextCodec | None:
    """The package's tokenizer, or `None` if it has none."""
    spec = package.manifest.tokenizer
    if spec is None:
        return None
    if spec.kind == "bytes":
        return ByteCodec()
    assert spec.file is not None, "checked when the package was opened"
    return HuggingFaceCodec(package.read_file(spec.file), spec.file)


def _unicode(text: str) -> str:
    """`text`, unless it holds bytes that were no UTF-8 (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: not Unicode text: {error}") from error
    return text
