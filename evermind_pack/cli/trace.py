"""`evermind-pack trace`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evermind_manifests.errors import InputError
from evermind_runtime import Model, Piece
from evermind_runtime.arrays import check_inputs
from evermind_runtime.budget import parse_size
from evermind_runtime.layers import all_bytes, cycle_bytes, expert_layers, step_bytes
from evermind_runtime.openers import open_location
from evermind_runtime.profile import encode_profile, profile_of
from evermind_runtime.replay import POLICIES, Replay, replay
from evermind_runtime.trace import Trace, read_trace

from .arrays import read_arrays
from .loading import load_model
from .plots import check_pictures, plot_heatmap, plot_hit_rates
from .remote import add_remote_arguments, remote_options
from .run import token_ids
from .targets import check_targets, write_file
from .terminal import counted, human_bytes, print_json, print_table, progress, remark

EXAMPLES = """\
  evermind-pack trace demo/package --prompt "def " --max-new 256 -o trace.jsonl
  evermind-pack trace layer/ --inputs in.npz --steps decode -o trace.jsonl
  evermind-pack trace --replay trace.jsonl
  evermind-pack trace --replay trace.jsonl --budgets 10%,20%,1MiB --json
  evermind-pack trace --replay trace.jsonl --plot hits.png --heatmap heat.png
  evermind-pack trace --replay trace.jsonl --profile profile.json"""

_BUDGETS = "12.5%,25%,50%"
_GENERATING = ("max_new", "temperature", "seed")
_RECORDING = ("prompt", "tokens", "inputs", "steps", "output", *_GENERATING, "budget")
_REPLAYING = ("package_of", "budgets", "plot", "heatmap", "profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Either a package to record from, or a trace to replay."""
    parser.add_argument("package", metavar="PKG", nargs="?", help="a package to record from")
    record = parser.add_argument_group("recording (PKG)")
    what = record.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text to continue")
    what.add_argument("--tokens", metavar="IDS", help="token ids to continue, as 1,2,3")
    what.add_argument(
        "--inputs", metavar="NPZ", type=Path, help="arrays to run, by the plan's input names"
    )
    record.add_argument(
        "--steps",
        choices=("prefill", "decode"),
        help="of --inputs: all tokens at once, or one by one (default: prefill)",
    )
    record.add_argument("-o", "--output", metavar="FILE", type=Path, help="the trace to write")
    record.add_argument(
        "--max-new",
        metavar="N",
        type=int,
        help="tokens to generate at most (default: what the package says, else 64)",
    )
    record.add_argument(
        "--temperature", metavar="T", type=float, help="0 is greedy (default: the package's)"
    )
    record.add_argument("--seed", type=int, help="of the sampler (default: 1)")
    record.add_argument(
        "--budget", metavar="SIZE", help="as for `run`; routing does not depend on it"
    )
    again = parser.add_argument_group("replaying (--replay)")
    again.add_argument("--replay", metavar="FILE", type=Path, help="a trace to replay")
    again.add_argument(
        "--package",
        metavar="PKG",
        dest="package_of",
        help="where a trace without a head was recorded: gives the experts' number and sizes",
    )
    again.add_argument(
        "--budgets",
        metavar="SIZES",
        help=f"comma-separated, each as for `run` (default: {_BUDGETS}, as far as they hold a "
        "step's experts)".replace("%", "%%"),
    )
    again.add_argument(
        "--plot", metavar="PNG", type=Path, help="draw hit rate over budget (extra: plot)"
    )
    again.add_argument(
        "--heatmap", metavar="PNG", type=Path, help="draw layer by expert usage (extra: plot)"
    )
    again.add_argument(
        "--profile", metavar="JSON", type=Path, help="write how hot each expert is, for `pinned`"
    )
    add_remote_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Record or replay."""
    if (args.package is None) == (args.replay is None):
        raise InputError("give either a package to record from, or --replay FILE")
    for name in _REPLAYING if args.package else _RECORDING:
        if getattr(args, name) is not None:
            option = {"package_of": "package"}.get(name, name).replace("_", "-")
            mode = "without" if args.package else "with"
            raise InputError(f"--{option} has no meaning {mode} --replay")
    results = (args.output, args.plot, args.heatmap, args.profile)
    check_targets(*results, sources=(args.package, args.replay, args.package_of, args.inputs))
    check_pictures(args.plot, args.heatmap)
    if args.package:
        _record(args)
    else:
        _replay(args)
    return 0


def _record(args: argparse.Namespace) -> None:
    given = args.prompt is not None or args.tokens is not None or args.inputs is not None
    if args.output is None or not given:
        raise InputError(
            "recording needs --prompt TEXT, --tokens IDS or --inputs NPZ, and -o FILE",
            hint="To replay what was recorded: evermind-pack trace --replay FILE",
        )
    for name in _GENERATING if args.inputs else ("steps",):
        if getattr(args, name) is not None:
            mode = "with" if args.inputs else "without"
            raise InputError(f"--{name.replace('_', '-')} has no meaning {mode} --inputs")
    inputs = None if args.inputs is None else read_arrays(args.inputs)
    remote = remote_options(args)
    model = load_model(args.package, quiet=args.quiet, budget=args.budget, remote=remote)
    with model, progress("tokens", quiet=args.quiet) as report:
        if not model.manifest.layers:
            raise InputError(f"{args.package}: there are no experts to trace")
        made = 0
        if inputs is None:
            generated = _generated(model, args)
            _begin(model, args.output)
            for made, _ in enumerate(generated, 1):
                report(made, args.max_new or made)
        else:
            check_inputs(model.manifest.plan, inputs)
            _begin(model, args.output)
            model.forward(inputs, steps=args.steps or "prefill")
    trace = read_trace(args.output)
    if args.json:
        result = {"trace": str(args.output), "generated": made, **_summary(trace)}
        print_json(result)
    else:
        remark(
            f"{args.output}: {counted(trace.tokens, 'token')} through "
            f"{counted(len(trace.layers), 'layer')}, "
            f"{human_bytes(args.output.stat().st_size)}",
            quiet=args.quiet,
        )


def _generated(model: Model, args: argparse.Namespace) -> Iterator[Piece]:
    prompt = args.prompt if args.tokens is None else token_ids(args.tokens)
    return model.generate(
        prompt, max_new_tokens=args.max_new, temperature=args.temperature, seed=args.seed
    )


def _begin(model: Model, path: Path) -> None:
    try:
        model.trace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _replay(args: argparse.Namespace) -> None:
    trace = _read(args)
    budgets = _standard(trace) if args.budgets is None else _budgets(trace, args.budgets)
    results = _table(trace, list(budgets.values()), args.quiet)
    if not trace.recorded_layers:
        remark("the experts are counted by the ids seen: --package says how many", quiet=args.quiet)
    if args.profile:
        write_file(args.profile, encode_profile(profile_of(trace)))
    if args.heatmap:
        _draw_heatmap(trace, args.heatmap, args.replay.name)
    if args.plot:
        _draw_hit_rates(trace, args.plot, args.replay.name, args.quiet)
    if args.json:
        total = all_bytes(trace.layers)
        rows = [
            {
                "policy": one.policy,
                "budget": one.budget,
                "share": one.budget / total,
                "hits": one.hits,
                "misses": one.misses,
                "hit_rate": one.hit_rate,
                "bytes_read": one.bytes_read if trace.recorded_layers else None,
            }
            for one in results
        ]
        print_json({"trace": str(args.replay), **_summary(trace), "results": rows})
        return
    rates = {(one.policy, one.budget): f"{one.hit_rate:.3f}" for one in results}
    columns = {text: max(len(text), 5) for text in budgets}
    print_table(
        {"hit rate": "  ".join(f"{text:>{width}}" for text, width in columns.items())}
        | {
            policy: "  ".join(
                f"{rates[policy, budgets[text]]:>{width}}" for text, width in columns.items()
            )
            for policy in POLICIES
        }
    )
    cycle = cycle_bytes(trace.layers) / all_bytes(trace.layers)
    remark(
        f"{counted(trace.tokens, 'token')}, {counted(len(trace.layers), 'layer')}; "
        f"one token's cycle is {cycle:.1%} of all experts; "
        "`pinned` knows this trace's own heat, `belady` its future",
        quiet=args.quiet,
    )


def _read(args: argparse.Namespace) -> Trace:
    trace = read_trace(args.replay)
    if args.package_of:
        with open_location(args.package_of, remote_options(args)) as package:
            trace = trace.of(expert_layers(package.manifest), str(args.replay))
    if not trace.steps:
        raise InputError(f"{args.replay}: expected a step or more, found none")
    return trace


def _standard(trace: Trace) -> dict[str, int]:
    """What is replayed where nobody says: of the usual budgets those that hold a step."""
    least = step_bytes(trace.layers)
    usual = _budgets(trace, _BUDGETS)
    enough = {text: size for text, size in usual.items() if size >= least}
    return enough or _budgets(trace, "100%")


def _budgets(trace: Trace, text: str) -> dict[str, int]:
    """What was written → bytes."""
    total = all_bytes(trace.layers)
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    if not sizes:
        raise InputError(f"--budgets: expected sizes like {_BUDGETS}, found {text!r}")
    for size in sizes:
        if not size.endswith("%") and not trace.recorded_layers:
            raise InputError(
                f"--budgets: {size}: the trace does not say how large its experts are",
                hint="Give a share, like 25%, or the model with --package PKG.",
            )
    return {size: parse_size(size, total, "--budgets") for size in sizes}


def _table(trace: Trace, budgets: list[int], quiet: bool) -> list[Replay]:
    wanted = [(policy, budget) for policy in POLICIES for budget in budgets]
    results = []
    with progress("replays", quiet=quiet) as report:
        for done, (policy, budget) in enumerate(wanted, 1):
            results.append(replay(trace, policy, budget))
            report(done, len(wanted))
    return results


def _summary(trace: Trace) -> dict[str, Any]:
    return {
        "tokens": trace.tokens,
        "steps": len(trace.steps),
        "layers": len(trace.layers),
        "experts": sum(layer.experts for layer in trace.layers),
        "package": trace.package,
        "cycle_share": cycle_bytes(trace.layers) / all_bytes(trace.layers),
    }


def _draw_hit_rates(trace: Trace, path: Path, name: str, quiet: bool) -> None:
    total = all_bytes(trace.layers)
    least, cycle = step_bytes(trace.layers), cycle_bytes(trace.layers)
    # Close together up to the cycle, where recency falls off a cliff, then every tenth.
    steep = [int(least * (cycle / least) ** (at / 5)) for at in range(6)]
    budgets = sorted({*steep, cycle - 1, cycle, *(total * tenth // 10 for tenth in range(2, 11))})
    budgets = [budget for budget in budgets if budget >= least]
    curves: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    for one in _table(trace, budgets, quiet):
        curves[one.policy].append((one.budget / total, one.hit_rate))
    plot_hit_rates(
        path, f"Hit rate by policy: {name}, {counted(trace.tokens, 'token')}", curves, cycle / total
    )


def _draw_heatmap(trace: Trace, path: Path, name: str) -> None:
    profile = profile_of(trace)
    shares = []
    for layer, heat in zip(trace.layers, profile.layers, strict=True):
        routed = sum(heat.uses) / layer.top_k or 1
        shares.append([uses / routed for uses in heat.uses])
    plot_heatmap(
        path,
        f"Expert usage: {name}, {counted(trace.tokens, 'token')}",
        [layer.layer for layer in trace.layers],
        shares,
    )
