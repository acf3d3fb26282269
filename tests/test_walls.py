"""The four layers import only downwards, and importing the runtime is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "evermind_manifests": ROOT / "manifests" / "evermind_manifests",
    "evermind_runtime": ROOT / "runtime" / "evermind_runtime",
    "evermind_exporters": ROOT / "exporters" / "evermind_exporters",
    "evermind_pack": ROOT / "evermind_pack",
}
ORDER = list(LAYERS)
FOREIGN = {
    "evermind_manifests": {"msgspec", "msgpack", "numpy"},
    "evermind_runtime": {
        "jinja2",
        "msgspec",
        "numpy",
        "obstore",
        "onnxruntime",
        "tokenizers",
        "urllib3",
    },
    "evermind_exporters": {
        "huggingface_hub",
        "ml_dtypes",
        "msgspec",
        "numpy",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "safetensors",
        "tokenizers",
        "torch",
        "tqdm",
        "transformers",
    },
    "evermind_pack": {
        "matplotlib",
        "msgspec",
        "numpy",
        "rich",
        "safetensors",
        "tokenizers",
        "torch",
    },
}


def imports(path: Path) -> set[str]:
    """Top-level names of all absolute imports anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("layer", ORDER)
def test_a_layer_imports_only_what_lies_below(layer: str) -> None:
    allowed = FOREIGN[layer] | set(ORDER[: ORDER.index(layer) + 1]) | sys.stdlib_module_names
    for path in LAYERS[layer].rglob("*.py"):
        assert imports(path) <= allowed, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("evermind_manifests", {"onnxruntime", "onnx", "torch", "tokenizers"}),
        ("evermind_runtime", {"onnx", "torch", "tokenizers", "safetensors", "urllib3", "obstore"}),
        ("evermind_runtime", {"jinja2"}),
        ("evermind_exporters.export", {"torch", "onnxruntime"}),
        ("evermind_exporters.checkpoints", {"torch", "onnx", "onnxruntime", "safetensors"}),
        ("evermind_pack.training", {"onnx", "onnxruntime"}),
        ("evermind_pack.cli", {"numpy", "onnx", "onnxruntime", "torch", "rich", "tokenizers"}),
        ("evermind_pack.cli.run", {"onnx", "torch", "rich", "tokenizers"}),
    ],
)
def test_a_fresh_interpreter_loads_only_what_it_needs(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not absent & set(result.stdout.split())
