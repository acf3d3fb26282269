"""The process's memory follows the budget: resident part + budget + 100 MiB.

What the 100 MiB are: the interpreter and numpy (about 35), ONNX Runtime's library and a
dozen sessions (about 35), and the intermediate values of one prefill chunk.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.packages import export, random_source

OVERHEAD = 100 * 2**20
PROGRAM = """
import sys, warnings
from pathlib import Path
import evermind_runtime as em
warnings.simplefilter("ignore")
with em.load(sys.argv[1], budget=sys.argv[2]) as model:
    list(model.generate(range(300), max_new_tokens=40, temperature=1.0))
    resident = model.manifest.files[model.manifest.resident].bytes
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    print(peak - resident, model.budget, model.stats().peak_resident_expert_bytes)
"""


# 128 MiB of 2 MiB experts; 63 MiB of 9 MiB experts, 18 MiB each as the float32 they compute in.
MODELS = {
    "f32": {"dModel": 256, "hiddenDim": 1024, "numLayers": 4, "numExperts": 16},
    "f16": {"dModel": 768, "hiddenDim": 3072, "numLayers": 1, "numExperts": 7},
}


@pytest.fixture(scope="module", params=MODELS)
def large_package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random_source("evermind-lm", {"vocabSize": 512, **MODELS[request.param]})
    return export(source, tmp_path_factory.mktemp("large") / "lm", dtype=request.param)


@pytest.mark.parametrize("budget", ["30%", "50%"])
def test_resident_memory_follows_the_budget(large_package: Path, budget: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(large_package), budget],
        capture_output=True,
        text=True,
        check=True,
    )
    process, allowed, held = map(int, result.stdout.split())
    assert held <= allowed
    assert process <= allowed + OVERHEAD
