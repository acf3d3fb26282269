"""Chat templates make the text, and their ids, that transformers makes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from evermind_manifests.errors import InputError, TemplateError
from evermind_runtime.chat import _checked
from evermind_runtime.template_process import TemplateProcess

pytest.importorskip("transformers")

from evermind_exporters.huggingface.text import read_text

from .chat_templates import CONVERSATIONS, FUNCTIONS, TEMPLATES
from .tokenizer_kinds import write_kind


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess()
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = write_kind(tmp_path_factory.mktemp("chat"), "byte-level")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(
    name: str, conversation: str, process: TemplateProcess, tokenizer: Any
) -> None:
    """With and without tools, a prompt for the answer, and what a template may read besides."""
    source, variables = TEMPLATES[name]
    messages = CONVERSATIONS[conversation]
    refused = 0
    for tools in (None, FUNCTIONS):
        for prompt in (False, True):
            for extra in ({}, variables):
                values = {**tokenizer.special_tokens_map, "documents": None, **extra}
                values |= {"messages": _checked(messages), "tools": tools}
                values |= {"add_generation_prompt": prompt}
                try:
                    expected = tokenizer.apply_chat_template(
                        messages,
                        tools=tools,
                        chat_template=source,
                        add_generation_prompt=prompt,
                        tokenize=False,
                        **extra,
                    )
                except (jinja2.TemplateError, TypeError) as error:
                    refused += 1
                    # `raise_exception` raises just this; what fails raises something more special.
                    kind = InputError if type(error) is jinja2.TemplateError else TemplateError
                    with pytest.raises(kind, match=re.escape(str(error))):
                        process.render(source, values)
                else:
                    assert process.render(source, values) == expected
    assert refused in (0, 8)


def test_the_corpus_is_mostly_rendered(tokenizer: Any) -> None:
    """Were all refused, the test above would prove nothing."""
    made = 0
    for source, _ in TEMPLATES.values():
        for messages in CONVERSATIONS.values():
            try:
                text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
            except (jinja2.TemplateError, TypeError):
                continue
            made += bool(text)
    assert made >= 50


def test_special_tokens_templates_and_ids_of_a_checkpoint(tmp_path: Path) -> None:
    """From a folder to ids: a bos of the template's own, and none of the tokenizer's."""
    from evermind_runtime.tokenizer import HuggingFaceCodec
    from transformers import AutoTokenizer

    write_kind(tmp_path, "byte-level")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": TEMPLATES["inst"][0]},
        {"name": "tool_use", "template": TEMPLATES["tools"][0]},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = read_text(tmp_path, 1000)
    assert text.tokenizer is not None
    assert text.tokenizer.chat_templates == {
        "default": "chat_template.jinja",
        "tool_use": "additional_chat_templates/tool_use.jinja",
    }
    codec = HuggingFaceCodec(text.files["tokenizer.json"], "tokenizer.json")
    messages = CONVERSATIONS["one"]
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    expected = theirs.apply_chat_template(messages, return_dict=False)
    assert codec.encode(rendered, special=False) == expected
    assert expected.count(theirs.bos_token_id) == 1
    assert codec.encode(rendered).count(theirs.bos_token_id) == 2


@pytest.mark.parametrize(
    ("template", "note"),
    [
        ("{% for x in %}", "line 1: Expected an expression"),
        ("{{ raise_exception('a system message first') }}", "a system message first"),
        ("{{ messages[0].content }}", None),
    ],
)
def test_an_import_says_which_template_will_fail(
    tmp_path: Path, template: str, note: str | None
) -> None:
    folder = write_kind(tmp_path, "byte-level")
    (folder / "chat_template.jinja").write_text(template)
    notes = [one for one in read_text(folder, 1000).notes if "--chat" in one]
    assert len(notes) == (note is not None)
    assert all((note or "") in one for one in notes)
