"""`evermind-pack run --chat`: answers to messages, once or in a conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evermind_manifests.errors import EvermindPackError, InputError
from evermind_manifests.json_file import read_json
from evermind_runtime import Chat, Model

from ..interrupt import stop_on_interrupt
from .generated import Generated, follow
from .options import SAMPLING
from .terminal import remark

_MAX_FILE_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Conversation:
    """Messages, and what a chat template may read besides."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """`--chat` and what belongs to it."""
    group = parser.add_argument_group("chat (for packages with a chat template)")
    group.add_argument(
        "--chat",
        action="store_true",
        help="talk with the model; with --prompt or --messages, one answer. Ctrl-C ends an answer, "
        "Ctrl-D the conversation",
    )
    group.add_argument("--system", metavar="TEXT", help="what the model is told first")
    group.add_argument(
        "--messages",
        metavar="JSON",
        type=Path,
        help="a file with a list of messages, or an object with messages, tools and variables",
    )


def check_chat(args: argparse.Namespace) -> None:
    """Raise `InputError` for options that do not go with --chat, or without it."""
    if not args.chat:
        for name in ("system", "messages"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} needs --chat")
        return
    for name in ("tokens", "inputs", "outputs", "steps", "state_in", "state_out"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} has no meaning with --chat")
    if args.json and args.prompt is None and args.messages is None:
        raise InputError("--chat --json needs --prompt TEXT or --messages JSON to answer")


def chat(model: Model, args: argparse.Namespace) -> tuple[Generated, Chat] | None:
    """One answer, if there is something to answer, else a conversation, which gives nothing."""
    tokenizer = model.manifest.tokenizer
    if tokenizer is None or not tokenizer.chat_templates:
        raise InputError(
            "--chat: this package has no chat template",
            hint="Give --prompt TEXT, in the form that the model was trained on."
            if model.codec
            else "It has no tokenizer either: give --tokens 1,2,3.",
        )
    talk = _begin(args)
    answers = model.chat()
    if args.prompt is None and args.messages is None:
        _converse(answers, talk, args)
        return None
    generated = _answer(answers, talk, args)
    return generated, answers


def _begin(args: argparse.Namespace) -> Conversation:
    talk = Conversation([]) if args.messages is None else _read(args.messages)
    if args.system is not None:
        if talk.messages and talk.messages[0].get("role") == "system":
            raise InputError(f"--system: {args.messages} begins with a system message already")
        talk.messages.insert(0, {"role": "system", "content": args.system})
    if args.prompt is not None:
        talk.messages.append({"role": "user", "content": args.prompt})
    return talk


def _read(path: Path) -> Conversation:
    found = read_json(path, _MAX_FILE_BYTES, InputError)
    said = found if isinstance(found, dict) else {"messages": found}
    kinds: dict[str, type] = {"messages": list, "tools": list, "variables": dict}
    for name, value in said.items():
        kind = kinds.get(name)
        if kind is None:
            raise InputError(f"{path}: {name!r:.80}: expected one of {', '.join(kinds)}")
        items = value if kind is list and isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(item, dict) for item in items):
            expected = "a list of objects" if kind is list else "an object"
            raise InputError(f"{path}: {name}: expected {expected}")
    if "messages" not in said:
        raise InputError(f"{path}: expected a list of messages")
    return Conversation(said["messages"], said.get("tools"), said.get("variables", {}))


def _converse(answers: Chat, talk: Conversation, args: argparse.Namespace) -> None:
    person = sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its line editing
        remark("[Ctrl-C ends an answer, Ctrl-D the conversation]", quiet=args.quiet)
    while (text := _ask(person)) is not None:
        if not text.strip():
            continue
        talk.messages.append({"role": "user", "content": text})
        try:
            with stop_on_interrupt() as stop:
                pieces = _pieces(answers, talk, args)
                # What a person typed (^C) is on the line as well.
                generated = follow(pieces, lambda piece: piece.text, stop.is_set, begun=person)
        except KeyboardInterrupt:
            talk.messages.pop()
            continue
        except EvermindPackError as error:
            if not person:
                raise
            talk.messages.pop()
            remark(f"{type(error).__name__}: {error}")
            continue
        print()
        talk.messages.append({"role": "assistant", "content": generated.text})
        remark(
            f"[{generated.ended()}; {generated.speed()}; {answers.reused_tokens:,} of "
            f"{answers.prompt_tokens:,} prompt tokens had been read]",
            quiet=args.quiet,
        )


def _ask(person: bool) -> str | None:
    """The next line that is typed, or that is in a file; `None` at the end."""
    if not person:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        try:
            return input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()


def _answer(answers: Chat, talk: Conversation, args: argparse.Namespace) -> Generated:
    show = None if args.json else lambda piece: piece.text
    return follow(_pieces(answers, talk, args), show)


def _pieces(answers: Chat, talk: Conversation, args: argparse.Namespace) -> Any:
    return answers.answer(
        talk.messages,
        tools=talk.tools,
        variables=talk.variables,
        max_new_tokens=args.max_new,
        stop_tokens=args.stop_token,
        **{name: getattr(args, name) for name in SAMPLING},
    )
