"""What a checkpoint says about generation: `generation_config.json`, else `config.json`.

The fields and what they mean where they are missing are those of transformers'
`GenerationConfig`; of `config.json`, transformers' older home for them, the same fields are read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from evermind_manifests.errors import CheckpointError
from evermind_manifests.manifest import Generation

from .checkpoint import read_json
from .misfits import CONFIG_NAME

GENERATION_NAME = "generation_config.json"

# What transformers' `generate` takes where a configuration says nothing.
_TEMPERATURE = 1.0
_TOP_K = 50
_MOST_STOPS = 1024
_MOST = 2**31 - 1

# Fields that change no text, or say what is read elsewhere.
_WITHOUT_EFFECT = frozenset(
    {
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "do_sample",
        "early_stopping",
        "eos_token_id",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "max_new_tokens",
        "min_p",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "repetition_penalty",
        "return_dict_in_generate",
        "return_legacy_cache",
        "speculation_type",
        "target_lookbehind",
        "temperature",
        "top_k",
        "top_p",
        "transformers_version",
        "use_cache",
        "use_mtp",
    }
)
# Fields that are not carried, with the values that mean the same as nothing.
_NOT_CARRIED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


class ReadGeneration(NamedTuple):
    """Defaults for generation, and what was said but is not carried, in sentences."""

    generation: Generation
    notes: tuple[str, ...]


def read_generation(folder: Path, vocabulary: int, eos: int | None = None) -> ReadGeneration:
    """What the checkpoint says about generation; `eos`, the tokenizer's, where it does not.

    Greedy unless `do_sample` is true. A stop token outside the vocabulary ends nothing and is
    left out (configurations of tiny models keep their big sibling's). Raises `CheckpointError`
    for a value that transformers would refuse too.
    """
    own = folder / GENERATION_NAME
    source = own if own.is_file() else folder / CONFIG_NAME
    fields = _Fields(read_json(source), source)
    notes = fields.notes(known_only=source != own)
    places = [fields]
    if source == own:
        places.append(_Fields(read_json(folder / CONFIG_NAME), folder / CONFIG_NAME))
    nested = places[-1].values.get("text_config")
    if isinstance(nested, dict):
        places.append(_Fields(nested, folder / CONFIG_NAME))
    stops = next((found for one in places if (found := one.tokens("eos_token_id"))), ())
    if not stops and eos is not None:
        stops = (eos,)
    if surplus := [one for one in stops if one >= vocabulary]:
        notes.append(f"{source.name}: eos_token_id: {surplus} are outside the vocabulary: left out")
    bos = next((found for one in places if (found := one.tokens("bos_token_id"))), ())
    sample = fields.flag("do_sample")
    temperature = fields.number("temperature", _TEMPERATURE, least=0)
    if not sample and temperature != _TEMPERATURE:
        notes.append(
            f"{source.name}: temperature {temperature:g} is not the default, as do_sample is not "
            "true: the likeliest token is taken"
        )
    values: dict[str, Any] = {
        "stop_tokens": tuple(one for one in stops if one < vocabulary),
        "bos_token": bos[0] if bos and bos[0] < vocabulary else None,
        "temperature": temperature if sample else 0.0,
        "top_k": fields.count("top_k", _TOP_K),
        "top_p": fields.number("top_p", 1.0, least=0, most=1),
        "min_p": fields.number("min_p", 0.0, least=0, most=1),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, least=math.ulp(0.0)),
        "max_new_tokens": fields.count("max_new_tokens", Generation().max_new_tokens, least=1),
    }
    # What the format takes for granted is left out, in the order of its fields.
    said = {name: value for name, value in values.items() if value != getattr(Generation(), name)}
    return ReadGeneration(Generation(**said), tuple(notes))


class _Fields:
    """The fields of one file; what is null counts as absent, as in transformers."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values = values
        self._path = path

    def notes(self, *, known_only: bool) -> list[str]:
        """A sentence for each field that says something which is not carried."""
        found = []
        for name, value in self.values.items():
            idle = _NOT_CARRIED.get(name)
            if value is None or name in _WITHOUT_EFFECT or (idle is None and known_only):
                continue
            if value not in (idle or ()) and value != []:
                shown = f"{value!r:.60}"
                found.append(f"{self._path.name}: {name}: {shown} is not carried")
        return found

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._error(name, "true or false", value)
        return bool(value)

    def count(self, name: str, default: int, least: int = 0) -> int:
        value = self.values.get(name)
        if value is None:
            return default
        if not _is_int(value) or not least <= value <= _MOST:
            raise self._error(name, f"a whole number from {least} to {_MOST}", value)
        return int(value)

    def number(self, name: str, default: float, least: float, most: float = math.inf) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not least <= value <= most or math.isinf(value):
            bounds = f"a number from {least:g}" + (f" to {most:g}" if most < math.inf else "")
            raise self._error(name, bounds, value)
        return float(value)

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        tokens = value if isinstance(value, list) else [value]
        if len(tokens) > _MOST_STOPS or not all(_is_int(one) and one >= 0 for one in tokens):
            raise self._error(name, "token ids", value)
        return tuple(dict.fromkeys(tokens))

    def _error(self, name: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(f"{self._path}: {name}: expected {expected}, found {found!r:.80}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
