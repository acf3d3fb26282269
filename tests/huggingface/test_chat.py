"""An imported model with a tokenizer and a chat template: text in, text out, turn by turn."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evermind_runtime
import pytest
from evermind_manifests.errors import InputError
from evermind_runtime import Chat, Model

from evermind_pack.cli import main
from tests.cli.command_line import call
from tests.packages import export, lm_source

from .chat_templates import FUNCTIONS, TOOLS
from .tiny import ARCHITECTURES, make
from .tokenizer_kinds import write_kind

pytest.importorskip("transformers")

CHATML = """\
{%- for message in messages -%}
    {%- if message.role == 'narrator' %}{{ raise_exception('no narrators') }}{% endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
{{- '(' + mood + ')' if mood -}}
"""
PROMPT = "Hällo wörld, it's 日本 👍🏽!"
NEW = 12


class Made:
    """A checkpoint with all that belongs to text, what transformers makes of it, and ours."""

    def __init__(self, folder: Path) -> None:
        from evermind_exporters.huggingface.import_ import import_checkpoint
        from transformers import AutoTokenizer

        self.checkpoint, self.package = folder / "checkpoint", folder / "package"
        form = {**ARCHITECTURES["mixtral"], "vocab_size": 420}
        self.model = make(self.checkpoint, "mixtral", form=form)
        config = json.loads((self.checkpoint / "config.json").read_text())
        write_kind(self.checkpoint, "byte-level")
        (self.checkpoint / "config.json").write_text(json.dumps(config))
        additional = self.checkpoint / "additional_chat_templates"
        additional.mkdir()
        (additional / "tool_use.jinja").write_text(TOOLS)
        (self.checkpoint / "chat_template.jinja").write_text(CHATML)
        self.tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        said = {"eos_token_id": [end, 2], "bos_token_id": 0, "max_new_tokens": NEW, "top_k": 9}
        (self.checkpoint / "generation_config.json").write_text(json.dumps(said))
        self.stops = [end, 2]
        self.result = import_checkpoint(self.checkpoint, self.package)

    def greedy(self, ids: list[int]) -> list[int]:
        """What transformers says next."""
        import torch

        found = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),  # else a bos that is the padding is hidden
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=self.stops,
        )
        result: list[int] = found[0].tolist()
        return result[len(ids) :]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("talking"))


@pytest.fixture
def model(made: Made) -> Iterator[Model]:
    with evermind_runtime.load(made.package) as found:
        yield found


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def shown(made: Made, tokens: list[int]) -> str:
    """An answer's text: without the token that ends it."""
    ended = tokens[:-1] if tokens[-1] in made.stops else tokens
    text: str = made.tokenizer.decode(ended)
    return text


def test_the_package_has_all_that_belongs_to_text(made: Made) -> None:
    assert made.result.notes == ()
    manifest = json.loads((made.package / "manifest.json").read_bytes())
    assert manifest["tokenizer"] == {
        "kind": "tokenizers",
        "file": "tokenizer.json",
        "chat_templates": {
            "default": "chat_template.jinja",
            "tool_use": "additional_chat_templates/tool_use.jinja",
        },
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    said = {"stop_tokens": made.stops, "bos_token": 0, "max_new_tokens": NEW, "top_k": 9}
    assert manifest["generation"] == said
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (made.package / name).read_bytes() == (made.checkpoint / name).read_bytes()


def test_a_prompt_is_continued_as_transformers_does(made: Made, capsys: Any) -> None:
    ids = made.tokenizer(PROMPT).input_ids
    assert ids[0] == 0
    code, out, _ = call(capsys, "run", made.package, "--prompt", PROMPT, "--json")
    result = json.loads(out)
    assert (code, result["tokens"]) == (0, made.greedy(ids))
    assert result["text"] == made.tokenizer.decode(result["tokens"])
    code, out, _ = call(capsys, "run", made.package, "--prompt", PROMPT, "-q")
    assert out == PROMPT + result["text"] + "\n"
    # Nothing at all begins with the bos as well.
    code, out, _ = call(capsys, "run", made.package, "--tokens", "", "--json")
    assert json.loads(out)["tokens"] == made.greedy([0])


def test_a_text_that_goes_on_gets_no_second_bos(made: Made, model: Model) -> None:
    state = model.new_state()
    list(model.generate("hello ", max_new_tokens=0, state=state))
    assert state.fresh
    first = [piece.token for piece in model.generate("hello ", max_new_tokens=2, state=state)]
    assert not state.fresh
    second = [piece.token for piece in model.generate("world", max_new_tokens=3, state=state)]
    encode = made.tokenizer.encode
    told = [*encode("hello "), first[0], *encode("world", add_special_tokens=False)]
    assert second == made.greedy(told)[:3]


def test_an_answer_is_that_of_transformers(made: Made, capsys: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user(PROMPT)]
    ids = made.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    chat = ("run", made.package, "--chat", "--system", "Be brief.", "--prompt", PROMPT)
    code, out, _ = call(capsys, *chat, "--json")
    result = json.loads(out)
    assert (code, result["tokens"], result["prompt_tokens"]) == (0, made.greedy(ids), len(ids))
    assert result["text"] == shown(made, result["tokens"])
    code, out, err = call(capsys, *chat)
    assert (code, out) == (0, result["text"] + "\n")
    assert "tokens/s" in err


def test_a_stop_token_ends_an_answer_and_is_not_shown(made: Made, model: Model) -> None:
    pieces = list(model.chat().answer([user("hello")], stop_tokens=[]))
    at = next(i for i in range(1, NEW) if pieces[i].token not in [p.token for p in pieces[:i]])
    stopped = list(model.chat().answer([user("hello")], stop_tokens=[pieces[at].token]))
    assert [one.token for one in stopped] == [one.token for one in pieces[: at + 1]]
    expected = made.tokenizer.decode([one.token for one in pieces[:at]])
    assert "".join(one.text for one in stopped) == expected


def test_messages_with_tools_and_variables(made: Made, model: Model, tmp_path: Path) -> None:
    theirs = made.tokenizer
    messages = [user("hello")]
    assert model.render(messages, mood="calm") == theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, mood="calm"
    )
    expected = theirs.apply_chat_template(messages, tools=FUNCTIONS, tokenize=False)
    assert model.render(messages, tools=FUNCTIONS) == expected
    assert "<tools>" in expected
    assert model.render(messages, tools=FUNCTIONS, template="default") == model.render(messages)
    with pytest.raises(InputError, match="no chat template 'rag', only default, tool_use"):
        model.render(messages, template="rag")
    with pytest.raises(InputError, match="refuses them: no narrators"):
        model.render([{"role": "narrator", "content": "x"}])
    for bad in ([], "hello", [{"content": "x"}], ["x"]):
        with pytest.raises(InputError, match="messages"):
            model.render(bad)  # type: ignore[arg-type]


def conversation(chat: Chat, turns: int = 3, **choices: Any) -> list[list[int]]:
    """Some turns; the tokens of each answer."""
    messages, found = [], []
    for turn in range(turns):
        messages.append(user(f"question {turn}: {PROMPT}"))
        pieces = list(chat.answer(messages, **choices))
        messages.append({"role": "assistant", "content": "".join(one.text for one in pieces)})
        found.append([one.token for one in pieces])
    return found


class Forgetful(Chat):
    """Runs every prompt from its beginning."""

    def answer(self, *args: Any, **choices: Any) -> Any:
        self._state = None
        return super().answer(*args, **choices)


@pytest.mark.parametrize("choices", [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}])
def test_what_was_run_is_kept_and_changes_nothing(model: Model, choices: dict[str, Any]) -> None:
    kept, forgetful = model.chat(), Forgetful(model)
    assert conversation(kept, **choices) == conversation(forgetful, **choices)
    assert 0 < kept.reused_tokens < kept.prompt_tokens
    assert forgetful.reused_tokens == 0
    # The penalty counts tokens that were not run again.
    penalised = {**choices, "repetition_penalty": 1.5}
    assert conversation(kept, **penalised) == conversation(forgetful, **penalised)


