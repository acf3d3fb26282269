"""From a package and a memory budget to an engine: choose the plan, set it up, test it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

from evermind_manifests.errors import InputError, UnsupportedError
from evermind_manifests.package import Package

from .budget import working_set_bytes
from .choose_plan import FETCHED_FIRST, UNOBSERVED, PlanChoice, PlanName, choose_plan
from .devices import Device
from .layers import slot_bytes
from .pager import Pager
from .pools import Pools
from .program import Engine, has_bf16
from .resident import Resident
from .self_test import pooled_fault
from .sessions import Sessions

# From this size on experts decode one by one on a CPU. On a cold disk that made 4 MiB experts up
# to 1.5 times as fast; the calls cost 6 % where all are in memory (BENCHMARKS.md). It depends on
# the package alone: under every budget the same steps run.
ONE_BY_ONE_BYTES = 4 << 20
# In bfloat16, where they run side by side: 1.7 times as fast at 3 MiB, 0.9 times at 2.
SIDE_BY_SIDE_BYTES = 3 << 20


def decodes_one_by_one(slot: int, *, bf16: bool) -> bool:
    """Whether experts that take `slot` bytes each, some in bfloat16, decode so on a CPU."""
    return slot >= (SIDE_BY_SIDE_BYTES if bf16 else ONE_BY_ONE_BYTES)


def open_engine(
    package: Package,
    device: Device,
    plan: PlanName,
    budget: int | None,
    *,
    free: int | None,
    observed: bool,
    make_pager: Callable[[int, bool], Pager],
) -> tuple[Engine, PlanChoice]:
    """An engine under the plan that `choose_plan` finds, and what it found.

    Where experts will be `observed`, their own programs run: pools are refused with `InputError`.
    `make_pager` makes one for a budget in bytes, and for whether guesses may pay. Pooled programs
    that fail their self-test are not used: `UnsupportedError` if they were asked for, else the
    next plan, which says so.
    """
    manifest = package.manifest
    if observed and plan == "resident":
        raise InputError(
            f"plan: 'resident' cannot be observed: {UNOBSERVED}",
            hint="Leave the plan to 'auto', or take 'half' or 'paged'.",
        )
    unless = UNOBSERVED if observed else None if package.store.local else FETCHED_FIRST
    choice = choose_plan(plan, manifest, budget, device.name, free, unless)
    resident = Resident(package)
    bf16 = any(has_bf16(manifest.kinds[layer.kind]) for layer in manifest.layers)
    one_by_one = device.name == "cpu" and decodes_one_by_one(slot_bytes(manifest), bf16=bf16)
    # Experts that decode one by one are read while others run, guessed or not: on a disk right
    # guesses cost 10 to 15 % (BENCHMARKS.md). Over a network they hide its delay.
    guesses_may_pay = not (one_by_one and package.store.local)

    def engine(room: int, pools: Pools | None = None, pager: Pager | None = None) -> Engine:
        sessions = Sessions(package, resident, device)
        return Engine(
            manifest,
            sessions,
            resident,
            pager or make_pager(room, guesses_may_pay),
            pools,
            one_by_one=one_by_one,
        )

    if choice.name != "resident":
        return engine(choice.budget), choice
    # Experts pass through one working set on their way into the pools. That pager stays, for
    # programs that observe experts one by one; the test has another, and counts nowhere else.
    step = working_set_bytes(manifest)
    with ExitStack() as stack:
        filling = engine(step).pager
        stack.callback(filling.close)
        pools = Pools(manifest, filling)
        trial = engine(step)
        with closing(trial.pager):
            fault = pooled_fault(engine(step, pools, trial.pager), trial)
        if fault is None:
            stack.pop_all()
            return engine(step, pools, filling), choice
    if plan == "resident":
        raise UnsupportedError(
            f"plan: the pooled programs do not compute what the others do: {fault}",
            hint="This ONNX Runtime's operators differ from those the package was made for: "
            "leave the plan to 'auto', or upgrade ONNX Runtime.",
        )
    failed = f"the pooled programs failed their self-test ({fault})"
    choice = choose_plan(plan, manifest, budget, device.name, free, failed)
    return engine(choice.budget), choice
