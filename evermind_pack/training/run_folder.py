"""A training run on disk: configuration, metrics, and checkpoints that are whole or absent.

    RUN/config.json            the model's configuration, its `family`, `vocabulary` if bytes
    RUN/tokenizer.json         optional
    RUN/model.safetensors      the newest checkpoint's weights: with config.json what `export` reads
    RUN/metrics.jsonl          one JSON object per step
    RUN/checkpoint-00000200/   model.safetensors, optimizer.safetensors, trainer.json

A checkpoint is written in a temporary folder, synced and renamed; only then does it replace
the one before it. Nothing here reads a clock: two equal runs leave equal files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from evermind_manifests.destination import check_outside_packages
from evermind_manifests.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    LocationError,
    MissingFileError,
)
from evermind_manifests.journal import sync
from evermind_manifests.json_file import read_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..models import FamilyModel, model_type
from .atome_trainer import AtomeTrainer
from .limbic_trainer import LimbicTrainer, LimbicTrainerOptions
from .lm_trainer import LmTrainer, LmTrainerOptions
from .moe_trainer import MoeTrainer, MoeTrainerOptions
from .optimizer import OptimizerOptions
from .run_lock import LOCK_NAME
from .tokitai_trainer import TokitaiTrainer, TokitaiTrainerOptions
from .trainer import Trainer

CONFIG = "config.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
METRICS = "metrics.jsonl"
TOKENIZER = "tokenizer.json"

AnyTrainer = Trainer[Any, Any, Any]

_CHECKPOINT = "checkpoint-"
_TEMPORARY = ".writing-"
_MOST_JSON_BYTES = 64 * 1024 * 1024

_TRAINERS: dict[str, tuple[type[AnyTrainer], type[OptimizerOptions]]] = {
    "shared-expert-moe": (MoeTrainer, MoeTrainerOptions),
    "evermind-lm": (LmTrainer, LmTrainerOptions),
    "limbic": (LimbicTrainer, LimbicTrainerOptions),
    "tilelli": (AtomeTrainer, LmTrainerOptions),
    "tokitai-moe": (TokitaiTrainer, TokitaiTrainerOptions),
    "synapse": (LmTrainer, LmTrainerOptions),
}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder, which exists; who writes to it holds its lock (`run_lock.py`)."""

    path: Path

    @classmethod
    def create(
        cls, path: Path, model: FamilyModel, tokenizer: bytes | Literal["bytes"] | None = None
    ) -> Self:
        """Start a run; raises `InputError` when the folder exists and is not empty.

        What a run left that ended before its first checkpoint does not count.
        """
        clear_start(path)
        path.mkdir(parents=True, exist_ok=True)
        config = {"family": model.family, **model.config}
        if tokenizer == "bytes":
            config["vocabulary"] = "bytes"
        elif tokenizer is not None:
            _write(path / TOKENIZER, tokenizer)
        _write(path / CONFIG, _json(config))
        sync(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """A run to resume.

        Raises `LocationError` when it is not there, `MissingFileError` when it has no checkpoint.
        """
        if not path.is_dir():
            raise LocationError(f"{path}: there is no such folder")
        run = cls(path)
        run.latest()
        return run

    def latest(self) -> Path:
        """The newest checkpoint's folder."""
        found = self._checkpoints()
        if not found:
            raise MissingFileError(
                f"{self.path}: no {_CHECKPOINT}* folder",
                hint="The run was stopped before its first checkpoint: start it again.",
            )
        return found[-1]

    def save(self, trainer: AnyTrainer, plan: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then drop older ones; `plan` (JSON values) is kept with it.

        Raises as `require_resumable` does.
        """
        final = self.path / f"{_CHECKPOINT}{trainer.steps:08d}"
        if not final.exists():
            require_resumable(trainer)
            self._write_checkpoint(final, trainer, plan)
        # Also when it was there already: a crash may have come just after it appeared.
        _write(self.path / MODEL, (final / MODEL).read_bytes())
        sync(self.path)
        for older in self._checkpoints()[:-1]:
            shutil.rmtree(older)
        return final

    def plan(self) -> dict[str, Any]:
        """What `save` was given with the newest checkpoint."""
        where = self.latest() / TRAINER
        plan = _read_json(where).get("plan")
        if not isinstance(plan, dict):
            raise CheckpointError(f"{where}: plan: expected an object, found {plan!r}")
        return plan

    def restore(self) -> AnyTrainer:
        """The trainer as the newest checkpoint left it.

        Raises `CheckpointError` when a file of it is damaged, `ConfigError` for a bad config.json.
        """
        folder = self.latest()
        config = _read_json(self.path / CONFIG)
        family = config.pop("family", None)
        config.pop("vocabulary", None)  # the tokenizer's, not the model's
        if family not in _TRAINERS:
            raise CheckpointError(f"{self.path / CONFIG}: family: found {family!r}")
        record = _read_json(folder / TRAINER)
        try:
            model_tensors = load_file(folder / MODEL)
            moments = load_file(folder / OPTIMIZER)
            trainer_type, options_type = _TRAINERS[family]
            options = options_type(**record["options"])
            step = int(record["step"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: damaged checkpoint: {error}") from error
        arrays = {name: tensor.numpy() for name, tensor in model_tensors.items()}
        trainer = trainer_type(model_type(family, config).from_tensors(config, arrays), options)
        trainer.restore(step, moments)
        return trainer

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record, finite numbers only, to metrics.jsonl."""
        with (self.path / METRICS).open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def tidy(self, step: int) -> None:
        """Drop what a crash left: half-written files, and metrics of steps after `step`."""
        for left in self.path.glob(f"{_TEMPORARY}*"):
            _remove(left)
        path = self.path / METRICS
        if not path.exists():
            return
        kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
        _write(path, b"".join(line + b"\n" for line in kept))

    def _write_checkpoint(self, final: Path, trainer: AnyTrainer, plan: Mapping[str, Any]) -> None:
        temporary = final.with_name(_TEMPORARY + final.name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors = {
            key: torch.from_numpy(value) for key, value in trainer.model.to_tensors().items()
        }
        save_file(tensors, temporary / MODEL, metadata={"format": "pt"})
        save_file(trainer.optimizer_tensors(), temporary / OPTIMIZER, metadata={"format": "pt"})
        record = {"options": asdict(trainer.options), "plan": dict(plan), "step": trainer.steps}
        (temporary / TRAINER).write_bytes(_json(record))
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        temporary.rename(final)
        sync(self.path)

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self.path.glob(f"{_CHECKPOINT}*") if path.is_dir())


def clear_start(path: Path) -> None:
    """Empty the folder of a run that ended before its first checkpoint.

    Raises `InputError`, and touches nothing, for a folder with anything else in it, one inside
    a package, or for what is no folder. A new or empty folder is left as it is.
    """
    check_outside_packages(path)
    if not os.path.lexists(path):
        return
    try:
        found = [item for item in path.iterdir() if item.name != LOCK_NAME]
    except OSError as error:
        raise InputError(f"{path}: expected a folder: {error.strerror}") from error
    # A model's or tokenizer's folder has a config.json too, which says something else.
    begun = all(item.name.startswith(_TEMPORARY) for item in found) or _is_config(path / CONFIG)
    if not begun or not all(map(_begins_run, found)):
        names = ", ".join(sorted(item.name for item in found)[:5])
        raise InputError(
            f"{path}: expected a new or empty folder, found {names}",
            hint="Choose another one, or resume the run that is there.",
        )
    for item in found:
        _remove(item)


def _begins_run(path: Path) -> bool:
    """Whether a run writes this file before its first checkpoint."""
    if path.name.startswith(_TEMPORARY):
        return True
    return path.name in (CONFIG, TOKENIZER, METRICS) and path.is_file()


def _is_config(path: Path) -> bool:
    try:
        return _read_json(path).get("family") in _TRAINERS
    except CheckpointError:
        return False


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def require_resumable(trainer: AnyTrainer) -> None:
    """Refuse a trainer that would not resume from a checkpoint as it was.

    Raises `ConfigError` for one with state of its own besides the optimiser's (mixed
    precision's loss scaler), `CheckpointError` for a model that is not in float32.
    """
    expected, _ = _TRAINERS[trainer.model.family]
    if type(trainer) is not expected:
        raise ConfigError(
            f"run folder: trainer: expected {expected.__name__}, found {type(trainer).__name__}",
            hint="Checkpoints hold no state but the optimiser's: train outside a run folder.",
        )
    for name, parameter in trainer.model.named_parameters():
        if parameter.dtype != torch.float32:
            raise CheckpointError(f"{name}: dtype: expected float32, found {parameter.dtype}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, _MOST_JSON_BYTES, CheckpointError)
    except LocationError as error:
        raise CheckpointError(error.message, hint=error.hint) from error


def _step_of(line: bytes) -> float:
    """A metrics record's step; a line torn by a crash counts as after every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Replace `path` in one step."""
    temporary = path.with_name(_TEMPORARY + path.name)
    temporary.write_bytes(data)
    sync(temporary)
    temporary.replace(path)
