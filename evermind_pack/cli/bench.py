"""`evermind-pack bench`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from evermind_manifests.errors import BudgetError, InputError
from evermind_manifests.manifest import Manifest
from evermind_manifests.package import Package
from evermind_runtime.budget import check_budget, parse_size
from evermind_runtime.choose_plan import PLAN_NAMES
from evermind_runtime.forecast import process_bytes
from evermind_runtime.machine import Machine
from evermind_runtime.openers import open_location
from evermind_runtime.sizes import ModelSizes, generates
from evermind_runtime.stores.urls import is_url
from evermind_runtime.tokenizer import open_codec

from evermind_pack.benching import Job, Report, report, run_rounds
from evermind_pack.benching.report import same_tokens
from evermind_pack.planning import (
    Prediction,
    Subject,
    method,
    package_subject,
    predict,
    read_routing,
    standard_budgets,
)

from .options import add_policy, add_reading, add_threads, thread_count, token_count
from .plan import machine_rows, model_rows, shown
from .plots import check_pictures, plot_speeds
from .run import token_ids
from .targets import check_targets
from .terminal import (
    counted,
    human_bytes,
    number,
    positive_int,
    print_columns,
    print_json,
    print_table,
    progress,
    remark,
    seconds,
)

EXAMPLES = """\
  evermind-pack bench demo/package
  evermind-pack bench demo/package --budgets 100%,50%,25% --max-new 128 --rounds 5 --json
  evermind-pack bench demo/package --prompt "def " --plot speed.png
  evermind-pack bench demo/package --cold --threads 1
  evermind-pack bench layer/ --prompt-tokens 64"""

_PROMPT_TOKENS = 16
# A speed needs a token after the first.
_LEAST_NEW = 2
_ANY_VOCABULARY = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The package, the work, and the budgets to compare."""
    parser.add_argument("package", metavar="PKG", help="a package, or a peer's model file")
    parser.add_argument(
        "--budgets",
        metavar="SIZES",
        help="comma-separated, each `all` or as for `run` "
        "(default: all, 50%%, 25%%, one token's cycle, least)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text to continue")
    what.add_argument("--tokens", metavar="IDS", help="token ids to continue, as 1,2,3")
    what.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=token_count,
        help=f"a random prompt of that length (default: {_PROMPT_TOKENS})",
    )
    parser.add_argument(
        "--max-new",
        metavar="N",
        type=positive_int,
        default=64,
        help="tokens to generate in a round (default: 64)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=1.0,
        help="1 draws as the model predicts; 0 is greedy, which may go in circles (default: 1)",
    )
    parser.add_argument(
        "--rounds",
        metavar="R",
        type=positive_int,
        default=3,
        help="rounds of all budgets in turn, each in a fresh process (default: 3)",
    )
    add_threads(parser)
    add_policy(parser)
    parser.add_argument(
        "--plan",
        choices=PLAN_NAMES,
        default="auto",
        help="how experts are held, as for `run`; the table shows what was taken (default: auto)",
    )
    add_reading(parser)
    parser.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="forecast the hit rate by replaying this routing trace",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="have the package leave the page cache before loading and before each measurement",
    )
    parser.add_argument(
        "--plot", metavar="PNG", type=Path, help="draw tokens/s over budget (extra: plot)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, forecast beforehand, and compare."""
    _check(args)
    threads = thread_count(args)
    with open_location(args.package) as package:
        prompt = _prompt(args, package)
        rows = args.prompt_tokens or _PROMPT_TOKENS if prompt is None else len(prompt)
        subject = package_subject(package, rows + args.max_new)
        routing = read_routing(subject, args.policy, args.trace, args.profile)
        if args.plot and not subject.sizes.layers:
            raise InputError("--plot: a package without experts has no budgets to compare")
        budgets = _budgets(args.budgets, package.manifest, subject.sizes)
        machine = subject.measure(threads)

    def at_work(budget: int | None) -> Machine:
        from_disk = args.cold or args.io == "direct" or not _cache_holds(machine, subject, budget)
        return machine if from_disk else machine.warm()

    def foresee(budget: int | None) -> Prediction:
        return predict(
            subject,
            budget,
            at_work(budget),
            plan=args.plan,
            policy=args.policy,
            routing=routing,
            prompt_tokens=rows,
            memory=machine.available.bytes if machine.available else None,
        )

    predictions = _those_that_fit(_foreseen(budgets, foresee, asked=bool(args.budgets)), args)
    jobs = {
        name: Job(
            package=args.package,
            budget=budgets[name],
            prompt=prompt,
            prompt_tokens=rows,
            max_new=args.max_new,
            seed=1,
            temperature=args.temperature,
            cold=args.cold,
            options=_load_options(args),
        )
        for name in predictions
    }
    with progress("rounds", quiet=args.quiet) as tell:
        results = run_rounds(jobs, args.rounds, progress=tell)
    reports = [
        report(
            name,
            rounds,
            predictions[name].forecast,
            predictions[name].sizes,
            machine,
            at_work(budgets[name]),
        )
        for name, rounds in results.items()
    ]
    every = [one for rounds in results.values() for one in rounds]
    facts = {
        "unit": "rows" if prompt is None else "tokens",
        "prompt_tokens": rows,
        "max_new": args.max_new,
        "rounds": args.rounds,
        "policy": args.policy,
        "context": subject.sizes.context,
        **routing.to_dict(),
        "guess": args.guess,
        "threads": every[0].threads,
        "cold": all(one.dropped for one in every) if args.cold else None,
        "same_tokens": None if prompt is None else same_tokens(list(results.values())),
    }
    if args.json:
        print_json(
            {
                "package": subject.name,
                "family": subject.family,
                **facts,
                "sizes": subject.sizes.to_dict(),
                "machine": machine.to_dict(),
                "results": [one.to_dict() for one in reports],
                **method(),
            }
        )
    else:
        _print(subject, machine, reports, facts, routing.text, quiet=args.quiet)
    if args.plot:
        _plot(args.plot, subject, reports, foresee)
    return 0


def _check(args: argparse.Namespace) -> None:
    check_targets(args.plot, sources=(args.package, args.trace, args.profile))
    check_pictures(args.plot)
    if is_url(args.package):
        raise InputError(
            f"{args.package}: expected a package on this machine",
            hint="Fetch it first: evermind-pack pull URL -o FOLDER.",
        )
    if not math.isfinite(args.temperature):
        raise InputError(f"--temperature: expected a finite number, found {args.temperature}")
    if args.max_new < _LEAST_NEW:
        raise InputError(f"--max-new: expected {_LEAST_NEW} or more, found {args.max_new}")
    if args.profile and args.policy != "pinned":
        raise InputError("--profile has no meaning without --policy pinned")


def _prompt(args: argparse.Namespace, package: Package) -> list[int] | None:
    """The tokens to continue; nothing for a package that does not generate."""
    manifest = package.manifest
    if not generates(manifest):
        if args.prompt is not None or args.tokens is not None:
            raise InputError(
                f"{args.package}: a package of family {manifest.family!r} does not generate: "
                "expected --prompt-tokens N, the rows to run it on"
            )
        return None
    if args.tokens is not None or args.prompt is not None:
        prompt = _given_prompt(args, package)
        if not prompt:
            raise InputError("the prompt is empty: expected a token or more to continue")
        return prompt
    limit = manifest.plan.inputs["tokens"].limit or _ANY_VOCABULARY
    count = args.prompt_tokens or _PROMPT_TOKENS
    return [int(token) for token in np.random.default_rng(0).integers(0, limit, count)]


def _given_prompt(args: argparse.Namespace, package: Package) -> list[int]:
    if args.tokens is not None:
        return token_ids(args.tokens)
    codec = open_codec(package)
    if codec is None:
        raise InputError(f"{args.package}: it has no tokenizer: expected --tokens 1,2,3")
    return codec.encode(args.prompt)


def _budgets(text: str | None, manifest: Manifest, sizes: ModelSizes) -> dict[str, int | None]:
    """What was written → bytes, the largest first; what comes to the same stands together."""
    if text is None:
        return dict(reversed(standard_budgets(sizes).items()))
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise InputError(f"--budgets: expected sizes like 100%,50%,25%, found {text!r}")
    by_size: dict[int | None, list[str]] = {}
    for name in dict.fromkeys(names):
        size = None if name == "all" else parse_size(name, sizes.all_expert_bytes, "--budgets")
        if size is not None:
            check_budget(size, manifest)
        by_size.setdefault(size if sizes.layers else None, []).append(name)
    largest_first = sorted(by_size, key=lambda size: (size is not None, -(size or 0)))
    return {", ".join(by_size[size]): size for size in largest_first}


def _foreseen(
    budgets: dict[str, int | None], foresee: Callable[[int | None], Prediction], *, asked: bool
) -> dict[str, Prediction]:
    """All that were `asked` for; of those nobody asked for only what the plan can be had with."""
    found = {}
    for name, budget in budgets.items():
        try:
            found[name] = foresee(budget)
        except BudgetError:
            # No budget at all is among them, and refuses no plan for its size.
            if asked:
                raise
    return found


def _those_that_fit(
    forecasts: dict[str, Prediction], args: argparse.Namespace
) -> dict[str, Prediction]:
    """All that were asked for; of those nobody asked for only what memory can hold."""
    too_large = [name for name, one in forecasts.items() if not one.forecast.fits]
    for name in too_large:
        taken = human_bytes(forecasts[name].forecast.rss)
        what = "measured all the same" if args.budgets else "left out"
        remark(
            f"warning: budget {name}: the process would take {taken}, more than there is: {what}",
            quiet=args.quiet,
        )
    if args.budgets:
        return forecasts
    fitting = {name: one for name, one in forecasts.items() if name not in too_large}
    if not fitting:
        raise InputError(
            f"{args.package}: not even the least budget fits the memory there is",
            hint="`evermind-pack plan` says what it would take.",
        )
    return fitting


def _load_options(args: argparse.Namespace) -> dict[str, Any]:
    profile = str(args.profile) if args.profile else None
    return {
        "threads": args.threads,
        "policy": args.policy,
        "profile": profile,
        "io": args.io,
        "guess": args.guess,
        "plan": args.plan,
    }


def _cache_holds(machine: Machine, subject: Subject, budget: int | None) -> bool:
    """Whether the page cache has room for all experts beside the process."""
    if machine.available is None:
        return True
    total = subject.sizes.all_expert_bytes
    taken = process_bytes(subject.sizes, total if budget is None else budget)
    return machine.available.bytes - taken >= total


def _print(
    subject: Subject,
    machine: Machine,
    reports: list[Report],
    facts: dict[str, Any],
    routing: str,
    *,
    quiet: bool,
) -> None:
    print_table(model_rows(subject) | machine_rows(machine))
    print()
    unit = facts["unit"]
    head = ["budget", "", "plan", f"{unit}/s", "forecast", "off", "first token", "hit rate"]
    head += ["read/token", "io", "of bound", "experts", "beyond", "memory", "verdict"]
    rows = [
        [
            one.name,
            human_bytes(one.budget),
            one.plan,
            number(one.tokens_per_second.median),
            shown(one.forecast.tokens_per_second, number),
            _off(one.off),
            f"{seconds(one.first_seconds)} ({_off(one.off_first)})",
            f"{one.hit_rate:.1%}",
            human_bytes(int(one.bytes_per_token)),
            one.io,
            f"{one.share_of_bound:.1%}",
            human_bytes(one.peak_expert_bytes),
            "unknown" if one.rss_beyond is None else human_bytes(one.rss_beyond),
            "unknown"
            if one.rss_bytes is None or one.off_rss is None
            else f"{human_bytes(one.rss_bytes)} ({one.off_rss:+.0%})",
            one.forecast.verdict,
        ]
        for one in reports
    ]
    print_columns([head, *rows])
    print()
    for one in reports:
        for line in one.warnings:
            remark(f"warning: budget {one.name}: {line}", quiet=quiet)
    for line in _remarks(facts, routing):
        remark(line, quiet=quiet)


def _off(share: float) -> str:
    return "inside" if share == 0 else f"{share:+.0%}"


def _remarks(facts: dict[str, Any], routing: str) -> list[str]:
    lines = [
        f"medians of {counted(facts['rounds'], 'round')} of {facts['max_new']} {facts['unit']} "
        f"after {facts['prompt_tokens']}, each in a fresh process, "
        f"{counted(facts['threads'], 'thread')} computing; first token: nothing paged in yet; "
        "beyond: memory beside experts and resident part",
        f"forecast: made beforehand, {routing}, by the formula of `plan`; off, and in brackets: "
        "how far outside it what was measured lies",
    ]
    if facts["cold"] is None:
        lines.append("the package lay in the page cache as far as it fits: see --cold")
    elif facts["cold"]:
        lines.append("the package's pages had left the page cache before loading and measuring")
    else:
        lines.append("warning: the package's pages did not all leave the page cache: not cold")
    if facts["same_tokens"] is not None:
        lines.append(
            "every budget made the same tokens"
            if facts["same_tokens"]
            else "warning: the budgets made different tokens"
        )
    return lines


def _plot(
    path: Path,
    subject: Subject,
    reports: list[Report],
    foresee: Callable[[int | None], Prediction],
) -> None:
    sizes = subject.sizes
    total, least = sizes.all_expert_bytes, sizes.least_budget
    grid = sorted(
        {int(least * (total / least) ** (at / 60)) for at in range(61)} | {sizes.cycle_bytes, total}
    )
    curve = []
    for budget in grid:
        with suppress(BudgetError):  # a plan may need more than some of these
            curve.append((budget, foresee(budget).forecast))
    most = max(one.budget for one in reports)
    if curve and most > total:
        # Pools take more than what is stored: up to there the plan stays what it was.
        curve += [(most, curve[-1][1]), (most, foresee(None).forecast)]
    plot_speeds(
        path,
        f"{subject.name}: speed over budget",
        measured=[
            (
                one.budget / total,
                one.tokens_per_second.median,
                one.tokens_per_second.least,
                one.tokens_per_second.most,
            )
            for one in reports
        ],
        bound=[(one.budget / total, one.bound) for one in reports],
        forecast=[
            (budget / total, one.tokens_per_second.even, one.tokens_per_second.skewed)
            for budget, one in curve or [(one.budget, one.forecast) for one in reports]
        ],
        cycle=sizes.cycle_bytes / total,
    )
