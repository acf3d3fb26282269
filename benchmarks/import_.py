"""Importing a Hugging Face checkpoint of a billion parameters: memory and speed, and running it.

The checkpoint is random, of OLMoE's form, and written here tensor by tensor: no process holds
more of it than a matrix.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .common import (
    Report,
    Table,
    Target,
    folder_bytes,
    fresh,
    peak_bytes,
    random_values,
    resident_bytes,
    run,
)

LARGE = {
    "vocabulary": 50304, "width": 1024, "layers": 12, "heads": 16,
    "experts": 32, "top_k": 4, "hidden": 1024,
}  # fmt: skip
SMALL = {
    "vocabulary": 640, "width": 64, "layers": 2, "heads": 4,
    "experts": 8, "top_k": 2, "hidden": 128,
}  # fmt: skip
ALLOWED = 500 * 10**6
PROMPT, NEW_TOKENS = 64, 64
_FILE_BYTES = 10**9


def measure(quick: bool) -> Report:
    dims = SMALL if quick else LARGE
    with tempfile.TemporaryDirectory() as folder:
        source, package = Path(folder) / "checkpoint", Path(folder) / "package"
        parameters = fresh(write_checkpoint, folder=source, dims=dims)
        made = fresh(convert, source=source, package=package)
        size = folder_bytes(source)
        ran = {
            budget: fresh(generate, package=package, budget=budget, threads=2)
            for budget in ("25%", "100%")
        }
    beyond = max(made["peak"], made["proof"]) - made["trunk"] - made["expert"]
    return Report(
        [
            Table(
                f"Importing {parameters / 1e9:.2f} billion parameters, bfloat16",
                [
                    "",
                    "checkpoint, MB",
                    "seconds",
                    "MB/s",
                    "trunk, MB",
                    "peak RSS, MB",
                    "of the comparing process",
                    "beyond, at most",
                ],
                [
                    [
                        "import",
                        size / 1e6,
                        made["seconds"],
                        size / made["seconds"] / 1e6,
                        made["trunk"] / 1e6,
                        made["peak"] / 1e6,
                        made["proof"] / 1e6,
                        beyond / 1e6,
                    ]
                ],
            ),
            Table(
                "Memory when a stage begins, and at the end",
                ["stage", "seconds", "RSS, MB", "peak so far, MB"],
                [
                    [name, seconds, now / 1e6, peak / 1e6]
                    for name, seconds, now, peak in made["stages"]
                ],
            ),
            Table(
                f"Running it, {PROMPT}-token prompt and {NEW_TOKENS} tokens, 2 threads",
                ["budget", "tokens/s", "first token, s", "hit rate", "peak RSS, MB"],
                [
                    [
                        f"{budget} of the experts ({one['plan']})",
                        one["speed"],
                        one["first"],
                        one["hits"],
                        one["peak"] / 1e6,
                    ]
                    for budget, one in ran.items()
                ],
            ),
        ],
        [
            Target(
                "memory of an import",
                "at most the trunk as stored + one expert + 500 MB",
                f"{beyond / 1e6:.0f} MB beyond the trunk and one expert",
                beyond <= ALLOWED,
            ),
            Target(
                "a quarter of its size",
                "runs in a quarter of the experts' memory",
                f"{ran['25%']['speed']:.1f} tokens/s, {ran['25%']['peak'] / 1e6:.0f} MB",
                ran["25%"]["speed"] > 0,
            ),
        ],
    )


def write_checkpoint(folder: str, dims: dict[str, int]) -> int:
    """A bfloat16 checkpoint in files of about 1 GB; returns how many parameters it has."""
    from evermind_exporters.resident import Stored, TensorFile

    path = Path(folder)
    path.mkdir()
    shapes = _shapes(dims)
    files: list[dict[str, Stored]] = [{}]
    room = _FILE_BYTES
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if size > room and files[-1]:
            files.append({})
            room = _FILE_BYTES
        files[-1][name] = Stored("bf16", shape)
        room -= size
    seeds = {name: seed for seed, name in enumerate(shapes)}

    def read(name: str) -> Iterator[bytes]:
        shape = shapes[name]
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        else:
            values = random_values(shape, seeds[name], shape[-1] ** -0.5)
        yield (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()

    places = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        places |= dict.fromkeys(tensors, file)
        with (path / file).open("wb") as output:
            for part in TensorFile(tensors).parts(read):
                output.write(part)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(_config(dims)))
    return total


def convert(source: str, package: str) -> dict[str, Any]:
    """Import it in this process: seconds, and memory stage by stage."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from evermind_exporters.huggingface.import_ import import_checkpoint
    from evermind_manifests.package import open_package

    stages: list[tuple[str, float, int, int]] = []
    started = time.perf_counter()

    def tell(name: str) -> None:
        passed = time.perf_counter() - started
        stages.append((name, passed, resident_bytes(), peak_bytes()))

    import_checkpoint(Path(source), Path(package), stage=tell)
    tell("done")
    with open_package(Path(package)) as opened:
        manifest = opened.manifest
        assert manifest.resident is not None
        return {
            "seconds": stages[-1][1],
            "stages": stages,
            "peak": stages[-1][3],
            # The package is compared with transformers in a process of its own.
            "proof": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "trunk": manifest.files[manifest.resident].bytes,
            "expert": max(shard.bytes for shard in manifest.shards),
        }


def generate(package: str, budget: str, threads: int) -> dict[str, Any]:
    """Run it in this process with a share of its experts in memory."""
    import evermind_runtime as em

    warnings.simplefilter("ignore", em.PagingWarning)
    prompt = np.random.default_rng(1).integers(0, 500, PROMPT).tolist()
    with em.load(package, budget=budget, plan="paged", threads=threads) as model:
        times = [time.perf_counter()]
        for _ in model.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=[]):
            times.append(time.perf_counter())
        return {
            "speed": (len(times) - 2) / (times[-1] - times[1]),
            "first": times[1] - times[0],
            "hits": model.stats().hit_rate,
            "peak": peak_bytes(),
            "plan": model.plan.name,
        }


def _shapes(dims: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of an OLMoE checkpoint, in the order of its files."""
    width, hidden = dims["width"], dims["hidden"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (dims["vocabulary"], width)}
    for layer in range(dims["layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = width, width
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (width,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{prefix}.mlp.gate.weight"] = dims["experts"], width
        for expert in range(dims["experts"]):
            shapes[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = hidden, width
            shapes[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = hidden, width
            shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = width, hidden
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (dims["vocabulary"], width)}


def _config(dims: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": dims["vocabulary"],
        "hidden_size": dims["width"],
        "num_hidden_layers": dims["layers"],
        "num_attention_heads": dims["heads"],
        "num_key_value_heads": dims["heads"],
        "intermediate_size": dims["hidden"],
        "num_experts": dims["experts"],
        "num_experts_per_tok": dims["top_k"],
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


if __name__ == "__main__":
    run(measure)
