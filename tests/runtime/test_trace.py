"""Recording: what a trace says, how it is written, and what a reader refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import InputError
from evermind_runtime.layers import ExpertLayer, expert_layers
from evermind_runtime.profile import encode_profile, parse_profile, profile_of, read_profile
from evermind_runtime.trace import Trace, TraceStep, TraceWriter, read_trace
from msgspec.structs import replace

from tests.packages import put_file

LAYERS = (
    ExpertLayer(layer=0, experts=4, top_k=2, bytes=64),
    ExpertLayer(layer=3, experts=9, top_k=1, bytes=128),
)
DIGEST = "0" * 64
HEAD = (
    '{"schema":"evermind.trace/1","package":"' + DIGEST + '","layers":'
    '[{"layer":0,"experts":4,"top_k":2,"bytes":64}]}\n'
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.jsonl", DIGEST, LAYERS)
    writer.write(0, [[1, 2], [3, 0]])
    writer.write(3, [[8]])
    writer.close()
    writer.write(3, [[7]])
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace == Trace(LAYERS, (TraceStep(0, ((1, 2), (3, 0))), TraceStep(3, ((8,),))), DIGEST)
    assert trace.tokens == 2


def test_a_model_records_what_its_routers_chose(lm_package: Path, tmp_path: Path) -> None:
    path, tokens = tmp_path / "t.jsonl", np.arange(40) % 96
    with em.load(lm_package) as model:
        model.forward({"tokens": tokens})
        model.trace(path)
        prefill = model.forward({"tokens": tokens})
        decode = model.forward({"tokens": tokens[:5]}, steps="decode")
        model.trace(None)
        model.forward({"tokens": tokens})
        digest, layers = model.digest, expert_layers(model.manifest)
    trace = read_trace(path)
    assert (trace.package, trace.layers) == (digest, layers)
    ids = [[tuple(row) for row in prefill[f"ids.{layer}"].tolist()] for layer in range(3)]
    assert [step.layer for step in trace.steps] == [0, 1, 2] * 6
    assert [list(step.tokens) for step in trace.steps[:3]] == ids
    for at in range(5):
        for layer in range(3):
            row = tuple(decode[f"ids.{layer}"][at].tolist())
            assert trace.steps[3 + 3 * at + layer].tokens == (row,)


def test_a_second_trace_ends_the_first_and_closing_ends_the_last(
    lm_package: Path, tmp_path: Path
) -> None:
    with em.load(lm_package, budget="50%") as model:
        for name in ("a", "b"):
            model.trace(tmp_path / name)
            list(model.generate([1, 2, 3], max_new_tokens=4))
        with pytest.raises(OSError, match="missing"):
            model.trace(tmp_path / "missing" / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_trace(tmp_path / "b").tokens == 3 + 3


def test_recording_from_several_threads_keeps_lines_whole(lm_package: Path, tmp_path: Path) -> None:
    with em.load(lm_package, budget="50%") as model:
        model.trace(tmp_path / "t")
        threads = [
            threading.Thread(
                target=lambda seed=seed: list(  # type: ignore[misc]
                    model.generate([seed], max_new_tokens=30, temperature=1.0, seed=seed)
                )
            )
            for seed in range(1, 5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert read_trace(tmp_path / "t").tokens == 4 * 30


def test_a_killed_run_leaves_a_readable_trace(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from evermind_runtime.trace import TraceWriter\n"
        "from evermind_runtime.layers import ExpertLayer\n"
        "layers = [ExpertLayer(layer=0, experts=99, top_k=2, bytes=1)]\n"
        f"writer = TraceWriter(sys.argv[1], '{DIGEST}', layers)\n"
        "for at in range(5000):\n"
        "    writer.write(0, [[at % 99, (at + 1) % 99]])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "t.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    trace = read_trace(path)
    # All but the last block of 16 KiB.
    assert 4000 < len(trace.steps) < 5000
    assert trace.steps[-1].tokens[0][0] == (len(trace.steps) - 1) % 99


def test_an_unfinished_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(HEAD + '{"layer":0,"tokens":[[1,2]]}\n{"layer":0,"tok')
    assert len(read_trace(path).steps) == 1
    path.write_text(HEAD + '{"layer":0,"tokens":[[1,2]]}')
    assert len(read_trace(path).steps) == 1


def test_lines_by_token_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"tok":1,"layers":[[0,5],[2,1]]}\n{"tok":2,"layers":[[0,1],[3,1]]}\n')
    trace = read_trace(path)
    assert [layer.experts for layer in trace.layers] == [6, 6]
    assert [(step.layer, step.tokens) for step in trace.steps] == [
        (0, ((0, 5),)),
        (1, ((2, 1),)),
        (0, ((0, 1),)),
        (1, ((3, 1),)),
    ]
    assert not trace.recorded_layers
    known = tuple(ExpertLayer(layer=at, experts=64, top_k=2, bytes=1000) for at in range(2))
    assert trace.of(known, "t").layers == known
    with pytest.raises(InputError, match="expected experts below 5, found 5"):
        trace.of([replace(layer, experts=5) for layer in known], "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no line"),
        ("hello\n", "line 1"),
        ("[1]\n", "line 1"),
        ('{"tok":1}\n', "line 1"),
        (HEAD.replace("trace/1", "trace/2"), "expected 'evermind.trace/1'"),
        (HEAD.replace('"top_k":2', '"top_k":0'), "line 1"),
        (
            HEAD.replace("}]", '},{"layer":0,"experts":1,"top_k":1,"bytes":1}]'),
            "stands there twice",
        ),
        (HEAD + '{"layer":1,"tokens":[[0,1]]}\n', "no layer 1"),
        (HEAD + '{"layer":0,"tokens":[]}\n', "a token or more"),
        (HEAD + '{"layer":0,"tokens":[[0,0]]}\n', "expected at most 2 different experts"),
        (HEAD + '{"layer":0,"tokens":[[0,1,2]]}\n', "expected at most 2 different experts"),
        (HEAD + '{"layer":0,"tokens":[[0,4]]}\n', "expected experts below 4, found 4"),
        (HEAD + '{"layer":0,"tokens":[[0,-1]]}\n', "line 2"),
        (HEAD + '{"layer":0,"tokens":[[0,1]],"x":1}\n', "unknown field"),
        (HEAD + "\n\n" + "[" * 100_000 + "\n", "line 4"),
        ('{"tok":1,"layers":[[0,1]]}\n{"tok":2,"layers":[[0,1],[1,2]]}\n', "no layer 1"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "none")


def profile_bytes() -> bytes:
    steps = (TraceStep(0, ((1, 2), (2, 0))), TraceStep(3, ((8,),)))
    return encode_profile(profile_of(Trace(LAYERS, steps)))


def test_a_profile_counts_and_survives_its_file(tmp_path: Path) -> None:
    assert json.loads(profile_bytes()) == {
        "schema": "evermind.profile/1",
        "layers": [
            {"layer": 0, "uses": [1, 1, 2, 0]},
            {"layer": 3, "uses": [0, 0, 0, 0, 0, 0, 0, 0, 1]},
        ],
    }
    (tmp_path / "p.json").write_bytes(profile_bytes())
    profile = read_profile(tmp_path / "p.json", LAYERS)
    assert encode_profile(profile) == profile_bytes()
    assert profile.hottest() == [(3, 8), (0, 2), (0, 0), (0, 1)]
    with pytest.raises(InputError, match="cannot be read"):
        read_profile(tmp_path / "q.json", LAYERS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("profile/1", "profile/9", "expected 'evermind.profile/1'"),
        ("[1,1,2,0]", "[1,1,2]", "layer 0 of 4 experts.*layer 0 of 3 experts"),
        ('"layer":3', '"layer":0', "layer 3 of 9 experts"),
        ("[1,1,2,0]", "[1,1,-2,0]", "uses"),
        ("[1,1,2,0]", "[1,1,2.5,0]", "uses"),
        ('"layers"', '"tokens":1,"layers"', "unknown field"),
        ('"layer":0', '"layer":1,"layer":0', "stands twice"),
        ("}", "", "profile.json"),
    ],
)
def test_what_is_no_profile_of_the_model_is_refused(old: str, new: str, message: str) -> None:
    data = profile_bytes().replace(old.encode(), new.encode())
    with pytest.raises(InputError, match=message):
        parse_profile(data, LAYERS, "profile.json")


def test_the_package_may_bring_its_profile(lm_package: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the package has none"):
        em.load(lm_package, policy="pinned")
    with em.load(lm_package) as model:
        model.trace(tmp_path / "t")
        expected = [p.token for p in model.generate([1, 2], max_new_tokens=20)]
    package = tmp_path / "p"
    shutil.copytree(lm_package, package)
    put_file(package, "profile.json", encode_profile(profile_of(read_trace(tmp_path / "t"))))
    with em.load(package, budget="50%", policy="pinned") as model:
        assert [p.token for p in model.generate([1, 2], max_new_tokens=20)] == expected
        assert model.stats().evictions > 0
