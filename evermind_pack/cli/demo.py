"""`evermind-pack demo`: the whole way on real input, in two or three minutes on two cores."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermind_manifests.errors import EvermindPackError, InputError, MissingExtraError

from ..interrupt import stop_on_interrupt
from .terminal import (
    INTERRUPTED,
    human_bytes,
    let_threads_sleep,
    positive_int,
    print_json,
    print_table,
    progress,
    remark,
)

if TYPE_CHECKING:
    from evermind_manifests.validate import Report
    from evermind_runtime import Stats

    from .generated import Generated

EXAMPLES = """\
  evermind-pack demo
  evermind-pack demo -o /tmp/demo --steps 100 --prompt "import "
  evermind-pack demo --budget 15%"""

# About 80 seconds of training on two cores.
_STEPS = 700
_DESCRIPTION = "A small language model of Python source, made by `evermind-pack demo`."


class DemoError(EvermindPackError, RuntimeError):
    """A step of the demo did not give what it promises."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to put it, and the few things worth playing with."""
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("demo"),
        help="a folder for the run and the package (default: demo); a run that is already "
        "there is used, or resumed",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=_STEPS, help=f"training steps (default: {_STEPS})"
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        default="25%",
        help="memory for experts when generating (default: 25%% of all)",
    )
    parser.add_argument("--prompt", default="def", help="text to continue (default: def)")
    parser.add_argument(
        "--max-new",
        metavar="N",
        type=positive_int,
        default=160,
        help="tokens to generate (default: 160)",
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.8, help="0 is greedy (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=3, help="of the sampler (default: 3)")


def run(args: argparse.Namespace) -> int:
    """Train, export, validate, generate paged and unpaged, compare."""
    let_threads_sleep()
    quiet = args.quiet or args.json
    run_folder, package = args.output / "run", args.output / "package"
    _check_own(package)
    _check_generation(args)

    _headline("1/4", "train a language model on Python's standard library", quiet)
    if not _train(run_folder, args, quiet):
        return INTERRUPTED
    _headline("2/4", "export it: one shard per expert, half precision", quiet)
    digest = _export(run_folder, package, quiet)
    _headline("3/4", "validate: every digest, shard and graph, and the results", quiet)
    report = _validate(package, quiet)
    if not report.ok:
        raise DemoError(f"{package}: does not validate\n{report.render()}")
    _headline("4/4", f"generate with room for {args.budget} of the experts", quiet)
    paged = _generate(package, args, args.budget, show=not quiet)
    unpaged = _generate(package, args, None, show=False)

    identical = paged.made.tokens == unpaged.made.tokens
    if args.json:
        print_json(
            {
                "package": str(package),
                "digest": digest,
                "identical": identical,
                "paged": paged.to_dict(),
                "unpaged": unpaged.to_dict(),
            }
        )
    else:
        _print_table(paged, unpaged, identical)
        remark(f'\nnext: evermind-pack run {package} --prompt "class " --budget 15%', quiet=quiet)
    if not identical:
        raise DemoError("the paged run gave other tokens than the unpaged one")
    return 0


def _check_own(package: Path) -> None:
    """Raise `InputError` unless there is nothing, or a package that a demo made."""
    from evermind_manifests.package import open_package

    if not os.path.lexists(package):
        return
    try:
        with open_package(package) as found:
            card = found.manifest.card
            own = card is not None and card.description == _DESCRIPTION
    except EvermindPackError:
        own = False
    if not own:
        raise InputError(
            f"{package}: is there, and not of a demo's making: it would be replaced",
            hint="Give another folder with -o, or move it away.",
        )


def _check_generation(args: argparse.Namespace) -> None:
    """Raise now what can be known before minutes of training."""
    from evermind_manifests.manifest import Generation
    from evermind_runtime.budget import parse_size
    from evermind_runtime.sampling import Sampling

    parse_size(args.budget, 0, "--budget")
    Sampling(temperature=args.temperature, seed=args.seed).sampler(Generation())


@dataclass(frozen=True, slots=True)
class _Run:
    made: Generated
    stats: Stats

    def to_dict(self) -> dict[str, Any]:
        return self.made.figures() | self.stats.to_dict()


def _headline(step: str, text: str, quiet: bool) -> None:
    remark(f"\n[{step}] {text}", quiet=quiet)


def _train(folder: Path, args: argparse.Namespace, quiet: bool) -> bool:
    """Train, resume or reuse; whether the run is finished."""
    try:
        from ..training import RunFolder
        from ..training.presets import python_demo
        from .training_jobs import resume_job, train_lm
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train", "Training") from error
    started = any(folder.glob("checkpoint-*"))
    steps = RunFolder.open(folder).plan().get("steps") if started else args.steps
    if steps != args.steps:
        raise InputError(
            f"{folder}: a run of {steps} steps is there, --steps says {args.steps}",
            hint=f"Give another folder with -o, or --steps {steps} to use this one.",
        )
    with stop_on_interrupt() as stop:
        if started:
            result = resume_job(folder, stop=stop, quiet=quiet)
        else:
            result = train_lm(folder, python_demo(args.steps), stop=stop, quiet=quiet)
    if not result.finished:
        remark("stopped; the same command goes on from here")
    return result.finished


def _export(run_folder: Path, package: Path, quiet: bool) -> str:
    from evermind_exporters import ExportOptions, export_package, read_source
    from evermind_manifests.manifest import Card

    from ..parity import parity_reference

    source = read_source(run_folder)
    options = ExportOptions(
        name="python-demo",
        card=Card(
            description=_DESCRIPTION,
            license="PSF-2.0",
            training_summary=source.card.training_summary,
        ),
        overwrite=True,
    )
    with progress("writing experts", quiet=quiet) as advance:
        digest = export_package(
            source, package, options, reference=parity_reference(source.family), progress=advance
        )
    remark(f"{package}  sha256 {digest}", quiet=quiet)
    return digest


def _validate(package: Path, quiet: bool) -> Report:
    from .validate import check_package

    with progress("validating", quiet=quiet) as advance:
        report = check_package(package, deep=True, parity=True, progress=advance)
    remark(report.render(), quiet=quiet)
    return report


def _generate(package: Path, args: argparse.Namespace, budget: str | None, *, show: bool) -> _Run:
    from evermind_runtime import load

    from .generated import follow

    # Not pools: the two runs must agree in every bit.
    with load(package, budget=budget, plan="auto" if budget else "half") as model:
        if show:
            print(args.prompt, end="", flush=True)
        pieces = model.generate(
            args.prompt,
            max_new_tokens=args.max_new,
            temperature=args.temperature,
            seed=args.seed,
        )
        made = follow(pieces, (lambda piece: piece.text) if show else None)
        if show:
            print("\n")
        return _Run(made, model.stats())


def _print_table(paged: _Run, unpaged: _Run, identical: bool) -> None:
    rows = {"": f"{'paged':>16}{'all resident':>16}"}
    for name, values in {
        "tokens/s": [f"{one.made.tokens_per_second:,.0f}" for one in (paged, unpaged)],
        "expert hits": [f"{one.stats.expert_hits:,}" for one in (paged, unpaged)],
        "expert misses": [f"{one.stats.expert_misses:,}" for one in (paged, unpaged)],
        "hit rate": [f"{one.stats.hit_rate:.1%}" for one in (paged, unpaged)],
        "bytes paged in": [human_bytes(one.stats.bytes_read) for one in (paged, unpaged)],
        "peak experts": [
            human_bytes(one.stats.peak_resident_expert_bytes) for one in (paged, unpaged)
        ],
        "budget": [human_bytes(one.stats.budget_bytes) for one in (paged, unpaged)],
    }.items():
        rows[name] = "".join(f"{value:>16}" for value in values)
    rows["same tokens"] = f"{'yes' if identical else 'NO':>16}"
    print_table(rows)
