"""Train a Tokitai classifier on a made-up rule, pack it, and run it with two of four experts.

The same program takes any size of the family: replace `nano` by `tiny` and its experts have
43 MB each, `full` and they have 404.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import evermind_runtime as em
import numpy as np
import torch
from evermind_exporters import ExportOptions, ModelSource, export_package

from evermind_pack.models import TokitaiMoE
from evermind_pack.parity import parity_reference
from evermind_pack.training import TokitaiTrainer, TokitaiTrainerOptions, rule_batch

STEPS = 200
torch.set_num_threads(1)  # threads cost more than they do on matrices this small
model = TokitaiMoE({"size": "nano", "module": "moe", "seed": 0})
options = TokitaiTrainerOptions(schedule="cosine", warmup_steps=10, total_steps=STEPS)
trainer = TokitaiTrainer(model, options)
reports = [trainer.step(rule_batch(model.config, 256, 0, step)) for step in range(1, STEPS + 1)]
print(f"loss {reports[0].loss:.2f} -> {reports[-1].loss:.2f} in {STEPS} steps")

with tempfile.TemporaryDirectory() as folder:
    package = Path(folder) / "quality"
    source = ModelSource(model.family, model.config, model.to_tensors(), "quality")
    reference = parity_reference(model.family)
    export_package(source, package, ExportOptions(dtype="f16"), reference=reference)

    # Samples no step was trained on.
    x, label = rule_batch(model.config, 500, 0, 0)
    with em.load(package, budget="50%") as runtime:
        found = runtime.forward({"features": x})
        one = runtime.forward({"features": x[:1]}, steps="decode")
        held = runtime.stats().peak_resident_expert_bytes
        counts = runtime.introspect().layers[0].experts

accuracy = float((found["logits"].argmax(-1) == label).mean())
kept = found["router_weights"].sum(-1)
print(f"accuracy {accuracy:.1%}; memory for experts {held:,} bytes, 2 of 4")
print("rows per expert", *(expert.tokens for expert in counts))
# Not renormalised: the output is scaled by the probability that the chosen experts had.
print(f"kept mass {kept.mean():.2f}, from {kept.min():.2f} to {kept.max():.2f}")
assert accuracy > 0.8
np.testing.assert_allclose(one["logits"], found["logits"][:1], atol=1e-4)
