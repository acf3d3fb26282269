"""The peer's byte-level BPE as a Hugging Face tokenizer.json that gives the peer's ids.

The peer's own tokenizer.json export names GPT-2's splitting rule, which is not the one it
tokenizes with; so the file is made anew from vocabulary and merges, whichever files they
come from. Source: specs/evermind-formats.md, section 14. What differs all the same stands in
docs/peer.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from evermind_manifests.errors import CheckpointError, LocationError
from evermind_manifests.json_file import read_object

TOKENIZER_NAME: Final = "tokenizer.json"
VOCAB_NAME: Final = "vocab.json"
MERGES_NAME: Final = "merges.txt"
_MAX_ID = 2**32
_MAX_BYTES = 256 * 1024 * 1024

# JavaScript's \s: it has U+FEFF, and neither U+0085 nor U+001C to U+001F (section 14.2).
_SPACE: Final = "\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_PIECES: Final = "|".join(
    (
        "'s|'t|'re|'ve|'m|'ll|'d",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        rf" ?[^{_SPACE}\p{{L}}\p{{N}}]+[\r\n]*",
        rf"[{_SPACE}]*[\r\n]+",
        rf"[{_SPACE}]+(?![^{_SPACE}])",
        f"[{_SPACE}]+",
    )
)


def read_peer_tokenizer(path: Path) -> bytes:
    """A tokenizer.json from `path`: that file, or a folder with it or vocab.json and merges.txt.

    Raises `CheckpointError` for malformed files, `LocationError` where there are none. Ids
    beyond the model's vocabulary are allowed, as in the peer: running refuses them.
    """
    file = path / TOKENIZER_NAME if path.is_dir() else path
    if file.is_file():
        model = _read_text(file).get("model", {})
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise CheckpointError(f"{file}: model.merges: expected a list of merges")
        vocab, merges = model.get("vocab"), model["merges"]
    elif (path / VOCAB_NAME).is_file():
        file = path / VOCAB_NAME
        vocab, merges = (
            _read_text(file),
            _merge_lines(path / MERGES_NAME),
        )
    else:
        raise LocationError(
            f"{path}: expected {TOKENIZER_NAME}, or {VOCAB_NAME} with {MERGES_NAME}"
        )
    return peer_tokenizer(_checked(vocab, str(file)), _pairs(merges, str(file)))


def peer_tokenizer(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> bytes:
    """The tokenizer.json of a vocabulary (token to id) and its merges, in rank order.

    A merge whose result has no id is left out: `tokenizers` cannot hold it.
    """
    # The peer keeps the last rank of a repeated pair.
    ranked = dict.fromkeys(reversed(list(merges)))
    kept = [
        pair
        for pair in reversed(ranked)
        if pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab
    ]
    byte_level: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
    }
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # None: the peer does not recognise special tokens in text either.
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PIECES},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A piece that is a token is taken whole, merges or not.
            "ignore_merges": True,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": kept,
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _merge_lines(path: Path) -> list[str]:
    """The merges of a merges.txt: every line that begins with `#` is dropped, as the peer does."""
    try:
        lines = _read_bytes(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _pairs(merges: list[Any], where: str) -> list[tuple[str, str]]:
    pairs = []
    for number, merge in enumerate(merges):
        parts = merge.strip().split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and part for part in parts)
        ):
            raise CheckpointError(
                f"{where}: merge {number}: expected two tokens, found {str(merge)[:80]!r}"
            )
        pairs.append((parts[0], parts[1]))
    return pairs


def _checked(vocab: Any, where: str) -> dict[str, int]:
    if not isinstance(vocab, dict):
        raise CheckpointError(
            f"{where}: vocabulary: expected an object, found {type(vocab).__name__}"
        )
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < _MAX_ID:
            raise CheckpointError(
                f"{where}: token {token[:40]!r}: expected an id, a number from 0 on, "
                f"found {str(number)[:40]}"
            )
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{where}: vocabulary: two tokens have the same id")
    return vocab


def _read_text(path: Path) -> dict[str, Any]:
    """The object in a JSON file, all of it text: a lone surrogate, as an escape, is none."""
    value = read_object(path, _MAX_BYTES, CheckpointError)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    return value


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise LocationError(f"{path}: there is no such file")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path}: larger than the {_MAX_BYTES:,} bytes it may have")
    return path.read_bytes()
