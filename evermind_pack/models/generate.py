"""Token generation with the torch model, as the peer does it: the whole context every step.

Source: specs/evermind-formats.md, section 8.4. Slow on purpose: the reference that packages
and their runtime are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from evermind_manifests.errors import InputError
from evermind_runtime.lcg import Lcg

from .evermind_lm import EvermindLM


def generate(
    model: EvermindLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: float = 1,
    stop_token: int | None = None,
) -> list[int]:
    """The new token ids, `stop_token` included when it ends them.

    Greedy (ties to the lowest id) when `temperature <= 0`, else sampled with the peer's
    generator. Raises `InputError` for a prompt token outside the vocabulary.
    """
    vocabulary = model.config["vocabSize"]
    if any(not 0 <= token < vocabulary for token in prompt):
        raise InputError(f"prompt: expected token ids from 0 to {vocabulary - 1}")
    lcg = Lcg(seed)
    produced: list[int] = []
    while len(produced) < max_new_tokens and (not produced or produced[-1] != stop_token):
        # An empty prompt starts from token 0, which is not kept: the peer's quirk.
        context = [*prompt, *produced] or [0]
        logits = _last_logits(model, context)
        token = int(logits.argmax()) if temperature <= 0 else _sample(logits, temperature, lcg)
        produced.append(token)
    return produced


def _last_logits(model: EvermindLM, context: list[int]) -> npt.NDArray[np.float32]:
    device = model.token_embedding.weight.device
    with torch.no_grad():
        hidden, _ = model.hidden(torch.tensor([context], device=device))
        logits: npt.NDArray[np.float32] = model.head(hidden[0, -1]).float().cpu().numpy()
    return logits


def _sample(logits: npt.NDArray[np.float32], temperature: float, lcg: Lcg) -> int:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max()).astype(np.float32).astype(np.float64)
    # One running double, as the peer subtracts: cumsum would round differently.
    remaining = np.subtract.accumulate(np.concatenate(([lcg.next() * weights.sum()], weights)))
    hits = np.flatnonzero(remaining[1:] <= 0)
    return int(hits[0]) if hits.size else len(weights) - 1
