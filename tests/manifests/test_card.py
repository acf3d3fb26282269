"""The model card: useful front matter, and words that stay words."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
from evermind_manifests.card import render_card
from evermind_manifests.manifest import Card, Manifest, Tokenizer, ValueSpec
from hypothesis import given
from hypothesis import strategies as st

from tests.manifests.builders import tiny_manifest


def with_card(card: Card, **changes: str) -> Manifest:
    return msgspec.structs.replace(tiny_manifest(), card=card, **changes)


def front_matter(text: str) -> dict[str, object]:
    """Read the small part of YAML a card uses: `key: "scalar"` and lists of scalars."""
    assert text.startswith("---\n")
    block = text[4:].split("\n---\n")[0]
    found: dict[str, object] = {}
    key = ""
    for line in block.split("\n"):
        if line.startswith("- "):
            values = found[key]
            assert isinstance(values, list)
            values.append(scalar(line[2:]))
        else:
            key, _, value = line.partition(":")
            found[key] = scalar(value.strip()) if value else []
    return found


def scalar(text: str) -> str:
    # YAML's \UXXXXXXXX is the one escape JSON does not have.
    pairs = re.sub(
        r"\\U([0-9a-f]{8})", lambda match: json.dumps(chr(int(match[1], 16)))[1:-1], text
    )
    value = json.loads(pairs)
    assert isinstance(value, str)
    return value


def test_the_front_matter() -> None:
    card = Card(
        license="apache-2.0",
        tags=("tiny", "moe"),
        base_model="someone/base",
        datasets=("one", "two"),
        language=("en",),
    )
    assert front_matter(render_card(with_card(card))) == {
        "license": "apache-2.0",
        "library_name": "evermind-pack",
        "base_model": "someone/base",
        "datasets": ["one", "two"],
        "language": ["en"],
        "tags": ["moe", "onnx", "evermind-pack", "shared-expert-moe", "tiny"],
    }


def test_only_language_models_generate_text() -> None:
    layer = with_card(Card())
    ids = ValueSpec(dtype="i64", shape=("T",))
    logits = ValueSpec(dtype="f32", shape=("T", 8))
    plan = msgspec.structs.replace(
        layer.plan, inputs={"tokens": ids}, outputs={"logits": logits, **layer.plan.outputs}
    )
    for manifest, expected in ((msgspec.structs.replace(layer, plan=plan), True), (layer, False)):
        text = render_card(manifest)
        assert ("pipeline_tag" in front_matter(text)) == expected
        assert ("--max-new" in text) == expected


def test_the_body() -> None:
    text = render_card(tiny_manifest())
    assert "# tiny\n" in text
    assert "500 in all, 300 active per token" in text
    assert "| 0-1 | `ffn` | 3 | 2 | 448 bytes | f16, f32 |" in text
    assert "| `modelDim` | 4 |" in text
    assert "evermind-pack validate . --deep --run" in text
    assert text == render_card(tiny_manifest())
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", "[x](javascript:alert(1))"])
def test_words_do_not_become_markup(word: str) -> None:
    card = Card(description=word, training_summary=word, author=word, license=word)
    manifest = msgspec.structs.replace(
        with_card(card, name=word, version=word), config={word: word}
    )
    body = render_card(manifest).split("\n---\n", 1)[1]
    assert "<" not in body
    body = re.sub("`[^`\n]*`", "", body)
    assert "](" not in body.replace("\\](", "")


def test_a_family_cannot_leave_its_backticks() -> None:
    body = render_card(with_card(Card(), family="x` <b> | y"))
    assert "`x' &lt;b&gt; / y`" in body


TEXT = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from('\n\r"\\:#-[]{}&*!|>%@`\u2028\x85'),
    ),
    max_size=30,
)


@given(TEXT, st.lists(TEXT, max_size=3))
def test_any_words_are_read_back_from_the_front_matter(license: str, datasets: list[str]) -> None:
    text = render_card(with_card(Card(license=license, datasets=tuple(datasets))))
    found = front_matter(text)
    assert found["license"] == license
    assert found.get("datasets", []) == datasets
    assert text.split("\n---\n")[0].isascii()
    assert text.split("\n---\n")[0].replace("\n", "").isprintable()


def test_the_commands_fit_what_the_package_has() -> None:
    text = (
        {"tokens": ValueSpec(dtype="i64", shape=("T",))},
        {"logits": ValueSpec(dtype="f32", shape=("T", 9))},
    )
    plan = msgspec.structs.replace(tiny_manifest().plan, inputs=text[0], outputs=text[1])
    plain = msgspec.structs.replace(tiny_manifest(), plan=plan)
    tokenizer = Tokenizer(kind="tokenizers", file="tokenizer.json")
    templates = {"default": "chat_template.jinja"}
    chat = msgspec.structs.replace(tokenizer, chat_templates=templates)
    for found, extras, command in (
        (None, "cpu", "run . --tokens"),
        (tokenizer, "cpu,text", "run . --prompt"),
        (chat, "cpu,text", "run . --chat"),
    ):
        card = render_card(msgspec.structs.replace(plain, tokenizer=found))
        assert f"pip install 'evermind-pack[{extras}]'" in card
        assert command in card
