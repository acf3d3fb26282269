"""Conversations: messages through a chat template, and a state that is kept between answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from evermind_manifests.errors import InputError, TemplateError
from evermind_manifests.manifest import Generation
from evermind_manifests.package import Package

from .generation import Piece, generate
from .sampling import Sampling
from .template_process import TemplateProcess

if TYPE_CHECKING:
    from .model import Model
    from .state import Mark, State

#: `role` and `content`, and whatever else a template reads; what JSON can hold.
Message: TypeAlias = Mapping[str, Any]

MAX_TEMPLATE_BYTES = 1 << 20
# An answer ends by itself; as many tokens as a text gets by default would cut most off.
_ANSWER_TOKENS = 1024
# The names under which messages carry reasoning, the one that templates read first
# (transformers' chat_template_utils).
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What `Model.render` takes itself.
_RESERVED = {"self", "messages", "tools", "template", "add_generation_prompt"}


class ChatTemplates:
    """A package's chat templates, each read when it is first used."""

    def __init__(self, package: Package) -> None:
        self._package = package
        tokenizer = package.manifest.tokenizer
        self._paths = tokenizer.chat_templates if tokenizer else {}
        self._special = tokenizer.special_tokens if tokenizer else {}
        self._sources: dict[str, str] = {}
        self._process = TemplateProcess()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        template: str | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """See `Model.render`."""
        name = template or ("tool_use" if tools and "tool_use" in self._paths else "default")
        source = self._source(name)
        values = {
            **self._special,
            "documents": None,
            **variables,
            "messages": _checked(messages),
            "tools": list(tools) if tools is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._process.render(source, values)

    def close(self) -> None:
        """End the process that renders."""
        self._process.close()

    def _source(self, name: str) -> str:
        if name not in self._sources:
            path = self._paths.get(name)
            if path is None:
                known = ", ".join(sorted(self._paths))
                raise InputError(
                    f"this package has no chat template {name!r}"
                    + (f", only {known}" if known else ""),
                    hint="Give a plain text prompt, in the form that the model was trained on.",
                )
            size = self._package.manifest.files[path].bytes
            if size > MAX_TEMPLATE_BYTES:
                raise TemplateError(
                    f"{path}: expected at most {MAX_TEMPLATE_BYTES:,} bytes, found {size:,}"
                )
            try:
                self._sources[name] = self._package.read_file(path).decode()
            except UnicodeDecodeError as error:
                raise TemplateError(f"{path}: not UTF-8: {error}") from error
        return self._sources[name]


class Chat:
    """One conversation. What was run for it stays in a state, so that the next answer goes on.

    The caller owns the messages:

        chat = model.chat()
        messages = [{"role": "user", "content": "Who was Ada Lovelace?"}]
        answer = "".join(piece.text for piece in chat.answer(messages))
        messages.append({"role": "assistant", "content": answer})

    The messages are rendered and tokenised anew for each answer. If they begin with all tokens that
    were run, or at least with those of the last prompt, only the rest is run; else everything is.
    Use one Chat in one thread.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._state: State | None = None
        # What the state holds, token by token; none where a step was broken off.
        self._held: list[int] = []
        # The last prompt, and where the state was behind it.
        self._prompt: list[int] = []
        self._mark: Mark | None = None
        # The answer that may run on the state: the last one.
        self._last: Iterator[Piece] | None = None
        #: Tokens of the last prompt, and how many of them were run before.
        self.prompt_tokens = 0
        self.reused_tokens = 0

    def answer(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
    ) -> Iterator[Piece]:
        """What the model says next, piece by piece as tokens are made.

        As `Model.generate`, except that the text of a stop token is not shown, that the
        repetition penalty counts the whole conversation, and that an answer has at most 1,024
        tokens where neither `max_new_tokens` nor the package says how many. `tools`, `template`
        and `variables` as in `Model.render`, whose errors it raises too. A loop that is left early
        leaves the conversation as far as it came.
        """
        model = self._model
        variables = variables or {}
        if taken := sorted(_RESERVED & variables.keys()):
            raise InputError(f"variables: {taken[0]!r} has a meaning of its own")
        text = model.render(messages, tools=tools, template=template, **variables)
        if model.codec is None:
            raise InputError("this package has no tokenizer, so it cannot take messages")
        ids = model.codec.encode(text, special=False)
        if not ids:
            raise InputError("messages: the chat template makes no text of them")
        state, begin = self._resume(ids)
        pieces = generate(
            model,
            ids[begin:],
            max_new_tokens=self._most() if max_new_tokens is None else max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
            stop_tokens=stop_tokens,
            state=state,
            before=ids[:begin],
            show_stop=False,
        )
        self._last = pieces
        self.prompt_tokens, self.reused_tokens = len(ids), begin
        return self._follow(pieces, state, ids)

    def _most(self) -> int:
        said = (self._model.manifest.generation or Generation()).max_new_tokens
        return _ANSWER_TOKENS if said == Generation().max_new_tokens else said

    def _resume(self, ids: list[int]) -> tuple[State, int]:
        """A state that holds a beginning of `ids`, and how long that is."""
        # An answer that was left must not go on with a state that is another's.
        self._last = None
        if self._state is not None:
            for held, mark in ((self._held, None), (self._prompt, self._mark)):
                if 0 < len(held) < len(ids) and ids[: len(held)] == held:
                    if mark is not None:
                        self._state.rewind(mark)
                    self._held = ids[: len(held)]
                    return self._state, len(held)
        self._state, self._held, self._prompt, self._mark = self._model.new_state(), [], [], None
        return self._state, 0

    def _follow(self, pieces: Iterator[Piece], state: State, ids: list[int]) -> Iterator[Piece]:
        held, last = list(ids), None
        self._begin_step(pieces)
        for piece in pieces:
            # The step that made this piece has run all before it.
            if last is None:
                self._prompt, self._mark = ids, state.mark()
            else:
                held.append(last)
            last = piece.token
            self._held = held
            yield piece
            self._begin_step(pieces)
        if last is not None:
            self._held = held

    def _begin_step(self, pieces: Iterator[Piece]) -> None:
        if pieces is not self._last:
            raise InputError("this answer cannot go on: a later one has begun")
        self._held = []


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates are given them: no key is null, reasoning under all its names."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            "messages: expected a list of one or more, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"messages[{number}]: expected an object with a role, found {message!r:.80}"
            )
        plain = {key: value for key, value in message.items() if value is not None}
        reasoning = next((plain[name] for name in _REASONING if name in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        found.append(plain)
    return found