def test_an_answer_that_is_tokenised_as_it_was_made_is_kept_too(model: Model) -> None:
    assert model.codec is not None
    for seed in range(200):
        chat = model.chat()
        messages = [user("hello")]
        choices: dict[str, Any] = {"temperature": 1.5, "seed": seed, "max_new_tokens": 3}
        pieces = list(chat.answer(messages, **choices))
        tokens, text = [one.token for one in pieces], "".join(one.text for one in pieces)
        messages += [{"role": "assistant", "content": text}, user("more")]
        ids = model.codec.encode(model.render(messages), special=False)
        begin = chat.prompt_tokens
        if ids[begin : begin + 2] == tokens[:2]:
            break
    else:
        pytest.fail("no seed makes a text that is tokenised as it was made")
    again = list(chat.answer(messages, max_new_tokens=4))
    assert chat.reused_tokens == begin + 2
    assert again == list(model.chat().answer(messages, max_new_tokens=4))


def test_a_conversation_that_was_changed_is_run_anew(model: Model) -> None:
    chat = model.chat()
    list(chat.answer([user("one two three")]))
    other = list(chat.answer([user("something else")]))
    assert chat.reused_tokens == 0
    assert other == list(model.chat().answer([user("something else")]))


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_answer_that_is_broken_off_leaves_a_sound_conversation(
    model: Model, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the step, before its token is told: the worst moment."""
    chat, messages = model.chat(), [user("hello")]
    decode, calls = Model.decode, []

    def broken(self: Model, *args: Any) -> Any:
        found = decode(self, *args)
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Model, "decode", broken)
        with pytest.raises(KeyboardInterrupt):
            list(chat.answer(messages))
    messages = [*messages, {"role": "assistant", "content": "so"}, user("again")]
    found = list(chat.answer(messages))
    assert chat.reused_tokens > 0 or at == 0
    assert found == list(model.chat().answer(messages))


def test_a_loop_that_is_left_early_goes_on_where_it_was(model: Model) -> None:
    chat, messages = model.chat(), [user("hello")]
    for number, _ in enumerate(chat.answer(messages)):
        if number == 3:
            break
    messages = [*messages, {"role": "assistant", "content": "so"}, user("again")]
    assert list(chat.answer(messages)) == list(model.chat().answer(messages))


def test_an_answer_does_not_go_on_after_the_next_has_begun(model: Model) -> None:
    chat, messages = model.chat(), [user("hello")]
    first, waiting = chat.answer(messages), chat.answer(messages)
    with pytest.raises(InputError, match="a later one has begun"):
        next(first)
    next(waiting)
    expected = list(chat.answer([user("other")]))
    with pytest.raises(InputError, match="a later one has begun"):
        next(waiting)
    assert list(chat.answer([user("other")])) == expected


def test_a_conversation_from_a_pipe(
    made: Made, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["question 0: " + PROMPT, "", "question 1: " + PROMPT]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, err = call(capsys, "run", made.package, "--chat")
    with evermind_runtime.load(made.package) as model:
        answers = conversation(model.chat(), 2)
    assert (code, out) == (0, "".join(shown(made, one) + "\n" for one in answers))
    remarks = [line for line in err.splitlines() if "prompt tokens had been read" in line]
    assert re.search(r"; 0 of \d+ prompt", remarks[0])
    assert re.search(r"; [1-9]\d* of \d+ prompt", remarks[1])


def test_a_person_may_interrupt_an_answer_and_go_on(
    made: Made, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in an answer ends it after a token; at the prompt it does nothing; Ctrl-D ends all."""
    typed: list[Any] = ["hello", KeyboardInterrupt(), "hello", EOFError()]

    def type_in(_: str) -> str:
        found = typed.pop(0)
        if isinstance(found, BaseException):
            raise found
        return str(found)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    decode, calls = Model.decode, []

    def interrupted(self: Model, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(self, *args)

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(Model, "decode", interrupted)
    code, out, err = call(capsys, "run", made.package, "--chat")
    assert code == 0
    assert err.startswith("[4 tokens") or "\n[4 tokens" in err
    assert out.endswith("\n\n")
    assert len(calls) > 4
    assert typed == []


def test_a_file_of_messages(made: Made, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    messages = [user("one"), {"role": "assistant", "content": "two"}, user("three")]
    path.write_text(json.dumps(messages))
    run = ("run", made.package, "--chat", "--messages", path, "--json")
    plain = json.loads(call(capsys, *run)[1])
    path.write_text(json.dumps({"messages": messages[:2], "variables": {"mood": "calm"}}))
    moody = json.loads(call(capsys, *run, "--prompt", "three")[1])
    assert moody["prompt_tokens"] > plain["prompt_tokens"]
    path.write_text(json.dumps({"messages": messages, "tools": FUNCTIONS}))
    assert json.loads(call(capsys, *run)[1])["prompt_tokens"] > 100
    for bad, message in [
        ("{", "not JSON"),
        ('{"tools": []}', "expected a list of messages"),
        ('{"messages": [], "x": 1}', "'x': expected one of"),
        ('["hello"]', "messages: expected a list of objects"),
        ('{"messages": [], "variables": []}', "variables: expected an object"),
        ('{"messages": [{"role": "user"}], "variables": {"tools": 1}}', "'tools' has a meaning"),
        ("[]", "a list of one or more"),
        ('[{"role": "narrator", "content": "x"}]', "no narrators"),
    ]:
        path.write_text(bad)
        code, out, _ = call(capsys, *run)
        assert (code, message in json.loads(out)["error"]["message"]) == (2, True), out


def test_what_does_not_go_together_is_refused(made: Made, capsys: Any, tmp_path: Path) -> None:
    package = made.package
    path = tmp_path / "talk.json"
    path.write_text('[{"role": "system", "content": "x"}]')
    for arguments, message in [
        ((package, "--system", "x", "--prompt", "y"), "--system needs --chat"),
        ((package, "--chat", "--json"), "needs --prompt"),
        ((package, "--chat", "--tokens", "1"), "--tokens has no meaning with --chat"),
        ((package, "--chat", "--state-out", "x"), "--state-out has no meaning with --chat"),
        ((package, "--chat", "--messages", path, "--system", "y"), "a system message already"),
        ((package, "--chat", "--messages", tmp_path / "none"), "no such folder or file"),
        ((package, "--prompt", "x", "--top-p", 0.5), "no effect"),
        ((package,), "expected one of --prompt"),
    ]:
        code, out, err = call(capsys, "run", *arguments)
        assert (code, message in out + err) == (2, True), err
    plain = export(lm_source(), tmp_path / "plain")
    code, _, err = call(capsys, "run", plain, "--chat", "--prompt", "x")
    assert (code, "no chat template" in err) == (2, True)


def test_help_says_where_defaults_come_from(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--top-k K", "--top-p P", "--min-p P", "--repetition-penalty X"):
        assert re.search(rf"{option} [^-]*\(default: the package's\)", text), option
