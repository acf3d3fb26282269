"""The real peer, live: it loads what we write and computes the same, and we what it writes.

Bytes must be equal, floats within 1e-5 of an output's largest magnitude (our float32 graphs
against the peer's float64 sums), routes and generated tokens the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
import tokenizers
from evermind_exporters import ExportOptions, convert_package, export_package, read_source
from evermind_exporters.checkpoints import (
    Checkpoint,
    apply_checkpoint_diff,
    apply_delta,
    create_delta,
    diff_checkpoints,
    new_peer_manifest,
    read_checkpoint,
    read_delta,
    read_evermind,
    read_evl0,
    write_delta,
    write_evermind,
    write_evl0,
    write_peer_safetensors,
)
from evermind_exporters.peer_tokenizer import peer_tokenizer
from evermind_manifests.manifest import Card
from evermind_manifests.package import open_package
from evermind_runtime.budget import total_expert_bytes, working_set_bytes
from evermind_runtime.openers import open_location

from tests.packages import GOLDEN, golden_case

from .models import WRITERS, Case, cases
from .peer import Peer, decoded, floats, missing

CASES = cases(216)
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning"),
]


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with Peer() as running:
        yield running


def assert_same_outputs(path: Path, case: Case, expected: dict[str, Any]) -> None:
    """Our runtime on the peer's file at `path`, half its experts paged, against the peer."""
    inputs = case.inputs()
    with em.load(path, budget=_budget(path)) as model:
        if case.family == "evermind-lm":
            prompt, steps = inputs["tokens"], inputs["steps"]
            assert_close(model.forward({"tokens": prompt})["logits"], expected["logits"])
            pieces = model.generate(prompt, max_new_tokens=steps)
            assert [piece.token for piece in pieces] == expected["greedy"]
            pieces = model.generate(
                prompt,
                max_new_tokens=steps,
                temperature=inputs["temperature"],
                seed=inputs["seed"],
            )
            assert [piece.token for piece in pieces] == expected["sampled"]
            return
        arrays = {name: np.array(rows, np.float32) for name, rows in inputs.items()}
        found = model.forward(arrays)
        if case.family == "shared-expert-moe":
            assert_close(found["y"], expected["y"])
            assert found["ids.0"].tolist() == expected["experts"]
        else:
            for name in ("hidden", "delta", "reward"):
                assert_close(found[name], expected[name])


def assert_close(found: np.ndarray, expected: str) -> None:
    values = floats(expected).reshape(found.shape)
    scale = float(np.abs(values).max()) or 1.0
    assert np.abs(found - values).max() <= TOLERANCE * scale


