"""Defaults for generation: read as transformers reads them, what is not carried is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evermind_exporters.huggingface.chat_templates import read_chat_templates
from evermind_exporters.huggingface.generation_config import ReadGeneration, read_generation
from evermind_manifests.errors import CheckpointError
from evermind_manifests.manifest import Generation


def read(
    folder: Path,
    generation: dict[str, Any] | None,
    config: dict[str, Any] | None = None,
    **more: Any,
) -> ReadGeneration:
    (folder / "config.json").write_text(json.dumps(config or {}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_generation(folder, 100, **more)


def test_all_that_is_carried(tmp_path: Path) -> None:
    said = {
        "do_sample": True,
        "eos_token_id": [7, 9, 7],
        "bos_token_id": 5,
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "transformers_version": "5.23.0",
        "num_beams": 1,
        "max_length": 20,
        "no_repeat_ngram_size": None,
    }
    assert read(tmp_path, said) == (
        Generation(
            stop_tokens=(7, 9),
            bos_token=5,
            temperature=0.6,
            top_k=20,
            top_p=0.95,
            min_p=0.05,
            repetition_penalty=1.05,
            max_new_tokens=2048,
        ),
        (),
    )


def test_what_is_left_open_is_what_transformers_takes(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    found = read(tmp_path, {"do_sample": True}).generation
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(found, name) == defaults[name], name
    assert defaults["do_sample"] is False
    assert read(tmp_path, {}).generation.temperature == 0


def test_every_field_of_transformers_is_known(tmp_path: Path) -> None:
    """A field that a later version adds, and that changes texts, must be looked at."""
    from evermind_exporters.huggingface.generation_config import _NOT_CARRIED, _WITHOUT_EFFECT
    from transformers import GenerationConfig

    known = set(_NOT_CARRIED) | _WITHOUT_EFFECT
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= known, fields - known
    # The neutral values are those that transformers takes by default.
    defaults = GenerationConfig._get_default_generation_params()
    assert read(tmp_path, defaults).notes == ()


def test_greedy_unless_it_says_to_sample(tmp_path: Path) -> None:
    generation, notes = read(tmp_path, {"temperature": 0.6, "top_p": 0.9})
    assert (generation.temperature, generation.top_p) == (0.0, 0.9)
    assert len(notes) == 1
    assert "temperature 0.6" in notes[0]


def test_stop_tokens_have_four_places(tmp_path: Path) -> None:
    nested = {"text_config": {"eos_token_id": 2, "bos_token_id": 1}}
    assert read(tmp_path, None, {}, eos=6).generation.stop_tokens == (6,)
    assert read(tmp_path, None, nested, eos=6).generation.stop_tokens == (2,)
    assert read(tmp_path, None, nested).generation.bos_token == 1
    assert read(tmp_path, None, {"eos_token_id": 3} | nested).generation.stop_tokens == (3,)
    config = {"eos_token_id": 3}
    assert read(tmp_path, {"top_k": 5}, config).generation.stop_tokens == (3,)
    assert read(tmp_path, {"eos_token_id": 0}, config).generation.stop_tokens == (0,)
    generation, notes = read(tmp_path, {"eos_token_id": [4, 500]}, config)
    assert generation.stop_tokens == (4,)
    assert "[500]" in notes[0]


def test_config_json_stands_in_but_only_for_what_it_knows_of_generation(tmp_path: Path) -> None:
    old = {"do_sample": True, "temperature": 0.7, "vocab_size": 96, "num_beams": 4}
    generation, notes = read(tmp_path, None, old)
    assert generation.temperature == 0.7
    assert notes == ("config.json: num_beams: 4 is not carried",)


def test_what_is_not_carried_is_named(tmp_path: Path) -> None:
    said = {"num_beams": 4, "no_repeat_ngram_size": 3, "stop_strings": ["END"], "own_idea": 1}
    _, notes = read(tmp_path, said)
    assert [note.split(": ")[1] for note in notes] == list(said)


@pytest.mark.parametrize(
    "bad",
    [
        {"eos_token_id": "4"},
        {"eos_token_id": [4, True]},
        {"eos_token_id": -1},
        {"bos_token_id": 1.5},
        {"do_sample": 1},
        {"temperature": -0.1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.01},
        {"min_p": -0.5},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2**40},
    ],
)
def test_bad_values_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(bad))):
        read(tmp_path, bad)


def test_chat_templates_are_read_from_where_transformers_reads_them(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert read_chat_templates(tmp_path) == {}
    config.write_text(json.dumps({"chat_template": "one é"}))
    assert read_chat_templates(tmp_path) == {"default": "one é".encode()}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert read_chat_templates(tmp_path) == {"default": b"a", "tool_use": b"b"}
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert read_chat_templates(tmp_path) == {"default": b"file", "rag": b"rag"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "expected a text"),
        ([{"name": "default"}], "expected a text"),
        ([{"name": "../x", "template": "a"}], "a name of letters"),
        ("a\ud800", "not UTF-8"),
        ("x" * (2**20 + 1), "at most 1,048,576 bytes"),
        ([{"name": f"n{i}", "template": ""} for i in range(33)], "at most 32"),
    ],
)
def test_templates_that_are_none_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=message):
        read_chat_templates(tmp_path)


def test_a_missing_tokenizer_is_told_of_beside_other_notes(tmp_path: Path) -> None:
    from evermind_exporters.huggingface.text import read_text

    read(tmp_path, {"num_beams": 4})
    notes = read_text(tmp_path, 100).notes
    assert any("num_beams" in note for note in notes)
    assert any("has no tokenizer" in note for note in notes)
