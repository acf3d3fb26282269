"""Which of three ways to run a package: pooled in float32, every expert resident, or paged.

Pure: sizes in, a choice and its reason out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from evermind_manifests.errors import BudgetError, InputError, UnsupportedError
from evermind_manifests.manifest import Manifest

from .budget import total_expert_bytes, working_set_bytes
from .pools import pool_bytes

PlanName: TypeAlias = Literal["auto", "resident", "half", "paged"]
PLAN_NAMES: tuple[PlanName, ...] = get_args(PlanName)

# Up to how many bytes an expert takes in float32 one call per token beats half the bytes. On one
# thread, pools ran 1.8, 1.2, 0.9 and 0.9 times as fast as experts in f16 where an expert took
# 64, 256, 576 and 1024 KiB (BENCHMARKS.md).
_SMALL_EXPERT = 384 * 1024

# Why pools are left alone where every expert has to come over the network, and where experts'
# statistics are asked for.
FETCHED_FIRST = "pools would fetch all of them before the first token"
UNOBSERVED = "pools do not show what each expert puts out"


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """`budget` is the most that expert weights take in memory under this plan, in bytes."""

    name: Literal["resident", "half", "paged"]
    reason: str
    budget: int


def choose_plan(
    asked: PlanName,
    manifest: Manifest,
    budget: int | None,
    device: str,
    free: int | None,
    unless: str | None = None,
) -> PlanChoice:
    """The plan for `budget` bytes of experts on `device`; `free` is what memory is left.

    `budget` None lets every expert be resident. `unless` says why pooled programs had
    better be left alone unless they are asked for. Raises `BudgetError` or `UnsupportedError`
    if the plan that was asked for cannot be had, `InputError` for a name that is none.
    """
    if asked not in PLAN_NAMES:
        raise InputError(f"plan: expected one of {', '.join(PLAN_NAMES)}, found {asked!r}")
    total = total_expert_bytes(manifest)
    whole = total if budget is None else min(budget, total)
    if asked == "paged":
        return PlanChoice("paged", "as asked", whole)
    if asked == "half":
        if whole < total:
            raise BudgetError(
                f"plan: 'half' keeps all experts, which take {total:,} bytes, and the budget is "
                f"{whole:,}",
                hint=f"Give at least {total} bytes, or leave the plan to 'auto'.",
            )
        return PlanChoice("half", "as asked", whole)
    # Beside the pools: a working set to fill them through, and one for the self-test.
    pooled = pool_bytes(manifest) + 2 * working_set_bytes(manifest)
    obstacle = _obstacle(manifest, pooled, budget, device)
    if asked == "resident":
        if obstacle:
            raise obstacle
        return PlanChoice("resident", "as asked", pooled)
    if obstacle is None and unless is None and _pays(manifest, pooled, free):
        return PlanChoice("resident", "all experts fit in float32, and they are small", pooled)
    if whole < total:
        return PlanChoice("paged", f"the budget holds {whole / total:.0%} of the experts", whole)
    reason = "all experts fit as they are stored"
    if obstacle is None and unless is not None:
        reason += f"; {unless}"
    return PlanChoice("half", reason, whole)


def _obstacle(
    manifest: Manifest, pooled: int, budget: int | None, device: str
) -> BudgetError | UnsupportedError | None:
    """Why the experts cannot stand in pools of `pooled` bytes, if so."""
    hint = "Leave the plan to 'auto'."
    if manifest.plan.pooled is None:
        return UnsupportedError(
            f"plan: 'resident' needs pooled programs, and {manifest.name} has none", hint=hint
        )
    if device != "cpu":
        return UnsupportedError(f"plan: 'resident' runs on the cpu, not on {device}", hint=hint)
    if budget is not None and budget < pooled:
        return BudgetError(
            f"plan: 'resident' takes {pooled:,} bytes for all experts in float32, and the budget "
            f"is {budget:,}",
            hint=f"Give at least {pooled} bytes, or leave the plan to 'auto'.",
        )
    return None


def _pays(manifest: Manifest, pooled: int, free: int | None) -> bool:
    experts = sum(layer.experts for layer in manifest.layers)
    return pooled <= experts * _SMALL_EXPERT and (free is None or pooled <= free // 2)
