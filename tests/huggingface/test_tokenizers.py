"""Tokenizers of imported packages give the ids and the text that transformers' do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evermind_manifests.errors import InputError
from evermind_runtime.tokenizer import HuggingFaceCodec

pytest.importorskip("transformers")

from evermind_exporters.huggingface.text import Text, read_text

from .tokenizer_kinds import KINDS, TEXTS, write_kind

VOCABULARY = 1000


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformers' tokenizer of a folder, what we import of it, and the folder."""
    from transformers import AutoTokenizer

    folder = write_kind(tmp_path_factory.mktemp("tokenizer"), request.param)
    return AutoTokenizer.from_pretrained(folder), read_text(folder, VOCABULARY), folder


def codec_of(text: Text) -> HuggingFaceCodec:
    assert text.tokenizer is not None
    assert text.tokenizer.file is not None
    return HuggingFaceCodec(text.files[text.tokenizer.file], "tokenizer.json")


def test_ids_are_those_of_transformers(pair: Any) -> None:
    theirs, text, _ = pair
    codec = codec_of(text)
    for one in TEXTS:
        assert codec.encode(one) == theirs(one).input_ids, one
        assert codec.encode(one, special=False) == theirs(one, add_special_tokens=False).input_ids


def test_text_is_that_of_transformers_whole_and_in_pieces(pair: Any) -> None:
    theirs, text, _ = pair
    codec = codec_of(text)
    for one in TEXTS:
        ids = codec.encode(one)
        expected = theirs.decode(ids)
        assert codec.decode(ids) == expected
        stream = codec.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == expected, one


def test_special_tokens_are_those_of_transformers(pair: Any) -> None:
    theirs, text, _ = pair
    assert text.tokenizer.special_tokens == theirs.special_tokens_map


def test_the_file_is_kept_where_transformers_uses_it_as_it_is(pair: Any) -> None:
    theirs, text, folder = pair
    same = text.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert same == (not any("is stored as transformers" in note for note in text.notes))
    if not same:
        assert len(theirs) == len(codec_of(text)._tokenizer.get_vocab())


def test_text_that_is_none_is_refused() -> None:
    codec = HuggingFaceCodec(KINDS["byte-level"][0]().to_str().encode(), "tokenizer.json")
    with pytest.raises(InputError, match="not Unicode"):
        codec.encode("a\ud800b")


def test_a_tokenizer_that_transformers_misreads_is_taken_from_its_file(tmp_path: Path) -> None:
    """OLMoE's class is byte pairs whatever the file is."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "blue": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "blue"}')
    text = read_text(tmp_path, 3)
    assert codec_of(text).encode("blue red x") == [2, 1, 0]
    assert any("WordLevel" in note for note in text.notes)
    assert text.generation.stop_tokens == (2,)
    assert text.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def test_one_that_transformers_cannot_load_is_taken_from_its_file(tmp_path: Path) -> None:
    write_kind(tmp_path, "byte-level")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    (tmp_path / "own.py").write_text("raise SystemExit('code of a checkpoint was run')")
    text = read_text(tmp_path, VOCABULARY)
    assert any("cannot be loaded by transformers" in note for note in text.notes), text.notes
    assert text.tokenizer is not None
    assert text.tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "eos_token_id": 1}')
    text = read_text(tmp_path, 3)
    assert text.tokenizer is None
    assert text.notes == ("the checkpoint has no tokenizer: `run` will take --tokens, and no text",)
    assert text.generation.stop_tokens == (1,)
