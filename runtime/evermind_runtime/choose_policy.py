"""The policies a user can name, made for a model and its budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from evermind_manifests.errors import InputError

from .layers import ExpertLayer, all_bytes, step_bytes
from .policies import DecayedPolicy, ExpertKey, LruPolicy, NoPolicy, PinnedPolicy, Policy
from .profile import Profile

PolicyName: TypeAlias = Literal["decayed", "lru", "pinned"]
# Of the budget beyond one step's working set; pinning all of it loses hits (docs/paging.md).
_PINNED_SHARE = 0.5
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


def make_policy(
    name: PolicyName, layers: Sequence[ExpertLayer], budget: int, profile: Profile | None = None
) -> Policy:
    """The policy called `name`; `pinned` needs a profile of these layers, the others take none.

    A budget that holds every expert needs no policy and gets one that costs nothing.

    Raises `InputError` for another name, or a profile that is missing or has no use.
    """
    if name not in POLICY_NAMES:
        raise InputError(f"policy: expected one of {', '.join(POLICY_NAMES)}, found {name!r}")
    if profile and name != "pinned":
        raise InputError(f"profile: only the policy 'pinned' takes one, not {name!r}")
    if name == "pinned" and profile is None:
        raise InputError(
            "policy: 'pinned' needs a routing profile, and the package has none",
            hint="Record one with `evermind-pack trace PKG … -o t.jsonl` and "
            "`evermind-pack trace --replay t.jsonl --profile profile.json`.",
        )
    if budget >= all_bytes(layers):
        return NoPolicy()
    if name == "lru":
        return LruPolicy()
    decayed = DecayedPolicy([layer.layer for layer in layers])
    if profile is None:
        return decayed
    return PinnedPolicy(pinned_keys(layers, budget, profile), decayed)


def pinned_keys(layers: Sequence[ExpertLayer], budget: int, profile: Profile) -> list[ExpertKey]:
    """The hottest experts, hottest first, that fill half of what a working set leaves. Pure."""
    size = {layer.layer: layer.bytes for layer in layers}
    room = (budget - step_bytes(layers)) * _PINNED_SHARE
    keys: list[ExpertKey] = []
    for key in profile.hottest():
        if size[key[0]] > room:
            break
        room -= size[key[0]]
        keys.append(key)
    return keys
