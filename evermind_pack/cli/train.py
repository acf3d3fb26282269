"""`evermind-pack train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermind_manifests.errors import InputError, MissingExtraError

from ..interrupt import stop_on_interrupt
from .terminal import INTERRUPTED, let_threads_sleep, positive_int, print_json, remark

if TYPE_CHECKING:
    from ..training import TrainingResult

EXAMPLES = """\
  evermind-pack train lm --stdlib -o runs/python --steps 400
  evermind-pack train lm --corpus books/ notes.txt --vocab 256 -o runs/books
  evermind-pack train synapse --stdlib -o runs/synapse --steps 400
  evermind-pack train moe --data samples.npz -o runs/layer --experts 16 --top-k 2
  evermind-pack train limbic --data episodes.npz -o runs/mood --steps 200
  evermind-pack train atome --corpus stories/ -o runs/stories --steps 1000
  evermind-pack train tokitai -o runs/quality --size nano --steps 300
  evermind-pack train --resume runs/python"""

FAMILIES = ("lm", "synapse", "atome", "moe", "limbic", "tokitai")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train, on what, and how long; every option has a default that works."""
    parser.add_argument("family", nargs="?", choices=FAMILIES, help="what to train")
    parser.add_argument("-o", "--output", metavar="RUN", type=Path, help="the run folder to write")
    parser.add_argument(
        "--resume", metavar="RUN", type=Path, help="go on from a run's last checkpoint"
    )
    parser.add_argument(
        "--steps", type=positive_int, help="updates to make (default: 700 for lm, else 400)"
    )
    parser.add_argument("--batch", type=positive_int, help="sequences, or samples, per update")
    parser.add_argument("--lr", type=float, help="the highest learning rate")
    parser.add_argument("--seed", type=int, help="of the weights and of the data's order")
    parser.add_argument("--experts", type=positive_int, help="experts per layer")
    parser.add_argument("--top-k", type=positive_int, help="experts a token is routed to")
    parser.add_argument("--hidden", type=positive_int, help="an expert's hidden width")
    parser.add_argument("--aux-weight", type=float, help="weight of the load-balancing loss")
    text = parser.add_argument_group("lm, synapse, atome")
    text.add_argument(
        "--corpus", metavar="PATH", nargs="+", type=Path, help="text files, or folders of them"
    )
    text.add_argument(
        "--stdlib", action="store_true", help="train on Python's own standard library"
    )
    text.add_argument(
        "--vocab",
        type=positive_int,
        help="256 for bytes, more for byte-level BPE (default: 1024; synapse, atome: 256)",
    )
    text.add_argument(
        "--max-bytes", type=positive_int, help="of corpus to read (default: 3,000,000)"
    )
    text.add_argument("--layers", type=positive_int, help="layers (default: 4; synapse: 2)")
    text.add_argument(
        "--d-model", type=positive_int, help="width (default: 128; synapse, atome: 64)"
    )
    text.add_argument(
        "--conv",
        type=positive_int,
        help="tokens a convolution sees (default: 8; atome: 5; not for synapse)",
    )
    text.add_argument(
        "--window", type=positive_int, help="tokens per sequence (default: 128; synapse: 48)"
    )
    atome = parser.add_argument_group("atome")
    atome.add_argument(
        "--pathways", type=int, choices=(3, 5), help="3, or 5 with a wide and a dense one"
    )
    atome.add_argument("--banks", type=positive_int, help="units of each pathway (default: 1)")
    atome.add_argument(
        "--top-k-routing", type=int, help="units a token takes; 0 is all (default: 0)"
    )
    tokitai = parser.add_argument_group("tokitai")
    tokitai.add_argument(
        "--size", choices=("nano", "tiny", "medium", "full"), help="a preset (default: nano)"
    )
    tokitai.add_argument(
        "--depth", type=int, help="an expert's inner layers, with --hidden instead of --size"
    )
    data = parser.add_argument_group("moe, limbic, tokitai")
    data.add_argument(
        "--data",
        metavar="NPZ",
        type=Path,
        help="moe: x (N, D), target (N, D); limbic: x (N, I), state (N, S), delta (N, S), "
        "reward (N,); tokitai: x (N, I), label (N,) (default: a rule made up for it)",
    )


def run(args: argparse.Namespace) -> int:
    """Train; Ctrl-C leaves a checkpoint to resume from."""
    let_threads_sleep()
    try:
        from .training_jobs import resume_job, start_job
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train", "Training") from error
    if (args.family is None) == (args.resume is None):
        raise InputError(f"give what to train ({', '.join(FAMILIES)}), or --resume RUN, not both")
    if args.resume is None and args.output is None:
        raise InputError("-o RUN is needed: the folder the run is written to")
    if args.resume is not None:
        # By identity: a 0 that was given is equal to False.
        given = {n for n, value in vars(args).items() if value is not None and value is not False}
        if ignored := sorted(given - {"resume", "json", "quiet"}):
            raise InputError(
                f"--resume goes on with the run's own settings; leave out "
                f"{', '.join('--' + name.replace('_', '-') for name in ignored)}"
            )
    with stop_on_interrupt() as stop:
        if args.resume is not None:
            result = resume_job(args.resume, stop=stop, quiet=args.quiet or args.json)
        else:
            result = start_job(args, stop=stop)
    _print_result(result, args)
    return 0 if result.finished else INTERRUPTED


def _print_result(result: TrainingResult, args: argparse.Namespace) -> None:
    from ..training.run_folder import METRICS

    last: dict[str, Any] = {}
    metrics = result.folder / METRICS
    if metrics.exists():
        import json

        lines = metrics.read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {}
    if args.json:
        print_json(
            {
                "run": str(result.folder),
                "step": result.step,
                "steps": result.steps,
                "finished": result.finished,
                "last": last,
            }
        )
        return
    print(result.summary)
    if result.finished and not args.quiet:
        remark(f"next: evermind-pack export {result.folder} -o PACKAGE")
