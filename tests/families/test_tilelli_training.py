"""A trained Atome model, from the command line to a package that is paged."""

from __future__ import annotations

import json
from pathlib import Path

import evermind_runtime as em
import numpy as np
import pytest
from evermind_exporters import ExportOptions, export_package, read_source
from evermind_manifests.package import open_package
from evermind_manifests.validate import validate
from evermind_runtime.parity import parity_problems

from evermind_pack.cli import main
from evermind_pack.models import AtomeLmModel
from evermind_pack.parity import parity_reference
from evermind_pack.training import (
    AtomeTrainer,
    LanguagePlan,
    LmTrainerOptions,
    build_corpus,
    resume_language_model,
    train_language_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

TEXT = "the cat sat on the mat. a dog ran to the red barn. " * 40
CONFIG = {
    "d_model": 32, "n_layers": 1, "d_head": 8, "pathways": 3, "n_banks": 2,
    "top_k_routing": 3,
}  # fmt: skip
OPTIONS = LmTrainerOptions(lr=0.02, warmup_steps=10, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 steps on a text of two sentences."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    corpus = build_corpus([TEXT], vocab_size=256)
    plan = LanguagePlan(steps=200, batch_size=4, window=24, checkpoint_every=100)
    train_language_model(folder, corpus, CONFIG, OPTIONS, plan, family="tilelli")
    return folder


def test_straight_through_training_learns(run: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 200
    assert np.mean(losses[:5]) > 3
    # Bytes that the last one decides cost 0.9 nats here; half of that takes context.
    assert np.mean(losses[-20:]) < 0.5


def test_a_trained_model_is_packaged_validated_and_paged(run: Path, tmp_path: Path) -> None:
    source = read_source(run)
    path = tmp_path / "p"
    export_package(source, path, ExportOptions(), reference=parity_reference("tilelli"))
    report = validate(path, deep=True, run=parity_problems)
    assert report.ok, report.render()
    tokens = np.frombuffer(TEXT[:40].encode(), np.uint8).astype(np.int64)
    found = []
    for budget in (None, "25%"):
        with em.load(path, budget=budget) as model:
            whole = model.forward({"tokens": tokens})["logits"]
            single = model.forward({"tokens": tokens}, steps="decode")["logits"]
            np.testing.assert_allclose(single, whole, rtol=0, atol=1e-4)
            found.append(np.concatenate([whole, single]))
            text = "".join(piece.text for piece in model.generate(TEXT[:24], max_new_tokens=16))
    np.testing.assert_array_equal(*found)
    assert text == TEXT[24:40]
    with open_package(path) as opened:
        assert opened.manifest.tokenizer is not None
        assert opened.manifest.config["module"] == "lm"


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    corpus = build_corpus([TEXT], vocab_size=256)
    weights = []
    for name, stops in (("whole", (6,)), ("parts", (3, 6))):
        folder = tmp_path / name
        plan = LanguagePlan(steps=6, batch_size=2, window=16, checkpoint_every=3)
        if len(stops) == 1:
            train_language_model(folder, corpus, CONFIG, OPTIONS, plan, family="tilelli")
        else:
            import threading

            stop = threading.Event()
            train_language_model(
                folder, corpus, CONFIG, OPTIONS, plan,
                on_step=lambda report, stop=stop: stop.set() if report.step == 3 else None,
                stop=stop, family="tilelli",
            )  # fmt: skip
            assert resume_language_model(folder, corpus).finished
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run, package = tmp_path / "run", tmp_path / "package"
    options = [
        "--steps",
        "2",
        "--layers",
        "1",
        "--d-model",
        "16",
        "--window",
        "8",
        "--banks",
        "2",
        "--pathways",
        "5",
    ]
    assert main(["train", "atome", "--corpus", str(text), "-o", str(run), *options, "-q"]) == 0
    assert main(["export", str(run), "-o", str(package), "-q"]) == 0
    capsys.readouterr()
    assert main(["run", str(package), "--prompt", "the ", "--max-new", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 3
    for wrong in (["train", "atome", "--corpus", str(text), "-o", "x", "--experts", "2"],
                  ["train", "lm", "--corpus", str(text), "-o", "x", "--banks", "2"]):  # fmt: skip
        assert main([*wrong, "-q"]) == 2
        assert "has no meaning when training" in capsys.readouterr().err


def test_padding_carries_no_loss() -> None:
    model = AtomeLmModel({"module": "lm", "d_model": 8, "n_layers": 1, "d_head": 4, "n_banks": 2})
    trainer = AtomeTrainer(model, LmTrainerOptions())
    long, short = list(range(60, 80)), [7, 8, 9]
    both = trainer.losses([long, short])
    alone = [trainer.losses([one]).loss.item() for one in (long, short)]
    assert both.loss.item() == pytest.approx(np.mean(alone), rel=1e-5)
    assert both.items == 19 + 2
    assert both.aux_loss is not None
