"""Train one MoE layer, export it, and run it with memory for two of its sixteen experts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import evermind_runtime as em
import numpy as np
import torch
from evermind_exporters import ExportOptions, ModelSource, export_package

from evermind_pack.models import SharedExpertMoE
from evermind_pack.parity import parity_reference
from evermind_pack.training import MoeBatch, MoeTrainer, MoeTrainerOptions

# A function with sixteen regimes, so that there is something for experts to divide.
rng = np.random.default_rng(0)
centres = rng.normal(size=(16, 8)) * 2
maps = rng.normal(size=(16, 8, 8)) * 0.5
regime = rng.integers(0, 16, size=2000)
x = (centres[regime] + rng.normal(size=(2000, 8)) * 0.3).astype(np.float32)
target = np.einsum("nij,nj->ni", maps[regime], x)

model = SharedExpertMoE({"modelDim": 8, "hiddenDim": 32, "numExperts": 16, "topK": 2, "seed": 1})
options = MoeTrainerOptions(lr=0.01, batch_size=200, epochs=30, aux_weight=0.05)
history = MoeTrainer(model, options).train(MoeBatch(x, target))
print(f"loss {history[0].loss:.3f} -> {history[-1].loss:.3f}, balance {history[-1].aux_loss:.2f}")

with tempfile.TemporaryDirectory() as folder:
    package = Path(folder) / "layer"
    source = ModelSource("shared-expert-moe", model.config, model.to_tensors(), "layer")
    digest = export_package(
        source,
        package,
        ExportOptions(dtype="f32"),
        reference=parity_reference("shared-expert-moe"),
    )
    print(f"package {digest[:16]}…")
    least = 2 * em.load(package).manifest.kinds["relu-ffn"].bytes
    with em.load(package, budget=least) as runtime:
        y = runtime.forward({"x": x[:64]}, steps="decode")["y"]
        stats = runtime.stats()
    expected = model(torch.from_numpy(x[:64])).y.detach().numpy()
    print(f"{stats.expert_hits} hits, {stats.expert_misses} misses, {stats.bytes_read:,} bytes")
    print(f"largest difference from torch: {np.abs(y - expected).max():.1e}")
    assert stats.peak_resident_expert_bytes <= least
    np.testing.assert_allclose(y, expected, atol=1e-4)
