"""A limbic model in use: train it to react, then watch two personalities live through a day."""

from __future__ import annotations

import tempfile
from pathlib import Path

import evermind_runtime as em
import numpy as np
from evermind_exporters import ModelSource, export_package

from evermind_pack.models import LimbicModel
from evermind_pack.training import LimbicBatch, LimbicTrainer, LimbicTrainerOptions

THREAT, FRIEND, NOVELTY, QUIET = np.eye(4, dtype=np.float32)
# What each event does to valence, arousal, curiosity, caution, effort, social, attention,
# exploration, and how rewarding it is.
REACTIONS = {
    "threat": (THREAT, [-0.4, 0.5, -0.2, 0.5, 0.1, -0.1, 0.4, -0.4], -1.0),
    "friend": (FRIEND, [0.4, 0.1, 0.1, -0.2, 0.0, 0.5, 0.1, 0.1], 1.0),
    "novelty": (NOVELTY, [0.1, 0.3, 0.5, 0.0, 0.1, 0.0, 0.4, 0.5], 0.5),
    "quiet": (QUIET, [0.0, -0.3, 0.0, -0.1, -0.1, 0.0, -0.2, 0.0], 0.1),
}

rng = np.random.default_rng(0)
events = [list(REACTIONS.values())[n] for n in rng.integers(0, 4, size=400)]
samples = LimbicBatch(
    x=np.array([event[0] for event in events]),
    state=rng.uniform(0, 1, size=(400, 8)).astype(np.float32),
    delta=np.array([event[1] for event in events]),
    reward=np.array([event[2] for event in events]),
)
model = LimbicModel({"inputDim": 4, "hiddenDim": 16, "seed": 3})
trainer = LimbicTrainer(model, LimbicTrainerOptions(epochs=150))
before = trainer.evaluate(samples)
trainer.train(samples)
print(f"loss {before:.3f} -> {trainer.evaluate(samples):.4f}")

PERSONALITIES = {
    "cautious": {"conscientiousness": 90, "riskTolerance": 10, "emotionality": 80},
    "adventurous": {"openness": 95, "riskTolerance": 90, "emotionality": 20},
}
with tempfile.TemporaryDirectory() as folder:
    package = Path(folder) / "mood"
    export_package(ModelSource("limbic", model.config, model.to_tensors(), "mood"), package)
    with em.load(package) as runtime:
        for name, traits in PERSONALITIES.items():
            session = em.LimbicSession(runtime, traits=traits, gain=0.5, recovery=0.1)
            print(f"\n{name}")
            for event in ("quiet", "novelty", "threat", "threat", "friend", "quiet"):
                step = session.step(REACTIONS[event][0])
                mood = session.record()
                print(
                    f"  {event:<8} reward {step.reward:+.2f}  valence {mood['valence']:+.2f}  "
                    f"arousal {mood['arousal']:.2f}  caution {mood['driveCaution']:.2f}  "
                    f"exploration {mood['exploration']:.2f}"
                )
