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
from evermind_runtime.sampling import Sampler

from .evermind_lm import EvermindLM


def generate(
    model: EvermindLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    stop_token: int | None = None,
) -> list[int]:
    """The new token ids, `stop_token` included when it ends them.

    Greedy when `temperature <= 0`, else sampled from the peer's stream of `seed` (1). Raises
    `InputError` for a prompt token outside the vocabulary.
    """
    vocabulary = model.config["vocabSize"]
    if any(not 0 <= token < vocabulary for token in prompt):
        raise InputError(f"prompt: expected token ids from 0 to {vocabulary - 1}")
    sampler = Sampler(temperature, seed)
    produced: list[int] = []
    while len(produced) < max_new_tokens and (not produced or produced[-1] != stop_token):
        # An empty prompt starts from token 0, which is not kept: the peer's quirk.
        context = [*prompt, *produced] or [0]
        produced.append(sampler.pick(_last_logits(model, context)))
    return produced


def _last_logits(model: EvermindLM, context: list[int]) -> npt.NDArray[np.float32]:
    device = model.token_embedding.weight.device
    with torch.no_grad():
        hidden, _ = model.hidden(torch.tensor([context], device=device))
        logits: npt.NDArray[np.float32] = model.head(hidden[0, -1]).float().cpu().numpy()
    return logits
