"""The Tokitai classifier: it learns its rule, and a run goes from the command line to answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evermind_runtime
import numpy as np
import pytest
import torch
from evermind_manifests.errors import ConfigError, InputError
from evermind_manifests.validate import validate
from evermind_runtime.parity import parity_problems

from evermind_pack.models import TokitaiMoE
from evermind_pack.training import (
    RULE_CLASSES,
    RunFolder,
    TokitaiBatch,
    TokitaiTrainer,
    TokitaiTrainerOptions,
    rule_batch,
)
from tests.cli.command_line import call

NANO = {"module": "moe", "size": "nano"}


def test_the_rule_is_what_its_description_says():
    config = TokitaiMoE(NANO).config
    x, label = rule_batch(config, 500, 3, 7)
    assert x.shape == (500, 96)
    assert x.dtype == np.float32
    assert set(label) == set(range(RULE_CLASSES))
    assert (x[:, :74].sum(-1) == 1).all()
    third = (x[:, 74] > -0.43).astype(int) + (x[:, 74] > 0.43)
    assert np.array_equal(label, 3 * (x[:, :74].argmax(-1) % 4) + third)
    again = rule_batch(config, 500, 3, 7)
    assert np.array_equal(again.x, x)
    for other in (rule_batch(config, 500, 3, 8), rule_batch(config, 500, 4, 7)):
        assert not np.array_equal(other.x, x)
    with pytest.raises(ConfigError, match="found 96 and 4") as caught:
        rule_batch(config | {"out_dim": 4}, 1, 0, 0)
    assert "--data" in str(caught.value)


def test_a_few_hundred_steps_learn_it():
    model = TokitaiMoE(NANO)
    options = TokitaiTrainerOptions(schedule="cosine", warmup_steps=10, total_steps=150)
    trainer = TokitaiTrainer(model, options)
    x, label = rule_batch(model.config, 1000, 0, 0)
    before = trainer.evaluate(TokitaiBatch(x, label))
    reports = [trainer.step(rule_batch(model.config, 256, 0, step)) for step in range(1, 151)]
    assert trainer.evaluate(TokitaiBatch(x, label)) < before / 5
    with torch.no_grad():
        found = model(torch.from_numpy(x)).logits.argmax(-1).numpy()
    assert (found == label).mean() > 0.8
    # Balanced: no expert has taken everything (which would be 2).
    assert reports[-1].peak_load < 1.6


@pytest.mark.parametrize(
    ("x", "label"),
    [
        (np.zeros((2, 95)), np.zeros(2, int)),
        (np.zeros((2, 96)), np.zeros(3, int)),
        (np.zeros((0, 96)), np.zeros(0, int)),
        (np.zeros((2, 96)), np.array([0, 20])),
        (np.zeros((2, 96)), np.array([-1, 0])),
        (np.zeros((2, 96)), np.array([0.5, 0])),
    ],
)
def test_samples_that_do_not_fit(x, label):
    trainer = TokitaiTrainer(TokitaiMoE(NANO), TokitaiTrainerOptions())
    with pytest.raises(InputError, match="samples: "):
        trainer.step(TokitaiBatch(x, label))


def test_from_training_to_answers(tmp_path: Path, capsys: Any) -> None:
    """train, export, validate, run: paged as unpaged, decode as prefill."""
    small = ["--hidden", 32, "--depth", 1, "--batch", 64, "--seed", 2**33 + 5]
    whole = tmp_path / "whole"
    arguments = ["train", "tokitai", "-o", whole, *small, "--steps", 12, "--json"]
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    last = json.loads(out)["last"]
    assert last["validation_loss"] > 0
    config = json.loads((whole / "config.json").read_text())
    assert (config["family"], config["seed"], config["size"]) == ("tokitai-moe", 2**33 + 5, "free")

    package = tmp_path / "package"
    assert call(capsys, "export", whole, "-o", package, "--json")[0] == 0
    assert validate(package, deep=True, run=parity_problems).problems == ()
    x = rule_batch(config, 40, 0, 0).x
    with evermind_runtime.load(package) as model:
        unpaged = model.forward({"x": x})
        one_by_one = model.forward({"x": x}, steps="decode")
        assert "12 steps" in model.manifest.card.training_summary
    with evermind_runtime.load(package, budget="50%") as model:
        paged = model.forward({"x": x})
        paged_one_by_one = model.forward({"x": x}, steps="decode")
    for name, array in unpaged.items():
        assert np.array_equal(array, paged[name])
        assert np.array_equal(one_by_one[name], paged_one_by_one[name])
        np.testing.assert_allclose(array, one_by_one[name], atol=1e-4)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--hidden", 16, "--depth", 0, "--batch", 16, "--steps", 4]
    run = tmp_path / "run"
    assert call(capsys, "train", "tokitai", "-o", run, *arguments, "-q")[0] == 0
    expected = (run / "model.safetensors").read_bytes()
    # As if it had been stopped: the same plan, at a checkpoint of two steps.
    stopped = RunFolder.create(tmp_path / "stopped", RunFolder.open(run).restore().model)
    whole = RunFolder.open(run)
    plan, done = whole.plan(), whole.restore()
    fresh = TokitaiTrainer(TokitaiMoE(done.model.config), done.options)
    for step in (1, 2):
        fresh.step(rule_batch(fresh.model.config, 16, 0, step))
    stopped.save(fresh, plan)
    assert call(capsys, "train", "--resume", stopped.path, "-q")[0] == 0
    assert (stopped.path / "model.safetensors").read_bytes() == expected


def test_samples_of_ones_own(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "d.npz"
    np.savez(data, x=rng.normal(size=(30, 7)), label=rng.integers(0, 20, size=30))
    run = tmp_path / "run"
    start = ["train", "tokitai", "-o", run, "--data", data, "--steps", 3]
    code, _, err = call(capsys, *start, "--size", "nano")
    assert (code, "in_dim: expected 96 for size nano, found 7" in err) == (2, True)
    code, _, err = call(capsys, *start, "--hidden", 8)
    assert code == 0, err
    config = json.loads((run / "config.json").read_text())
    assert (config["in_dim"], config["hidden"], config["depth"]) == (7, 8, 2)
    for option in (["--layers", 2], ["--stdlib"]):
        code, _, err = call(capsys, *start, *option)
        assert (code, "no meaning when training tokitai" in err) == (2, True)
    code, _, err = call(capsys, "train", "moe", "-o", run, "--data", data, "--depth", 1)
    assert (code, "--depth has no meaning when training moe" in err) == (2, True)
