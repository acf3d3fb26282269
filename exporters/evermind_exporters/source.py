"""What `export` reads: a training run folder, a peer's file or bundle, or a state dict.

Detected by content. Tensors stay on disk until they are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from evermind_manifests.errors import CheckpointError, ConfigError
from evermind_manifests.json_file import read_object
from evermind_manifests.location import read_head
from evermind_manifests.manifest import Card

from .atome_model import atome_source, read_pickled
from .blueprint import FloatArray, Tensors
from .checkpoints.atome import is_atome
from .checkpoints.peer_file import PeerFile, is_peer_file
from .checkpoints.tkp1 import MAGIC as TKP1_MAGIC
from .families import FAMILIES
from .families.tilelli.params import NAME as TILELLI
from .families.tokitai import NAME as TOKITAI
from .family import ModelFamily, Shape
from .peer_attachments import attachments
from .peer_bundle import MODEL_TYPE, bundle_config
from .peer_tokenizer import TOKENIZER_NAME, VOCAB_NAME, read_peer_tokenizer
from .safetensors_file import SafetensorsFile, check_shapes
from .tokitai_run import ARCH_NAME, CHECKPOINT_NAME, read_tokitai_run

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
METRICS_NAME = "metrics.jsonl"
_MAX_JSON_BYTES = 64 * 1024 * 1024
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to package: `tensors` maps the family's names to float32 arrays.

    `tokenizer` is the content of a tokenizer.json, or `"bytes"` for the byte vocabulary.
    `version`, `card` and `created` go into the package's manifest unless the export's options
    say otherwise; `attachments` are files the package gets as they are, by path.
    """

    family: str
    config: dict[str, Any]
    tensors: Tensors
    name: str
    tokenizer: bytes | Literal["bytes"] | None = None
    version: str = "1"
    card: Card = field(default_factory=Card)
    created: str | None = None
    attachments: Mapping[str, bytes] = field(default_factory=dict)


def read_source(path: Path, *, seed: int | None = None) -> ModelSource:
    """Open a model for export.

    `path` is a folder with `config.json` and `model.safetensors` or one other `.safetensors` file
    (a training run, or the peer's Hugging Face bundle), a `.safetensors` file beside its
    `config.json`, a peer's `MoE0`, `EVL0`, `LMBC` or `.evermind` file, a Tokitai run's
    `checkpoint.tkp1` beside its `arch.json` and, to overrule that, a `config.json`, an Atome
    model's `ATOME01`, `ATOME02` or `ATOMEP3` file beside its `config.json`, or its `.pt`
    checkpoint. A `config.json` without `family` is taken for the family that the tensors tell.
    `FAMILY:PRESET`, where nothing has that name, is an untrained model whose weights are drawn from
    `seed` (default: 0) as they are needed. Raises `LocationError` where nothing is,
    `CheckpointError` for anything that is not one of these, or is damaged, `ConfigError` for a
    `seed` where nothing is drawn.
    """
    preset = _preset(path)
    if preset is not None:
        return _fresh_model(*preset, seed)
    if seed is not None:
        raise ConfigError(f"{path}: seed: expected none, as this model has its weights already")
    head = read_head(path, 16)
    if head is None:
        return _read_folder(path)
    if head.startswith(TKP1_MAGIC):
        return _read_tokitai_run(path)
    if is_atome(head):
        return _tilelli_model(path, *atome_source(path, _read_json(path.parent / CONFIG_NAME)))
    if head.startswith(_ZIP_MAGIC) and path.suffix in (".pt", ".pth"):
        return _tilelli_model(path, *read_pickled(path))
    # Magic words first: a checkpoint's ninth byte may look like the brace of a JSON header.
    if not is_peer_file(head) and head[8:9] == b"{":
        return _read_state_dict(path, path.parent)
    file = PeerFile(path)
    file.verify()
    return peer_source(file)


def peer_source(file: PeerFile) -> ModelSource:
    """A peer's file as a model; what its manifest says beyond the weights comes along."""
    name = Path(file.location).name.split(".")[0] or file.family
    peer = file.manifest
    if peer is None:
        return ModelSource(file.family, file.config, file.tensors, name)
    values = peer.values
    return ModelSource(
        file.family,
        file.config,
        file.tensors,
        peer.name or name,
        version=peer.version or "1",
        card=peer.card,
        created=values.get("createdAt"),
        attachments=attachments(peer, file.read_codec()),
    )


def with_peer_tokenizer(source: ModelSource, path: Path) -> ModelSource:
    """`source` with the tokenizer of a peer's files at `path`; see `read_peer_tokenizer`.

    Raises `CheckpointError` if the model has no vocabulary.
    """
    if "vocabSize" not in source.config:
        raise CheckpointError(f"{path}: a {source.family!r} model has no use for a tokenizer")
    return replace(source, tokenizer=read_peer_tokenizer(path))


def _tilelli_model(
    path: Path, raw: Mapping[str, Any], tensors: Mapping[str, FloatArray]
) -> ModelSource:
    family = FAMILIES[TILELLI]
    shapes = {name: array.shape for name, array in tensors.items()}
    config = family.resolve(raw, shapes)
    check_shapes(shapes, family.shapes(config), str(path), "its configuration")
    return ModelSource(TILELLI, config, tensors, path.stem, family.tokenizer(config))


