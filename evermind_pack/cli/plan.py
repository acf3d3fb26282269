"""`evermind-pack plan`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from evermind_manifests.errors import InputError
from evermind_runtime.budget import parse_size
from evermind_runtime.forecast import (
    Range,
    process_bytes,
    recommended_budget,
)
from evermind_runtime.machine import Machine

from evermind_pack.planning import (
    Prediction,
    Routing,
    Subject,
    method,
    open_subject,
    predict,
    read_routing,
    slot_bytes_of,
    standard_budgets,
)

from .options import add_revision, add_stored_as, add_threads, thread_count, token_count
from .remote import add_remote_arguments, remote_options
from .terminal import (
    counted,
    human_bytes,
    number,
    print_columns,
    print_json,
    print_table,
    rate,
    remark,
    seconds,
    state_text,
)

EXAMPLES = """\
  evermind-pack plan demo/package
  evermind-pack plan demo/package --memory 256MiB --budget 1MiB --budget 25% --json
  evermind-pack plan demo/package --trace trace.jsonl
  evermind-pack plan Mixtral-8x7B/config.json --memory 16GiB --disk-rate 3GB
  evermind-pack plan allenai/OLMoE-1B-7B-0125 --memory 8GiB
  evermind-pack plan OLMoE-1B-7B/ --dtype f16 --trunk f32 --context 2048"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and what to assume of the machine."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a package, its manifest.json, a Hugging Face config.json or its folder, or the name "
        "of a model on a hub, as org/name: no weight need be there, and none is fetched",
    )
    add_revision(parser)
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        action="append",
        help="the most experts may take in memory, as for `run`; repeatable "
        "(default: least, one token's cycle, 25%%, 50%%, all)",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="what the process may take (default: what is available)"
    )
    parser.add_argument(
        "--disk-rate", metavar="SIZE", help="bytes per second, as 500MB (default: measured)"
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=token_count,
        default=16,
        help="the prompt whose first token is forecast (default: 16)",
    )
    add_threads(parser)
    parser.add_argument(
        "--policy",
        choices=("decayed", "lru", "pinned"),
        default="decayed",
        help="which experts are given up (default: decayed)",
    )
    parser.add_argument(
        "--trace", metavar="FILE", type=Path, help="replay this routing trace for the hit rate"
    )
    parser.add_argument(
        "--profile",
        metavar="JSON",
        type=Path,
        help="a routing profile for the hit rate (default: the package's own, if any)",
    )
    parser.add_argument(
        "--context", metavar="N", type=token_count, help="tokens a sequence has (default: 4096)"
    )
    add_stored_as(parser, "of a model to import, ")
    add_remote_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the forecasts; 1 where none of the budgets fits."""
    threads = thread_count(args)
    with open_subject(
        args.model,
        dtype=args.dtype or "keep",
        trunk=args.trunk,
        context=args.context,
        revision=args.revision,
        remote=remote_options(args),
    ) as subject:
        for option in ("dtype", "trunk"):
            if subject.manifest is not None and getattr(args, option):
                raise InputError(f"--{option} has no meaning for a package: it is made")
        if subject.manifest is None and args.digest:
            raise InputError("--digest has no meaning for a config.json: it is no package")
        if not subject.sizes.layers:
            raise InputError(f"{args.model}: there are no experts to page")
        routing = read_routing(subject, args.policy, args.trace, args.profile)
        budgets = _budgets(subject, args.budget)
        rate = _disk_rate(args.disk_rate)
        machine = subject.measure(threads)
        if rate is not None:
            machine = machine.with_disk_rate(rate)
        memory = _memory(args.memory, machine)
        best = None if memory is None else recommended_budget(subject.sizes, memory)
        if best is not None and best < subject.sizes.all_expert_bytes:
            budgets.setdefault("recommended", best)
        forecasts = {
            name: predict(
                subject,
                budget,
                machine,
                policy=args.policy,
                routing=routing,
                prompt_tokens=args.prompt_tokens,
                memory=memory,
            )
            for name, budget in budgets.items()
        }
        forecasts = dict(sorted(forecasts.items(), key=lambda item: item[1].forecast.budget))
    fits = any(one.forecast.fits for one in forecasts.values())
    advice = _advice(subject, memory)
    if args.json:
        inputs = {
            "policy": args.policy,
            "prompt_tokens": args.prompt_tokens,
            "context": subject.sizes.context,
            "threads": machine.threads,
            **routing.to_dict(),
        }
        print_json(_as_json(subject, machine, memory, forecasts, advice, inputs))
    else:
        _print(subject, machine, forecasts, advice, routing, args)
    return 0 if fits else 1


def _budgets(subject: Subject, texts: list[str] | None) -> dict[str, int | None]:
    if texts is None:
        return standard_budgets(subject.sizes)
    return {text: parse_size(text, subject.sizes.all_expert_bytes, "--budget") for text in texts}


def _disk_rate(text: str | None) -> float | None:
    if text is None:
        return None
    rate = parse_size(text, None, "--disk-rate")
    if rate == 0:
        raise InputError(f"--disk-rate: expected more than 0 bytes per second, found {text[:80]!r}")
    return float(rate)


def _memory(text: str | None, machine: Machine) -> int | None:
    available = machine.available.bytes if machine.available else None
    if text is None:
        return available
    if text.endswith("%") and available is None:
        raise InputError("--memory: this machine does not say how much is available: give bytes")
    return parse_size(text, available or 0, "--memory")


def _advice(subject: Subject, memory: int | None) -> tuple[int | None, str]:
    """The budget to choose, and why."""
    sizes = subject.sizes
    if memory is None:
        return None, "this machine does not say how much memory is available: give --memory"
    best = recommended_budget(sizes, memory)
    if best is None:
        needed = process_bytes(sizes, sizes.least_budget)
        return None, (
            f"does not run in {human_bytes(memory)}: everything but experts and one step's "
            f"experts take {human_bytes(needed)}, and a tenth should stay free"
        )
    if best >= sizes.all_expert_bytes:
        return best, "all experts fit, so each is read once and never again"
    if best < sizes.cycle_bytes:
        return best, (
            f"the most that fits, but less than the {human_bytes(sizes.cycle_bytes)} one token "
            "passes through: most experts are read again for every token"
        )
    return best, (
        f"the most experts that {human_bytes(memory)} hold beside everything else, "
        "with a tenth to spare"
    )


def _as_json(
    subject: Subject,
    machine: Machine,
    memory: int | None,
    forecasts: dict[str, Prediction],
    advice: tuple[int | None, str],
    inputs: dict[str, Any],
) -> dict[str, Any]:
    return {
        "model": subject.name,
        "family": subject.family,
        "source": subject.source,
        "sizes": subject.sizes.to_dict(),
        "checkpoint_bytes": subject.checkpoint_bytes,
        "weights_here": subject.weights_here,
        "package_bytes": subject.package_bytes,
        "notes": list(subject.notes),
        "machine": machine.to_dict(),
        "memory": memory,
        **inputs,
        "forecasts": [{"name": name, **one.to_dict()} for name, one in forecasts.items()],
        "recommended": {"budget": advice[0], "why": advice[1]},
        **method(),
    }


def _print(
    subject: Subject,
    machine: Machine,
    forecasts: dict[str, Prediction],
    advice: tuple[int | None, str],
    routing: Routing,
    args: argparse.Namespace,
) -> None:
    print_table(model_rows(subject) | machine_rows(machine))
    print()
    rows = [["budget", "", "plan", "tokens/s", "hit rate", "read/token", "first token"]]
    rows[0] += ["memory", "context", "verdict"]
    for name, prediction in forecasts.items():
        one = prediction.forecast
        figures = [
            shown(one.tokens_per_second, number),
            shown(one.hit_rate, lambda rate: f"{rate:.0%}"),
            shown(one.bytes_per_token, lambda count: human_bytes(int(count))),
            shown(one.ttft_seconds, seconds),
        ]
        if not prediction.runs:
            figures = ["-"] * len(figures)
        budget_and_plan = [human_bytes(one.budget), prediction.plan or "-"]
        context = "-" if one.longest_context is None else f"{one.longest_context:,}"
        rows.append([name, *budget_and_plan, *figures, human_bytes(one.rss), context, one.verdict])
    print_columns(rows)
    print()
    budget, why = advice
    if budget is None:
        print(f"recommended  none: {why}")
    elif budget >= subject.sizes.all_expert_bytes:
        print(f"recommended  no --budget: {why}")
    else:
        share = budget / max(1, subject.sizes.all_expert_bytes)
        experts = budget // slot_bytes_of(subject.sizes)
        print(f"recommended  --budget {budget} ({share:.0%}, {counted(experts, 'expert')}): {why}")
    for note in subject.notes:
        remark(f"note: {note}", quiet=args.quiet)
    remark(
        f"{routing.text}, policy {args.policy}; "
        f"first token: of {counted(args.prompt_tokens, 'token')}, nothing paged in yet; "
        "--json has the formula and its inputs",
        quiet=args.quiet,
    )


def model_rows(subject: Subject) -> dict[str, str]:
    """What the model is, in rows for a table."""
    sizes = subject.sizes
    experts = sum(layer.experts for layer in sizes.layers)
    rows = {
        "model": f"{subject.name} ({subject.family}), {sizes.total_parameters:,} parameters, "
        f"{sizes.active_parameters:,} per token",
        "experts": f"{experts:,} in {counted(len(sizes.layers), 'layer')}, "
        f"{human_bytes(slot_bytes_of(sizes))} each: {human_bytes(sizes.all_expert_bytes)}, "
        f"{human_bytes(sizes.cycle_bytes)} per token",
        "resident": human_bytes(sizes.resident_bytes),
        "state": f"{state_text(sizes.state)}; {human_bytes(sizes.state_bytes)} for "
        f"{counted(sizes.context, 'token')}",
    }
    if subject.checkpoint_bytes is not None:
        where = "to fetch from the hub"
        if subject.weights_here is not None:
            lies = human_bytes(subject.weights_here) if subject.weights_here else "none"
            where = f"of which {lies} lies in {subject.folder}"
        rows["checkpoint"] = f"about {human_bytes(subject.checkpoint_bytes)}, {where}"
    if subject.manifest is None:
        free = shutil.disk_usage(subject.folder).free
        short = "" if free > subject.package_bytes else ": the disk is too full to import it"
        rows["package"] = (
            f"about {human_bytes(subject.package_bytes)} on the disk, which has "
            f"{human_bytes(free)} free{short}"
        )
    return rows


def machine_rows(machine: Machine) -> dict[str, str]:
    """What the machine gives, in rows for a table."""
    disk = f"{rate(machine.disk_rate)} {machine.disk_note}"
    if machine.disk_how != "given":
        disk += (
            f", {human_bytes(machine.block)} at a time, {machine.readers} reading, "
            f"over {machine.disk_where}"
        )
    rows = {
        "disk": disk,
        "page cache": rate(machine.cached_rate),
        "processor": f"{rate(machine.memory_rate)} from memory, "
        f"{machine.matmul_rate / 1e9:,.0f} GFLOP/s, {counted(machine.threads, 'thread')}; "
        f"sha256 {rate(machine.sha256_rate)}",
    }
    if machine.available is not None:
        rows["memory"] = f"{human_bytes(machine.available.bytes)} ({machine.available.by})"
    return rows


def shown(values: Range, text: Any) -> str:
    """A range, or one number where both ends look the same."""
    low, high = sorted((values.even, values.skewed))
    one, other = text(low), text(high)
    return one if one == other else f"{one} to {other}"
