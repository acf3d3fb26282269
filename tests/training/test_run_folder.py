"""Runs on disk: resumed bit for bit, whole after a crash, refused when damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from evermind_exporters import read_source
from evermind_exporters.checkpoints import canonical_shapes, parameter_count, validate_config
from evermind_manifests.errors import CheckpointError, ConfigError, InputError, MissingFileError
from safetensors.numpy import load_file

from evermind_pack.models import EvermindLM, LimbicModel, SharedExpertMoE
from evermind_pack.training import (
    Corpus,
    DivergedError,
    LanguagePlan,
    LimbicBatch,
    LimbicTrainer,
    LimbicTrainerOptions,
    LmTrainer,
    LmTrainerOptions,
    MoeBatch,
    MoeTrainer,
    MoeTrainerOptions,
    RunFolder,
    language_plan,
    python_demo,
    resume_language_model,
    run_training,
    stop_on_interrupt,
    train_language_model,
)

CONFIG = {"dModel": 8, "numLayers": 2, "hiddenDim": 12, "numExperts": 4, "seed": 3}
OPTIONS = LmTrainerOptions(
    lr=0.02, weight_decay=0.01, schedule="cosine", warmup_steps=3, total_steps=12, max_grad_norm=1.0
)
PLAN = LanguagePlan(
    steps=12, batch_size=3, window=8, seed=5, checkpoint_every=4, evaluate_every=5, source={"n": 1}
)
_ARRAY = np.random.default_rng(0).integers(0, 13, 400).astype(np.int32)
CORPUS = Corpus(_ARRAY[:300], _ARRAY[300:], 13, "bytes")


def _interrupt_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(5)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = train_language_model(folder, CORPUS, CONFIG, OPTIONS, PLAN)
    assert result.finished
    return folder


def _stopped(folder: Path, after: int) -> None:
    """Start the same run and stop it after some steps, as Ctrl-C would."""
    stop = threading.Event()

    def on_step(report) -> None:
        if report.step == after:
            stop.set()

    result = train_language_model(folder, CORPUS, CONFIG, OPTIONS, PLAN, on_step=on_step, stop=stop)
    assert not result.finished
    assert result.step == after
    assert f"resume with: evermind-pack train --resume {folder}" in result.summary


def test_a_run_holds_what_export_reads_and_what_resume_needs(whole):
    assert sorted(_contents(whole)) == [
        "checkpoint-00000012/model.safetensors",
        "checkpoint-00000012/optimizer.safetensors",
        "checkpoint-00000012/trainer.json",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    config = json.loads((whole / "config.json").read_text())
    assert config["family"] == "evermind-lm"
    assert config["vocabulary"] == "bytes"
    assert config["vocabSize"] == 13
    assert config["seed"] == 3
    tensors = load_file(whole / "model.safetensors")
    shapes = canonical_shapes("evermind-lm", config)
    assert {name: value.shape for name, value in tensors.items()} == shapes
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [r["step"] for r in records if "validation_loss" in r] == [5, 10, 12]
    assert {"loss", "aux_loss", "grad_norm", "lr", "items", "peak_load"} < set(records[0])
    assert records[0]["items"] == 24


def test_the_same_run_leaves_the_same_files(whole, tmp_path):
    train_language_model(tmp_path / "again", CORPUS, CONFIG, OPTIONS, PLAN)
    assert _contents(tmp_path / "again") == _contents(whole)


@pytest.mark.parametrize("after", [1, 4, 7, 11])
def test_a_resumed_run_ends_as_an_uninterrupted_one_bit_for_bit(whole, tmp_path, after):
    folder = tmp_path / "run"
    _stopped(folder, after)
    seen = []
    result = resume_language_model(folder, CORPUS, on_step=lambda report: seen.append(report.step))
    assert result.finished
    assert seen == list(range(after + 1, 13))
    assert _contents(folder) == _contents(whole)


def test_a_crash_between_checkpoints_loses_only_the_steps_since(whole, tmp_path):
    folder = tmp_path / "run"

    def crash(report) -> None:
        if report.step == 7:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train_language_model(folder, CORPUS, CONFIG, OPTIONS, PLAN, on_step=crash)
    # What a crash may leave besides: a checkpoint half written, a torn line.
    torn = folder / ".writing-checkpoint-00000008"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    seen = []
    resume_language_model(folder, CORPUS, on_step=lambda report: seen.append(report.step))
    assert seen == list(range(5, 13))
    assert _contents(folder) == _contents(whole)


@pytest.mark.parametrize("call", ["save_file", "Path.rename"])
def test_a_failed_checkpoint_leaves_the_one_before(tmp_path, monkeypatch, call):
    folder = tmp_path / "run"
    _stopped(folder, 4)
    before = _contents(folder)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    run = RunFolder.open(folder)
    trainer = run.restore()
    trainer.step(CORPUS.train[:27].reshape(3, 9))
    monkeypatch.setattr(f"evermind_pack.training.run_folder.{call}", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save(trainer, {})
    monkeypatch.undo()
    kept = {name: data for name, data in _contents(folder).items() if ".writing-" not in name}
    assert kept == before
    assert RunFolder.open(folder).restore().steps == 4


def test_ctrl_c_stops_between_steps_and_a_second_one_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(60)
        with pytest.raises(KeyboardInterrupt):
            _interrupt_and_wait()
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_refuses_another_corpus_and_a_run_without_checkpoint(whole, tmp_path):
    other = Corpus(CORPUS.train[1:], CORPUS.validation, 13, "bytes")
    with pytest.raises(ConfigError, match="corpus is not the one"):
        resume_language_model(whole, other)
    with pytest.raises(MissingFileError, match="no checkpoint"):
        resume_language_model(tmp_path, CORPUS)
    assert language_plan(whole) == PLAN


@pytest.mark.parametrize(
    "change", [{"seed": -1}, {"seed": 2**64}, {"steps": 0}, {"window": 0}, {"checkpoint_every": 0}]
)
def test_plans_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(PLAN, **change)


def test_a_new_run_does_not_overwrite_another(whole):
    with pytest.raises(InputError, match="empty folder"):
        train_language_model(whole, CORPUS, CONFIG, OPTIONS, PLAN)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_refused_with_its_name(tmp_path, name):
    folder = tmp_path / "run"
    _stopped(folder, 4)
    path = folder / "checkpoint-00000004" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="checkpoint-00000004"):
        RunFolder.open(folder).restore()


def test_a_diverging_run_stops_and_says_why(tmp_path):
    options = LmTrainerOptions(lr=1e30)
    with pytest.raises(DivergedError, match=r"step \d+: loss"):
        train_language_model(tmp_path / "run", CORPUS, CONFIG, options, PLAN)


def test_float64_models_are_not_saved_as_something_else(tmp_path):
    model = EvermindLM({**CONFIG, "vocabSize": 13}).double()
    run = RunFolder.create(tmp_path / "run", model)
    with pytest.raises(CheckpointError, match="float32"):
        run.save(LmTrainer(model, OPTIONS), {})


def _moe(_: int) -> MoeBatch:
    return MoeBatch(*np.random.default_rng(1).normal(size=(2, 10, 64)))


def _limbic(_: int) -> LimbicBatch:
    rng = np.random.default_rng(1)
    return LimbicBatch(*(rng.normal(size=s) for s in ((9, 32), (9, 8), (9, 8), 9)))


@pytest.mark.parametrize(
    ("make", "batch_of"),
    [
        (lambda: MoeTrainer(SharedExpertMoE({}), MoeTrainerOptions()), _moe),
        (lambda: LimbicTrainer(LimbicModel({}), LimbicTrainerOptions()), _limbic),
    ],
)
def test_the_other_families_resume_as_well(tmp_path, make, batch_of):
    whole = make()
    run_training(RunFolder.create(tmp_path / "a", whole.model), whole, batch_of, steps=5, plan={})
    part = make()
    run = RunFolder.create(tmp_path / "b", part.model)
    run_training(run, part, batch_of, steps=2, plan={})
    run_training(run, run.restore(), batch_of, steps=5, plan={})
    assert _contents(tmp_path / "b") == _contents(tmp_path / "a")
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    with pytest.raises(CheckpointError, match="plan"):
        language_plan(tmp_path / "a")


def test_a_run_folder_is_a_source_for_export(whole):
    source = read_source(whole)
    assert source.family == "evermind-lm"
    assert source.tokenizer == "bytes"
    trained = RunFolder.open(whole).restore().model.to_tensors()
    assert {name: source.tensors[name].tobytes() for name in trained} == {
        name: value.tobytes() for name, value in trained.items()
    }
    model = EvermindLM.from_tensors(source.config, dict(source.tensors))
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_crash_just_after_a_checkpoint_appeared_is_made_good(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    shutil.copytree(folder / "checkpoint-00000012", folder / "checkpoint-00000008")
    assert resume_language_model(folder, CORPUS).finished
    assert _contents(folder) == _contents(whole)


def test_the_demo_preset_fits_together(tmp_path):
    preset = python_demo(steps=50)
    assert preset.options.total_steps == preset.plan.steps == 50
    for number in range(3):
        (tmp_path / f"{number}.py").write_text(f"def f{number}(x):\n    return x\n" * 40)
    (tmp_path / "News.txt").write_text("nothing to learn from")
    corpus = preset.corpus([tmp_path])
    assert 256 < corpus.vocab_size <= preset.vocab_size
    assert python_demo(steps=1).options.warmup_steps == 0
    config = validate_config("evermind-lm", {**preset.config, "vocabSize": preset.vocab_size})
    assert parameter_count("evermind-lm", config) == 4_626_944
