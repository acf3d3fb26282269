"""`evermind-pack run`."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any, get_args

from evermind_manifests.errors import InputError
from evermind_runtime import Model
from evermind_runtime.choose_compute import ComputeName
from evermind_runtime.choose_plan import PLAN_NAMES

from .arrays import (
    read_arrays,
    read_states,
    restore_state,
    write_arrays,
    write_states,
)
from .chat import add_chat_arguments, chat, check_chat
from .generated import Generated, follow
from .introspection import draw_heatmap, print_introspection, write_prometheus
from .loading import load_model
from .options import SAMPLING, add_policy, add_reading, add_sampling, add_threads, thread_count
from .plots import check_pictures
from .remote import add_remote_arguments, remote_options
from .targets import check_targets
from .terminal import human_bytes, print_json, print_table, remark

EXAMPLES = """\
  evermind-pack run shakespeare/ --prompt "def " --max-new 64 --budget 25%
  evermind-pack run shakespeare/ --tokens 1,2,3 --max-new 16 --temperature 0.8 --seed 7 --json
  evermind-pack run olmoe/ --prompt "Once" --temperature 0.7 --top-p 0.9 --repetition-penalty 1.1
  evermind-pack run olmoe/ --chat --system "Be brief." --budget 2GiB
  evermind-pack run olmoe/ --chat --prompt "Who was Ada Lovelace?" --json
  evermind-pack run model.evermind --tokens 1,2,3 --max-new 16 --budget 25%
  evermind-pack run https://models.example.org/shakespeare/ --prompt "def " --max-new 64
  evermind-pack run layer/ --inputs in.npz --outputs out.npz --budget 4MiB
  evermind-pack run chat/ --tokens 1,2,3 --max-new 16 --introspect --heatmap experts.png
  evermind-pack run mood/ --inputs in.npz --outputs out.npz --steps decode"""

# More digits than any id has would only make int() refuse in its own words.
_TOKEN_ID = re.compile(r"\s*\d{1,18}\s*", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Either a prompt to continue, or arrays to push through."""
    parser.add_argument(
        "package", metavar="PKG", help="a package (folder, .zip, URL), or a peer's model file"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text to continue")
    what.add_argument("--tokens", metavar="IDS", help="token ids to continue, as 1,2,3")
    what.add_argument(
        "--inputs", metavar="NPZ", type=Path, help="arrays to run, by the plan's input names"
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="the most expert weights may take in memory: 64MiB, 2GB, 25%% of all, or bytes "
        "(default: all may be resident)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--compute",
        choices=get_args(ComputeName),
        default="auto",
        help="what graphs compute in; auto: half precision on a GPU, where the package has graphs "
        "for it, else f32 (default: auto)",
    )
    add_threads(parser)
    parser.add_argument(
        "--verify",
        choices=("first", "always", "never"),
        default="first",
        help="when a shard's sha256 is checked (default: at its first read)",
    )
    add_policy(parser)
    parser.add_argument(
        "--plan",
        choices=PLAN_NAMES,
        default="auto",
        help="how experts are held: all stacked in float32, all as they are stored, or paged "
        "(default: the fastest that fits)",
    )
    add_reading(parser)
    inside = parser.add_argument_group("introspection")
    inside.add_argument(
        "--introspect",
        action="store_true",
        help="report what experts and routers did; slower, as statistics are measured",
    )
    inside.add_argument(
        "--prometheus", metavar="FILE", type=Path, help="write the counters as Prometheus text"
    )
    inside.add_argument(
        "--heatmap", metavar="PNG", type=Path, help="draw how experts share the tokens"
    )
    network = add_remote_arguments(parser)
    network.add_argument(
        "--prefetch",
        action="store_true",
        help="fetch the experts that the package's profile.json calls hot in the background",
    )
    add_chat_arguments(parser)
    text = parser.add_argument_group("generation (--prompt, --tokens, --chat)")
    text.add_argument(
        "--max-new",
        metavar="N",
        type=int,
        help="tokens to generate at most (default: what the "
        "package says, else 64; for an answer of --chat 1024)",
    )
    add_sampling(text)
    text.add_argument(
        "--stop-token", metavar="ID", type=int, action="append", help="ends the text; repeatable"
    )
    raw = parser.add_argument_group("arrays (--inputs)")
    raw.add_argument("--outputs", metavar="NPZ", type=Path, help="where to write all outputs")
    raw.add_argument(
        "--steps",
        choices=("prefill", "decode"),
        help="all tokens at once, or one by one (default: prefill)",
    )
    raw.add_argument(
        "--state-in",
        metavar="NPZ",
        type=Path,
        help="state to start from; an array that is not in it starts fresh",
    )
    raw.add_argument("--state-out", metavar="NPZ", type=Path, help="where to write the state after")


def run(args: argparse.Namespace) -> int:
    """Generate or run arrays."""
    _check_combination(args)
    with load_model(
        args.package,
        quiet=args.quiet,
        budget=args.budget,
        device=args.device,
        compute=args.compute,
        threads=args.threads,
        verify=args.verify,
        policy=args.policy,
        profile=args.profile,
        io=args.io,
        plan=args.plan,
        guess=args.guess,
        observe=args.introspect,
        remote=remote_options(args, prefetch=args.prefetch),
    ) as model:
        if args.inputs:
            _run_arrays(model, args)
        elif args.chat:
            _chat(model, args)
        else:
            _generate(model, args)
        if args.prometheus:
            write_prometheus(args.prometheus, model.introspect())
        if args.heatmap:
            draw_heatmap(args.heatmap, model.manifest.name, model.introspect())
    return 0


def _check_combination(args: argparse.Namespace) -> None:
    check_chat(args)
    if not args.chat and args.prompt is None and args.tokens is None and args.inputs is None:
        raise InputError("expected one of --prompt, --tokens, --inputs and --chat")
    if args.inputs and not (args.outputs or args.state_out):
        raise InputError("--inputs needs --outputs NPZ (or --state-out NPZ) to write to")
    generation = ("max_new", *SAMPLING, "stop_token")
    misplaced = generation if args.inputs else ("outputs", "steps")
    for name in misplaced:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} has no meaning {'with' if args.inputs else 'without'} --inputs"
            )
    results = (args.outputs, args.prometheus, args.heatmap)
    read = (args.package, args.inputs, args.messages, args.profile)
    check_targets(*results, args.state_out, sources=read)
    # A state may take its own place: it is written whole, once the run has ended.
    check_targets(*results, sources=[args.state_in])
    check_pictures(args.heatmap)
    thread_count(args)


