"""A Synapse model from training to text; runs resume like any other language model's."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from evermind_exporters.families.synapse.params import synapse_config

from evermind_pack.cli import main
from evermind_pack.models import SynapseModel
from evermind_pack.training import (
    LanguagePlan,
    LmTrainer,
    LmTrainerOptions,
    StepReport,
    build_corpus,
    resume_language_model,
    synapse_demo,
    train_language_model,
)


def test_a_synapse_model_from_training_to_text(tmp_path: Path) -> None:
    corpus = tmp_path / "words.txt"
    corpus.write_text("one two three four five six seven eight nine ten. " * 60)
    run, package, out = (str(tmp_path / name) for name in ("run", "package", "out.npz"))
    small = "--steps 12 --batch 4 --window 24 --d-model 16 --layers 1 --experts 4 --hidden 16"
    train = ["train", "synapse", "--corpus", str(corpus), "-o", run, *small.split(), "-q"]
    assert main([*train, "--top-k", "2", "--seed", "3"]) == 0
    first, *_, last = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]
    assert first["aux_loss"] >= 1
    assert main(["export", run, "-o", package, "-q"]) == 0
    assert main(["validate", package, "--deep", "--run", "-q"]) == 0
    assert main(["run", package, "--prompt", "one ", "--max-new", "8", "-q"]) == 0
    np.savez(tmp_path / "in.npz", tokens=np.arange(20))
    assert main(["run", package, "--inputs", str(tmp_path / "in.npz"), "--outputs", out, "-q"]) == 0
    assert main([*train[:2], "--data", out, "-o", str(tmp_path / "other")]) == 2
    assert main([*train, "--conv", "3"]) == 2


def test_a_synapse_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    corpus = build_corpus(["one two three four. " * 100], vocab_size=256)
    config = synapse_config({**synapse_demo().config, "d_model": 16, "n_layers": 1})
    plan = LanguagePlan(steps=4, batch_size=2, window=16, checkpoint_every=2)
    weights = []
    for name, stops in (("whole", ()), ("parts", (2,))):
        stop = threading.Event()

        def on_step(
            report: StepReport, stops: tuple[int, ...] = stops, stop: threading.Event = stop
        ) -> None:
            if report.step in stops:
                stop.set()

        folder = tmp_path / name
        train_language_model(
            folder,
            corpus,
            config,
            LmTrainerOptions(lr=0.002),
            plan,
            family="synapse",
            on_step=on_step,
            stop=stop,
        )
        if stops:
            resume_language_model(folder, corpus)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_balancing_loss_is_applied() -> None:
    """Its gradient reaches the routers: with it, they differ from what they are without."""
    batch = [np.arange(12) % 7, np.arange(12) % 5]
    config = {"vocab_size": 8, "d_model": 16, "n_layers": 2, "d_expert": 8, "d_state": 4}
    config |= {"d_xlstm_hidden": 16, "n_memory_heads": 2, "d_memory": 4, "seed": 1}
    gradients = []
    for weight in (0.0, 1.0):
        trainer = LmTrainer(SynapseModel(config), LmTrainerOptions(aux_weight=weight))
        losses = trainer.losses(batch)
        torch.testing.assert_close(losses.total, losses.loss + weight * losses.aux_loss)
        torch.autograd.backward(losses.total)
        router = trainer.model.layers[0].thalamus.router_proj.weight
        gradients.append(router.grad.clone())
        # Labels are shifted once: 11 positions of each row predict their successor.
        assert losses.items == 22
        assert losses.loss.item() == pytest.approx(expected_loss(trainer.model, batch), rel=1e-5)
    assert not torch.allclose(*gradients)


@torch.no_grad()
def expected_loss(model: SynapseModel, batch: list[np.ndarray]) -> float:
    rows = []
    for row in batch:
        tokens = torch.from_numpy(row)
        logits = model(tokens.unsqueeze(0))[0]
        rows.append(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]))
    return float(torch.stack(rows).mean())
