"""Packages for tests: made once per test run from golden checkpoints or random weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from evermind_exporters import ExportOptions, ModelSource, export_package
from evermind_exporters.checkpoints import Family, read_checkpoint, validate_config
from evermind_exporters.families import FAMILIES
from evermind_manifests.manifest import (
    MANIFEST_NAME,
    FileEntry,
    encode_manifest,
    parse_manifest,
)
from safetensors.numpy import save_file

from evermind_pack.models import initial_tensors
from evermind_pack.parity import parity_reference

GOLDEN = Path(__file__).parent / "fixtures" / "evermind"


def golden_case(case: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((GOLDEN / case / "case.json").read_text())
    return result


def golden_source(case: str, *, half: bool = False) -> ModelSource:
    """A golden model: from its file, or drawn anew where only the digest is stored."""
    stem = case.partition("_")[0]
    path = GOLDEN / case / f"{stem}.{'v2' if half else 'v1'}.bin"
    if path.exists():
        checkpoint = read_checkpoint(path.read_bytes(), path.name)
        return ModelSource(checkpoint.family, checkpoint.config, checkpoint.tensors, case)
    family: Family = {"moe": "shared-expert-moe", "lm": "evermind-lm", "limbic": "limbic"}[stem]
    config = validate_config(family, golden_case(case)["config"])
    return ModelSource(family, config, initial_tensors(family, config), case)


def random_source(
    family: str, config: Mapping[str, Any], seed: int = 0, *, tokenizer: Any = None
) -> ModelSource:
    """A model whose every parameter matters: nothing is zero, norms are near one."""
    resolved = FAMILIES[family].resolve(config, {})
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.normal(size=shape) * 0.3 + ("norm" in name)).astype(np.float32)
        for name, shape in FAMILIES[family].shapes(resolved).items()
    }
    return ModelSource(family, resolved, tensors, "random", tokenizer)


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(dict(weights), folder / "model.safetensors")
    return folder


def export(source: ModelSource, destination: Path, *, parity: bool = False, **options: Any) -> Path:
    reference = parity_reference(source.family) if parity else None
    export_package(source, destination, ExportOptions(**options), reference=reference)
    return destination


def put_file(package: Path, path: str, data: bytes) -> None:
    """Give the package another file, or a new one, and its manifest the digest."""
    (package / path).write_bytes(data)
    manifest = parse_manifest((package / MANIFEST_NAME).read_bytes())
    entry = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    changed = msgspec.structs.replace(manifest, files={**manifest.files, path: entry})
    (package / MANIFEST_NAME).write_bytes(encode_manifest(changed))


LM_CONFIG = {
    "vocabSize": 96,
    "dModel": 32,
    "numLayers": 3,
    "convKernel": 3,
    "hiddenDim": 48,
    "numExperts": 8,
    "topK": 2,
}


@cache
def lm_source() -> ModelSource:
    return random_source("evermind-lm", LM_CONFIG)
