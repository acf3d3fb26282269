"""Text corpora as token arrays: gather files, choose a vocabulary, split off validation.

Everything here is a pure function of the files' contents and names, so that a corpus can be
built again to resume a run. The ready-made corpus is Python's own standard library.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from evermind_manifests.errors import ConfigError, InputError, MissingExtraError

END_OF_TEXT = "<|endoftext|>"
BYTE_VOCABULARY = 256

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
)
# Folders of the standard library whose files are tables and documentation, not programs.
LIBRARY_TABLES = frozenset({"encodings", "pydoc_data"})

# A byte vocabulary has no token to spare: a blank line ends a document.
_BYTE_SEPARATOR = b"\n\n"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and validation tokens, `(n,) int32`, and the vocabulary they are in.

    `tokenizer` is the content of a tokenizer.json, or `"bytes"`: token id = byte value.
    """

    train: npt.NDArray[np.int32]
    validation: npt.NDArray[np.int32]
    vocab_size: int
    tokenizer: bytes | Literal["bytes"]

    @property
    def sha256(self) -> str:
        """A digest of all tokens, to tell whether a run is resumed with its own data."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.validation):
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(tokens.tobytes())
        return digest.hexdigest()


def standard_library() -> Path:
    """The folder of Python's own library: several MB of well-kept source, on every machine."""
    return Path(sysconfig.get_path("stdlib"))


def read_documents(
    sources: Iterable[Path],
    *,
    suffixes: Collection[str] = (".py", ".txt", ".md"),
    skip_folders: Collection[str] = SKIPPED_FOLDERS,
    max_bytes: int = 4_000_000,
) -> list[str]:
    """The texts of files, and of files with a suffix in folders, up to about `max_bytes`.

    Folders named in `skip_folders` (tests, caches, installed packages) are left out, as are
    files that are not UTF-8. The order looks random but follows from paths inside each source,
    so a limit takes a fair sample and always the same one. Raises `InputError` when nothing
    was found.
    """
    found: list[tuple[str, Path]] = []
    for source in sources:
        if source.is_file():
            found.append((source.name, source))
            continue
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if name not in skip_folders]
            paths = [Path(folder, name) for name in names]
            found += [(p.relative_to(source).as_posix(), p) for p in paths if p.suffix in suffixes]
    found.sort(key=lambda item: (hashlib.sha256(item[0].encode()).digest(), item[0]))
    documents = []
    size = 0
    for _, path in found:
        if size >= max_bytes:
            break
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        size += len(text)
        documents.append(text)
    if not documents:
        raise InputError(f"corpus: no {', '.join(suffixes)} file was found in the sources")
    return documents


def build_corpus(
    documents: Sequence[str],
    *,
    vocab_size: int = BYTE_VOCABULARY,
    validation_fraction: float = 0.05,
) -> Corpus:
    """Tokenise documents: bytes for a `vocab_size` of 256, byte-level BPE for a larger one.

    Whole documents at the end become the validation part, at least one when there are two.
    Raises `ConfigError` for a smaller vocabulary, `MissingExtraError` without `tokenizers`.
    """
    if vocab_size < BYTE_VOCABULARY:
        raise ConfigError(
            f"vocab_size: expected {BYTE_VOCABULARY} (bytes) or more (BPE), found {vocab_size}"
        )
    held_out = min(max(1, round(len(documents) * validation_fraction)), len(documents) - 1)
    train, validation = (
        documents[: len(documents) - held_out],
        documents[len(documents) - held_out :],
    )
    if vocab_size == BYTE_VOCABULARY:
        return Corpus(_bytes(train), _bytes(validation), BYTE_VOCABULARY, "bytes")
    tokenizer = _train_bpe(train, vocab_size)
    return Corpus(
        _encode(tokenizer, train),
        _encode(tokenizer, validation),
        tokenizer.get_vocab_size(),
        tokenizer.to_str().encode(),
    )


def stream_windows(
    tokens: npt.NDArray[np.int32], *, seed: int, step: int, batch_size: int, window: int
) -> npt.NDArray[np.int32]:
    """`batch_size` windows of `window + 1` tokens at random places, `(B, window + 1) int32`.

    A pure function of its arguments: step n of a resumed run sees what it would have seen.
    Raises `InputError` when there are fewer tokens than one window.
    """
    places = len(tokens) - window
    if places < 1:
        raise InputError(f"corpus: expected more than {window} tokens, found {len(tokens)}")
    # A raw counter-based stream: numpy promises its bits, not those of Generator's methods.
    draws = np.random.Philox(key=[seed, step]).random_raw(batch_size)
    starts = (draws % np.uint64(places)).astype(np.int64)
    windows: npt.NDArray[np.int32] = tokens[starts[:, None] + np.arange(window + 1)]
    return windows


def _bytes(documents: Sequence[str]) -> npt.NDArray[np.int32]:
    joined = _BYTE_SEPARATOR.join(document.encode() for document in documents)
    return np.frombuffer(joined, dtype=np.uint8).astype(np.int32)


def _train_bpe(documents: Sequence[str], vocab_size: int) -> Any:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("tokenizers", "train", "A BPE vocabulary") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return tokenizer


def _encode(tokenizer: Any, documents: Sequence[str]) -> npt.NDArray[np.int32]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents)):
        tokens += encoding.ids
        tokens.append(end)
    return np.array(tokens, dtype=np.int32)
