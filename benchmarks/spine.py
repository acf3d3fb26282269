"""What the spine costs: imports, opening, decoding under budgets, prefill, memory.

    python benchmarks/spine.py [--threads N] [--json]

Every figure is a median, every ratio is taken within this one run. Nothing here decides a test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evermind_runtime as em
import msgspec
import numpy as np
from evermind_exporters import ExportOptions, ModelSource, export_package
from evermind_exporters.checkpoints import canonical_shapes, validate_config
from evermind_manifests.manifest import Shard, encode_manifest, parse_manifest
from evermind_manifests.structure import check_structure
from evermind_runtime import onnx_runtime

CONFIG = {
    "vocabSize": 1024,
    "dModel": 128,
    "numLayers": 4,
    "convKernel": 3,
    "hiddenDim": 256,
    "numExperts": 16,
    "topK": 2,
}
NEW_TOKENS = 256
ROUNDS = 7


def median_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def imports() -> dict[str, float]:
    """Milliseconds a fresh interpreter takes, beyond an empty one."""

    def fresh(code: str) -> float:
        command = [sys.executable, "-c", code]
        return (
            median_seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
            * 1000
        )

    empty = fresh("pass")
    return {
        "onnxruntime": fresh("import onnxruntime") - empty,
        "evermind_runtime": fresh("import evermind_runtime") - empty,
        "evermind_runtime + onnxruntime": fresh("import onnxruntime, evermind_runtime") - empty,
        "evermind-pack --help": fresh("from evermind_pack.cli import main; main([])") - empty,
    }


def manifest_20k(package: Path) -> dict[str, float]:
    """Parse and check a manifest of 20,000 shards (5 layers of 4,000 experts)."""
    small = parse_manifest((package / "manifest.json").read_bytes())
    layers = tuple(msgspec.structs.replace(layer, experts=5000, top_k=2) for layer in small.layers)
    kind = small.kinds[layers[0].kind]
    files, shards = dict(small.files), []
    for shard in small.shards:
        files.pop(shard.file, None)
    entry = next(iter(small.files.values()))
    for layer in layers:
        for expert in range(layer.experts):
            path = f"experts/l{layer.layer:03d}/e{expert:05d}.moe0"
            files[path] = msgspec.structs.replace(entry, bytes=kind.bytes)
            shards.append(
                Shard(
                    layer=layer.layer,
                    expert=expert,
                    file=path,
                    offset=0,
                    bytes=kind.bytes,
                    sha256=entry.sha256,
                )
            )
    data = encode_manifest(
        msgspec.structs.replace(small, layers=layers, files=files, shards=tuple(shards))
    )
    manifest = parse_manifest(data)
    problems = check_structure(manifest)
    assert not [p for p in problems if p.severity == "error"], problems[:3]
    return {
        "shards": len(shards),
        "bytes": len(data),
        "parse ms": median_seconds(lambda: parse_manifest(data)) * 1000,
        "structure ms": median_seconds(lambda: check_structure(manifest)) * 1000,
    }


def decoding(packages: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Tokens/s of sampled generation, interleaved; ratios to the same dtype all resident."""
    models = {
        f"{dtype} {budget}": em.load(path, budget=budget)
        for dtype, path in packages.items()
        for budget in ("100%", "50%", "25%", "12.5%")
    }
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        list(model.generate([1, 2, 3], max_new_tokens=NEW_TOKENS, temperature=1.0))
    for _ in range(ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            for _piece in model.generate([1, 2, 3], max_new_tokens=NEW_TOKENS, temperature=1.0):
                pass
            speeds[name].append(NEW_TOKENS / (time.perf_counter() - started))
    result = {}
    for name, model in models.items():
        whole = speeds[f"{name.split()[0]} 100%"]
        ratios = [one / other for one, other in zip(speeds[name], whole, strict=True)]
        result[name] = {
            "tokens/s": statistics.median(speeds[name]),
            "of all resident": statistics.median(ratios),
            "hit rate": model.stats().hit_rate,
        }
        model.close()
    return result


def prefill(packages: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Tokens/s of a 512-token prompt, all resident and with a quarter of the experts."""
    tokens = {"tokens": np.random.default_rng(0).integers(0, 1024, 512)}
    result = {}
    for dtype, path in packages.items():
        with em.load(path) as whole, em.load(path, budget="25%") as quarter:
            times: dict[str, list[float]] = {"whole": [], "quarter": []}
            for _ in range(ROUNDS + 1):
                for name, model in (("whole", whole), ("quarter", quarter)):
                    started = time.perf_counter()
                    model.forward(tokens)
                    times[name].append(time.perf_counter() - started)
            one, other = (statistics.median(values[1:]) for values in times.values())
            result[dtype] = {"tokens/s": 512 / one, "25% of all resident": one / other}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, help="compute threads (default: all cores)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", em.PagingWarning)
    onnx_runtime.start(args.threads)
    config = validate_config("evermind-lm", CONFIG)
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.normal(size=shape) * (1.0 if "norm" in name else 0.05)).astype(np.float32)
        for name, shape in canonical_shapes("evermind-lm", config).items()
    }
    source = ModelSource("evermind-lm", config, tensors, "bench")
    with tempfile.TemporaryDirectory() as folder:
        packages = {dtype: Path(folder) / dtype for dtype in ("f32", "f16")}
        for dtype, path in packages.items():
            export_package(source, path, ExportOptions(dtype=dtype))  # type: ignore[arg-type]
        results = {
            "import, ms": imports(),
            "20,000 shards": manifest_20k(packages["f16"]),
            "decode, 256 new tokens": decoding(packages),
            "prefill, 512 tokens": prefill(packages),
        }
    if args.json:
        print(json.dumps(results, indent=1))
        return
    for title, rows in results.items():
        print(f"\n{title}")
        for name, value in rows.items():
            cells = value if isinstance(value, dict) else {"": value}
            shown = "  ".join(f"{key} {cell:,.3g}".strip() for key, cell in cells.items())
            print(f"  {name:<32}{shown}")


if __name__ == "__main__":
    main()
