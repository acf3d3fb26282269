"""Routing profiles: how often each expert was used, to choose what is kept in memory.

    {"schema":"evermind.profile/1","layers":[{"layer":0,"uses":[12,0,7,…]},…]}

`uses` counts, for every expert of the layer, the tokens routed to it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import Bytes, Count
from evermind_manifests.unique_keys import unique_keys
from msgspec import Struct

from .layers import ExpertLayer
from .policies import ExpertKey
from .trace import Trace

SCHEMA: Final = "evermind.profile/1"
PROFILE_NAME: Final = "profile.json"


class LayerProfile(Struct, frozen=True, forbid_unknown_fields=True):
    """One layer: the tokens routed to each of its experts."""

    layer: Count
    uses: tuple[Bytes, ...]


class Profile(Struct, frozen=True, forbid_unknown_fields=True):
    """The expert heat of a model, measured on some text."""

    schema: str
    layers: tuple[LayerProfile, ...]

    def hottest(self) -> list[ExpertKey]:
        """All experts that were used, those with the largest share of their layer first."""
        shares = {
            (layer.layer, expert): uses / sum(layer.uses)
            for layer in self.layers
            for expert, uses in enumerate(layer.uses)
            if uses
        }
        return sorted(shares, key=lambda key: (-shares[key], key))


_PROFILE = msgspec.json.Decoder(Profile)


def profile_of(trace: Trace) -> Profile:
    """The heat a trace shows."""
    uses: dict[int, Counter[int]] = {layer.layer: Counter() for layer in trace.layers}
    for step in trace.steps:
        for row in step.tokens:
            uses[step.layer].update(row)
    return Profile(
        SCHEMA,
        tuple(
            LayerProfile(
                layer.layer, tuple(uses[layer.layer][expert] for expert in range(layer.experts))
            )
            for layer in trace.layers
        ),
    )


def encode_profile(profile: Profile) -> bytes:
    """The one encoding: keys in the order above, no spaces, one newline at the end."""
    return msgspec.json.encode(profile) + b"\n"


def parse_profile(data: bytes, layers: Sequence[ExpertLayer], where: str) -> Profile:
    """Parse a profile and check that it is one of a model with these layers.

    Raises `InputError` for malformed JSON, unknown or repeated fields, another schema, or
    layers and experts other than the model's.
    """
    try:
        profile = _PROFILE.decode(data)
        # msgspec keeps the last of two equal keys: another reader may keep the first.
        json.loads(data, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: {error}",
            hint="A routing profile is what `evermind-pack trace --replay TRACE --profile FILE` "
            "writes.",
        ) from error
    if profile.schema != SCHEMA:
        raise InputError(f"{where}: schema: expected {SCHEMA!r}, found {profile.schema[:80]!r}")
    expected = [(layer.layer, layer.experts) for layer in layers]
    found = [(layer.layer, len(layer.uses)) for layer in profile.layers]
    if found != expected:
        raise InputError(
            f"{where}: layers: expected {_shape(expected)}, found {_shape(found)}",
            hint="The profile was made for another model.",
        )
    return profile


def read_profile(path: str | os.PathLike[str], layers: Sequence[ExpertLayer]) -> Profile:
    """Read and check the profile in a file. Raises `InputError`."""
    where = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from error
    return parse_profile(data, layers, where)


def _shape(layers: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"layer {layer} of {experts} experts" for layer, experts in layers[:4])
    return shown + (", …" if len(layers) > 4 else "") if layers else "no layer"