def _run_arrays(model: Model, args: argparse.Namespace) -> None:
    inputs = read_arrays(args.inputs)
    states = read_states(model, args.state_in, inputs)
    started = time.perf_counter()
    outputs = model.forward(inputs, state=states, steps=args.steps or "prefill")
    seconds = time.perf_counter() - started
    if args.outputs:
        write_arrays(args.outputs, outputs)
    if args.state_out:
        write_states(args.state_out, states)
    result = {
        "outputs": {name: list(array.shape) for name, array in outputs.items()},
        "seconds": seconds,
        **_counters(model),
        **_introspection(model, args),
    }
    if args.json:
        print_json(result)
        return
    if not args.quiet:
        rows = {name: f"{array.dtype} {array.shape}" for name, array in outputs.items()}
        print_table(rows | _counter_rows(model))
    if args.introspect:
        print_introspection(model.introspect())


def _generate(model: Model, args: argparse.Namespace) -> None:
    prompt = args.prompt if args.tokens is None else token_ids(args.tokens)
    state = model.new_state()
    if args.state_in:
        restore_state(state, read_arrays(args.state_in))
    generated = model.generate(
        prompt,
        max_new_tokens=args.max_new,
        stop_tokens=args.stop_token,
        state=state,
        **{name: getattr(args, name) for name in SAMPLING},
    )
    if args.prompt is not None and not args.json:
        print(args.prompt, end="", flush=True)
    codec = model.codec
    show = None if args.json else lambda piece: piece.text if codec else f"{piece.token} "
    made = follow(generated, show, begun=args.prompt is not None)
    if args.state_out:
        write_arrays(args.state_out, state.save())
    _report(model, args, made, {} if codec else {"text": None})


def _chat(model: Model, args: argparse.Namespace) -> None:
    found = chat(model, args)
    if found is not None:
        generated, answers = found
        _report(model, args, generated, {"prompt_tokens": answers.prompt_tokens})
    elif args.introspect:
        print_introspection(model.introspect())


def _report(
    model: Model, args: argparse.Namespace, generated: Generated, fields: dict[str, Any]
) -> None:
    if args.json:
        counters = _counters(model) | _introspection(model, args)
        print_json(generated.figures() | fields | counters)
        return
    print()
    if not args.quiet:
        sys.stdout.flush()
        rows = {"made": generated.ended(), "speed": generated.speed()}
        for name, value in (rows | _counter_rows(model)).items():
            remark(f"{name:<14}{value}")
    if args.introspect:
        print_introspection(model.introspect())


def _introspection(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    return {"introspection": model.introspect().to_dict()} if args.introspect else {}


def _counters(model: Model) -> dict[str, Any]:
    stats = model.stats()
    return {
        "expert_hits": stats.expert_hits,
        "expert_misses": stats.expert_misses,
        "hit_rate": stats.hit_rate,
        "bytes_read": stats.bytes_read,
        "read_seconds": stats.read_seconds,
        "wait_seconds": stats.wait_seconds,
        "plan": model.plan.name,
        "plan_reason": model.plan.reason,
        "warnings": [model.thrashing] if model.thrashing else [],
        "prefetches": stats.prefetches,
        "prefetches_used": stats.prefetches_used,
        "prefetch_wasted_bytes": stats.prefetch_wasted_bytes,
        "io": stats.io,
        "io_note": stats.io_note,
        "peak_resident_expert_bytes": stats.peak_resident_expert_bytes,
        "budget_bytes": stats.budget_bytes,
        "device": model.device,
        "compute": model.compute,
        "threads": model.threads,
    }


def _counter_rows(model: Model) -> dict[str, str]:
    stats = model.stats()
    threads = {"threads": f"{model.threads} compute"}
    if not model.manifest.layers:
        return threads
    return threads | {
        "plan": f"{model.plan.name}: {model.plan.reason}",
        "experts": f"{stats.expert_hits:,} hits, {stats.expert_misses:,} misses "
        f"({stats.hit_rate:.0%} hits)",
        "read": f"{human_bytes(stats.bytes_read)}, {stats.io}; waited {stats.wait_seconds:.2f} s",
        "resident": f"at most {human_bytes(stats.peak_resident_expert_bytes)} of experts, "
        f"budget {human_bytes(stats.budget_bytes)}",
    }


def token_ids(text: str) -> list[int]:
    """The ids in `1,2,3`. Raises `InputError`."""
    parts = text.split(",") if text.strip() else []
    if not all(_TOKEN_ID.fullmatch(part) for part in parts):
        raise InputError(f"--tokens: expected ids like 1,2,3, found {text[:80]!r}")
    return [int(part) for part in parts]
