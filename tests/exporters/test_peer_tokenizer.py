"""The peer's BPE files as a `tokenizers` file: the golden ids, and every known difference."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
from evermind_exporters.peer_tokenizer import peer_tokenizer, read_peer_tokenizer
from evermind_manifests.errors import CheckpointError, LocationError


def opened(data: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(data)


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(params=["vocab.json", "tokenizer.json", "tokenizer.json itself"])
def tokenizer(request, golden, tmp_path):
    folder = golden("tokenizer").folder
    if request.param == "tokenizer.json itself":
        return opened(read_peer_tokenizer(folder / "tokenizer.json"))
    for name in ("merges.txt", request.param):
        shutil.copy(folder / name, tmp_path)
    return opened(read_peer_tokenizer(tmp_path))


def test_every_golden_text_has_the_peers_ids(golden, tokenizer):
    cases = golden("tokenizer").json["encode"]
    assert len(cases) > 8
    for case in cases:
        assert encode(tokenizer, case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]


def test_unknown_ids_are_skipped_and_specials_decode_to_their_text(golden, tokenizer):
    for case in golden("tokenizer").json["decode"]:
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]


def test_the_peers_own_file_splits_text_in_another_way(golden):
    # Why we write the file anew: numbers, and line breaks after punctuation.
    exported = opened(golden("tokenizer").bytes("tokenizer.json"))
    assert exported.pre_tokenizer.pre_tokenize_str("123456") != [
        ("123", (0, 3)),
        ("456", (3, 6)),
    ]
    ours = opened(read_peer_tokenizer(golden("tokenizer").folder))
    pieces = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("123456 x=1;\n\ny")]
    assert pieces == ["123", "456", "Ġx", "=", "1", ";ĊĊ", "y"]


def test_special_tokens_in_text_are_plain_text(golden, tokenizer):
    assert 1 not in encode(tokenizer, "<|im_start|>user")


@pytest.mark.parametrize("space", ["\ufeff", "\u00a0", "\u2003", "\x0b"])
def test_javascript_spaces_are_spaces(tokenizer, space):
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(f"a{space}{space}{space}b")
    assert len(pieces) == 3


@pytest.mark.parametrize("character", ["\u0085", "\x1c", "\x1f"])
def test_what_python_calls_space_and_javascript_does_not(tokenizer, character):
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(f"a!{character}")
    assert len(pieces) == 2


VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "#": 5, "##": 6}


def test_a_piece_that_is_a_token_is_taken_whole():
    tokenizer = opened(peer_tokenizer(VOCAB, [("b", "c")]))
    assert encode(tokenizer, "abc") == [4]


def test_characters_without_a_token_are_dropped():
    assert encode(opened(peer_tokenizer(VOCAB, [("a", "b")])), "xab!") == [3]


def test_a_repeated_merge_keeps_its_last_rank():
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    merges = [("a", "b"), ("b", "c"), ("a", "b")]
    assert encode(opened(peer_tokenizer(vocab, merges)), "abc") == [0, 4]


def test_a_merge_without_an_id_is_left_out():
    # The peer would merge "c" and "d", find no id and fall back to both characters: the same
    # ids here. They differ where a later merge would have used the result.
    vocab = {"c": 0, "d": 1}
    assert encode(opened(peer_tokenizer(vocab, [("c", "d")])), "cd") == [0, 1]


def test_hash_lines_of_a_merges_file_vanish(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n# #\na b\n\n")
    tokenizer = opened(read_peer_tokenizer(tmp_path))
    assert encode(tokenizer, "#") == [5]
    assert encode(tokenizer, "###") == [5, 5, 5]


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("[]", "", "expected a JSON object"),
        ('{"a": 4294967296}', "", "expected an id"),
        ('{"a": -1}', "", "expected an id"),
        ('{"a": 1.0}', "", "expected an id"),
        ('{"a": 1, "b": 1}', "", "same id"),
        ('{"a": 1', "", "not JSON"),
        ('{"\\ud800": 1}', "", "not JSON"),
        ("[" * 100_000, "", "not JSON"),
        ('{"a": 1}', "a", "merge 0: expected two tokens"),
        ('{"a": 1}', "a b c", "merge 0: expected two tokens"),
        ('{"a": 1}', b"\xff", "not UTF-8"),
    ],
)
def test_malformed_files_are_refused(tmp_path, vocab, merges, message):
    (tmp_path / "vocab.json").write_text(vocab)
    data = merges if isinstance(merges, bytes) else merges.encode()
    (tmp_path / "merges.txt").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_peer_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"model": 3}', '{"model": {"vocab": {}}}', "{}", '{"model":{"merges":[1]}}']
)
def test_malformed_tokenizer_json_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_peer_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(LocationError, match=r"vocab\.json with merges\.txt"):
        read_peer_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(LocationError, match=r"merges\.txt"):
        read_peer_tokenizer(tmp_path)