def _budget(path: Path) -> int:
    """Half of all experts, or the least that works."""
    with open_location(path) as package:
        least = working_set_bytes(package.manifest)
        return max(least, total_expert_bytes(package.manifest) // 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_peer_reads_what_we_write(peer: Peer, case: Case, tmp_path: Path) -> None:
    checkpoint = case.checkpoint()
    rounding = "truncate" if case.number % 4 == 1 else "nearest"
    stored = WRITERS[case.family](checkpoint, case.half, rounding)
    inputs = case.inputs()
    answer = peer(
        "load",
        family=case.family,
        config=case.config,
        checkpoint=stored,
        fp16=case.half,
        inputs=inputs,
    )
    assert decoded(answer["checkpoint"]) == stored
    data = stored
    if case.family != "limbic":
        manifest = new_peer_manifest(
            case.family,
            checkpoint.config,
            name="Zoë 漢字",
            version="1.2.3",
            card=Card(description="d", tags=("a", 'b"c')),
            created="2026-06-27T00:00:00Z",
        ).update({"experts": [{"offset": 1}], "note": None})
        data = write_evermind(checkpoint, manifest, half=case.half, rounding=rounding)
        opened = peer("open", family=case.family, blob=data, inputs=inputs)
        assert decoded(opened["blob"]) == data
        assert opened["outputs"] == answer["outputs"]
    path = tmp_path / "model"
    path.write_bytes(data)
    assert_same_outputs(path, case, answer["outputs"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_we_read_what_the_peer_writes(peer: Peer, case: Case, tmp_path: Path) -> None:
    meta = {"name": "peer's", "version": "0.1", "card": {"description": "d", "author": "A"}}
    made = peer(
        "make",
        family=case.family,
        config={**case.config, "seed": case.number - 7},
        seed=case.number,
        fp16=case.half,
        inputs=case.inputs(),
        meta=meta,
    )
    stored = decoded(made["checkpoint"])
    checkpoint = read_checkpoint(stored, "peer")
    assert checkpoint.half == case.half
    assert WRITERS[case.family](checkpoint, case.half) == stored
    data = stored
    if "blob" in made:
        data = decoded(made["blob"])
        file = read_evermind(data, "peer")
        assert write_evermind(file.checkpoint, file.manifest, half=case.half) == data
    if "safetensors" in made:
        assert write_peer_safetensors(checkpoint, case.half) == decoded(made["safetensors"])
    path = tmp_path / "model"
    path.write_bytes(data)
    assert_same_outputs(path, case, made["outputs"])
    if case.number % 5 == 0:
        assert _through_a_package(path, case, tmp_path) == data


def _through_a_package(path: Path, case: Case, folder: Path) -> bytes:
    dtype = "f16" if case.half else "f32"
    export_package(read_source(path), folder / "package", ExportOptions(dtype=dtype))
    target = "lmbc" if case.family == "limbic" else "evermind"
    with open_package(folder / "package") as package:
        return convert_package(package, target, half=case.half)


def test_a_media_package_of_the_peers(peer: Peer, tmp_path: Path) -> None:
    codec = {"height": 4, "width": 4, "channels": 1, "patch": 2, "levels": 1, "codebookSize": 4}
    case = Case(
        1,
        "evermind-lm",
        {
            "vocabSize": 20,
            "dModel": 6,
            "numLayers": 1,
            "convKernel": 2,
            "hiddenDim": 6,
            "numExperts": 2,
            "topK": 1,
        },
    )
    for modality in ("image", "video"):
        made = peer(
            "make",
            family=case.family,
            config=case.config,
            seed=5,
            fp16=True,
            inputs=case.inputs(),
            meta={"name": "m", "version": "1", "card": {"description": ""}, "modality": modality},
            media={**codec, "textVocabSize": 8},
        )
        data = decoded(made["blob"])
        path = tmp_path / modality
        path.write_bytes(data)
        file = read_evermind(data, "media")
        assert file.codec
        assert_same_outputs(path, case, made["outputs"])
        again = _through_a_package(path, case, tmp_path / f"{modality}-package")
        assert again == data
        opened = peer("open", family=case.family, blob=again, inputs=case.inputs())
        assert decoded(opened["blob"]) == data


@pytest.mark.parametrize("number", range(0, 216, 12))
def test_deltas_and_safetensors_of_language_models(peer: Peer, number: int) -> None:
    case = next(case for case in CASES[number:] if case.family == "evermind-lm")
    base = case.checkpoint()
    rng = case.rng()
    changed = dict(base.tensors)
    for name in rng.choice(list(changed), 2):
        tensor = changed[name].copy()
        tensor.flat[rng.integers(tensor.size)] += np.float32(rng.normal())
        changed[name] = tensor
    current = Checkpoint(base.family, base.config, changed)
    files = write_evl0(base), write_evl0(current)
    eps = 0.5 if number % 24 else 0.0
    answer = peer("delta", config=case.config, base=files[0], current=files[1], eps=eps)
    delta = create_delta(base, current, eps)
    assert write_delta(delta) == decoded(answer["delta"])
    patched = apply_delta(base, read_delta(decoded(answer["delta"]), "peer"))
    assert write_evl0(patched) == decoded(answer["patched"])
    assert diff_checkpoints(*files) == decoded(answer["diff"])
    assert apply_checkpoint_diff(files[0], decoded(answer["diff"])) == decoded(answer["applied"])

    data = write_peer_safetensors(current, case.half)
    answer = peer("import", data=data, topK=case.config["topK"], fp16=case.half)
    assert decoded(answer["checkpoint"]) == write_evl0(current, case.half)
    read_evl0(decoded(answer["checkpoint"]), "peer")


def test_a_thousand_texts_have_the_peers_ids(peer: Peer) -> None:
    folder = GOLDEN / "tokenizer"
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()[1:]
    pairs = [(one, other) for one, other in (line.split(" ") for line in lines)]
    ours = tokenizers.Tokenizer.from_buffer(peer_tokenizer(vocab, pairs))
    words = [*golden_case("tokenizer")["corpus"], *_PIECES]
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(words, rng.integers(1, 12))) for _ in range(1000)]
    texts += ["".join(chr(c) for c in rng.integers(1, 0x3000, 20)) for _ in range(200)]
    lists = rng.integers(4, len(vocab) + 9, (300, 12)).tolist()
    answer = peer("tokenize", vocab=vocab, merges=lines, texts=texts, lists=lists)
    for text, ids in zip(texts, answer["ids"], strict=True):
        assert ours.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert ours.decode(ids, skip_special_tokens=False) == text
    for ids, text in zip(lists, answer["texts"], strict=True):
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_where_the_tokenizers_differ(peer: Peer) -> None:
    """The differences that docs/peer.md lists."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "ï": 4, "»": 5, "¿": 6, "é": 7, "漢": 8}
    merges = [("a", "b"), ("ab", "c")]
    ours = tokenizers.Tokenizer.from_buffer(peer_tokenizer(vocab, merges))
    answer = peer(
        "tokenize",
        vocab=vocab,
        merges=[" ".join(pair) for pair in merges],
        texts=["abc"],
        lists=[[4, 5, 6, 0], [8, 0]],
    )
    # A merge whose result has no id.
    assert answer["ids"] == [[0, 1, 2]]
    assert ours.encode("abc").ids == [3, 2]
    # A byte-order mark at the start, and a token that is no string of bytes.
    assert answer["texts"] == ["a", bytes([ord("漢") % 256]).decode(errors="replace") + "a"]
    assert ours.decode([4, 5, 6, 0]) == "\ufeffa"
    assert ours.decode([8, 0]) == "漢a"


_PIECES = [
    *("'s", "'t", "'re", "it's", "don't", "WE'VE", "1", "22", "333", "4444", "x_1", "==", ";"),
    *("};", "//", "#", "#!", "...", "😀", "é", "e\u0301", "漢字", "かな", "ﬁ", "٣", "½", "Ⅷ"),
    *(" ", "  ", "\n", "\r\n", "\n\n", "\t", " \n", "\u00a0", "\u2003", "\ufeff", "\u3000"),
    *("\x85", "\x1c", "\x1f", "\x0b", "\x0c", "\u200b", "\u2028", "\x00", "The quick brown fox"),
]