def _preset(path: Path) -> tuple[ModelFamily, str] | None:
    name, colon, preset = str(path).partition(":")
    if not colon or name not in FAMILIES or os.path.lexists(path):
        return None
    family = FAMILIES[name]
    if preset not in family.presets:
        raise ConfigError(
            f"{path}: expected a preset of {name}: {', '.join(family.presets) or 'it has none'}; "
            f"found {preset!r}"
        )
    return family, preset


def _fresh_model(family: ModelFamily, preset: str, seed: int | None) -> ModelSource:
    config = family.resolve({**family.presets[preset], "seed": seed or 0}, {})
    card = Card(training_summary=f"none: the weights are random, seed {config['seed']}")
    name = f"{family.name}-{preset}"
    return ModelSource(family.name, config, family.initial(config), name, card=card)


def _read_tokitai_run(checkpoint: Path) -> ModelSource:
    run = read_tokitai_run(checkpoint, _read_json(checkpoint.with_name(ARCH_NAME)))
    family = FAMILIES[TOKITAI]
    where = checkpoint.with_name(CONFIG_NAME)
    told = _read_json(where) if where.is_file() else {}
    if (named := told.pop("family", TOKITAI)) != TOKITAI:
        raise CheckpointError(f"{where}: family: expected {TOKITAI!r}, found {named!r}")
    config = family.resolve({**run.raw, **told}, run.shapes)
    check_shapes(run.shapes, family.shapes(config), str(checkpoint), ARCH_NAME)
    name = checkpoint.resolve().parent.name
    summary = f"{run.step} steps" if run.step else None
    return ModelSource(family.name, config, run.tensors, name, card=Card(training_summary=summary))


def _read_folder(folder: Path) -> ModelSource:
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        if (folder / CHECKPOINT_NAME).is_file():
            return _read_tokitai_run(folder / CHECKPOINT_NAME)
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files[:5]) or "none"
            raise CheckpointError(
                f"{folder}: expected {WEIGHTS_NAME} or one other .safetensors file, found {names}",
                hint="Export takes a finished training run, a checkpoint file, or a "
                f"{WEIGHTS_NAME} with its {CONFIG_NAME}.",
            )
        weights = files[0]
    return _read_state_dict(weights, folder)


def _read_state_dict(weights: Path, folder: Path) -> ModelSource:
    where = folder / CONFIG_NAME
    raw = _read_json(where)
    if raw.get("model_type") == MODEL_TYPE and "family" not in raw:
        return _read_bundle(weights, folder, raw)
    tensors = SafetensorsFile(weights)
    family = _family(raw.pop("family", None), tensors.shapes(), weights, where)
    tensors.rename(family.canonical_name)
    vocabulary = raw.pop("vocabulary", None)
    if vocabulary not in (None, "bytes"):
        raise CheckpointError(f"{where}: vocabulary: expected 'bytes', found {vocabulary!r}")
    config = family.resolve(raw, tensors.shapes())
    tensors.check(family.shapes(config), CONFIG_NAME)
    tokenizer: bytes | Literal["bytes"] | None = family.tokenizer(config)
    if (folder / TOKENIZER_NAME).is_file():
        tokenizer = (folder / TOKENIZER_NAME).read_bytes()
    elif vocabulary == "bytes":
        tokenizer = "bytes"
    return ModelSource(
        family.name,
        config,
        tensors,
        folder.resolve().name,
        tokenizer,
        card=Card(training_summary=_training_summary(folder)),
    )


def _family(name: Any, found: Mapping[str, Shape], weights: Path, where: Path) -> ModelFamily:
    """The family config.json names, or the one whose tensors these are."""
    expected = f"{where}: family: expected one of {', '.join(sorted(FAMILIES))}, found"
    if name is not None:
        if not isinstance(name, str) or name not in FAMILIES:
            raise CheckpointError(f"{expected} {name!r}")
        return FAMILIES[name]
    told = [family for family in FAMILIES.values() if family.recognises(found)]
    if len(told) != 1:
        names = sorted(found)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(
            f"{expected} none, and {weights.name} has the tensors of "
            f"{' and '.join(family.name for family in told) or 'none'}: "
            f"{', '.join(names[:5])}{more}",
            hint=f'Add "family" to {CONFIG_NAME}; of a Hugging Face checkpoint, '
            "`evermind-pack import` makes a package.",
        )
    return told[0]


def _training_summary(folder: Path) -> str | None:
    """A sentence from the last line of a training run's metrics."""
    metrics = folder / METRICS_NAME
    if not metrics.is_file():
        return None
    try:
        last = json.loads(metrics.read_bytes().splitlines()[-1])
        text = f"{last['step']} steps, last loss {last['loss']:.4f}"
        if "validation_loss" in last:
            text += f", validation loss {last['validation_loss']:.4f}"
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{metrics}: last line: not a training record: {error}") from error
    return text


def _read_bundle(weights: Path, folder: Path, raw: dict[str, Any]) -> ModelSource:
    """The peer's Hugging Face bundle: a language model."""
    tensors = SafetensorsFile(weights)
    config = bundle_config(raw, tensors.shapes(), str(folder / CONFIG_NAME))
    tensors.check(FAMILIES["evermind-lm"].shapes(config), CONFIG_NAME)
    tokenizer = None
    if (folder / TOKENIZER_NAME).is_file() or (folder / VOCAB_NAME).is_file():
        tokenizer = read_peer_tokenizer(folder)
    return ModelSource("evermind-lm", config, tensors, folder.resolve().name, tokenizer)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the model's configuration is not there",
            hint=f"A .safetensors file needs its {CONFIG_NAME} beside it.",
        )
    return read_object(path, _MAX_JSON_BYTES, CheckpointError)
