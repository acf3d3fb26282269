"""The generation loop: prompt in, tokens out, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Generation

from .sampling import Sampler, Sampling
from .state import State

if TYPE_CHECKING:
    from .model import Model


#: Why a text ends: a stop token, as many tokens as were asked for, or a context that is full.
Finish: TypeAlias = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token, and the text it completes (none while a character is split).

    `finish` says of the last piece why there are no more.
    """

    token: int
    text: str
    finish: Finish | None = None


def generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int | None,
    sampling: Sampling,
    stop_tokens: Sequence[int] | None,
    state: State | None,
    before: Sequence[int] = (),
    show_stop: bool = True,
) -> Iterator[Piece]:
    """See `Model.generate`. Arguments are checked here; the tokens come lazily.

    `before` are tokens that `state` holds, for the repetition penalty to count. `show_stop` says
    whether the piece of a stop token has its text.
    """
    plan = model.manifest.plan
    if "tokens" not in plan.inputs or "logits" not in plan.outputs:
        raise InputError(
            f"a package of family {model.manifest.family!r} does not generate text: it maps "
            f"{', '.join(plan.inputs)} to {', '.join(plan.outputs)}",
            hint="Use `forward` with named arrays (on the command line: run --inputs).",
        )
    defaults = model.manifest.generation or Generation()
    limit = defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit < 0:
        raise InputError(f"max_new_tokens: expected 0 or more, found {limit}")
    sampler = sampling.sampler(defaults)
    begins = state is None or state.fresh
    ids = _encode(model, prompt, begins)
    if not ids and begins and defaults.bos_token is not None:
        ids = [defaults.bos_token]
    vocabulary = plan.inputs["tokens"].limit
    bad = next((i for i in ids if i < 0 or (vocabulary is not None and i >= vocabulary)), None)
    if bad is not None:
        raise InputError(
            f"prompt: expected token ids from 0 to {(vocabulary or 0) - 1}, found {bad}"
        )
    sampler.see([*before, *ids])
    stops = frozenset(defaults.stop_tokens if stop_tokens is None else stop_tokens)
    hidden = frozenset() if show_stop else stops
    state = state or model.new_state()
    if limit:
        _check_room(len(ids), state)
    return _loop(model, ids, limit, sampler, stops, hidden, state)


def _check_room(tokens: int, state: State) -> None:
    """Raise `InputError` for a prompt that the model's context cannot take, before it is run."""
    room = state.room
    # An empty prompt starts from a token too.
    tokens = max(1, tokens)
    if room is None or tokens <= room:
        return
    more = "" if state.fresh else " more"
    raise InputError(
        f"prompt: expected at most {room:,}{more} tokens, which fill the model's context, found "
        f"{tokens:,}",
        hint="Shorten it, or begin anew with fewer earlier tokens.",
    )


def _encode(model: Model, prompt: str | Sequence[int], begins: bool) -> list[int]:
    if not isinstance(prompt, str):
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise InputError(f"prompt: expected token ids, found {token!r}")
        return [int(token) for token in prompt]
    if model.codec is None:
        raise InputError(
            "prompt: this package has no tokenizer, so it cannot take text",
            hint="Pass token ids (on the command line: --tokens 1,2,3).",
        )
    return model.codec.encode(prompt, special=begins)


def _loop(
    model: Model,
    prompt: list[int],
    limit: int,
    sampler: Sampler,
    stops: frozenset[int],
    hidden: frozenset[int],
    state: State,
) -> Iterator[Piece]:
    # Another may have filled the state since this one was called.
    if limit:
        _check_room(len(prompt), state)
    text = model.codec.stream() if model.codec else None
    # The peer starts an empty prompt from token 0 but does not keep it as context
    # (specs/evermind-formats.md, section 8.4).
    forget = None if prompt else state.mark()
    pending = prompt or [0]
    # The last token that is made is never run.
    room = state.room
    most = limit if room is None else min(limit, room - len(prompt) + 1)
    if limit and len(pending) > 1:
        model.forward({"tokens": pending[:-1]}, state=state, outputs=[])
    token = np.array([pending[-1]], dtype=np.int64)
    inputs = {"tokens": token}
    for made in range(1, most + 1):
        token[0] = choice = sampler.pick(model.decode(inputs, state)["logits"][-1])
        if forget is not None:
            state.rewind(forget)
            forget = None
        finish: Finish | None = None
        if choice in stops:
            finish = "stop"
        elif made == most:
            finish = "length" if most == limit else "context"
        piece = text.push(choice) if text and choice not in hidden else ""
        if finish and text:
            piece += text.finish()
        yield Piece(choice, piece, finish)
        if finish:
            return
