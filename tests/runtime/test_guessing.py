"""Guesses: what they read ahead is used, yields to steps, changes no bit, and can be given up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import evermind_runtime as em
import msgspec
import pytest
from evermind_manifests.errors import InputError
from evermind_manifests.graph import inspect_graph
from evermind_manifests.interface import interface_problems
from evermind_manifests.manifest import StateSpec
from evermind_manifests.package import open_package
from evermind_manifests.structure import check_structure
from evermind_runtime.guessing import MARGIN, GuessRecord
from hypothesis import given
from hypothesis import strategies as st

from tests.packages import export, random_source
from tests.runtime.paging import poll, same_bits, settle

pytestmark = pytest.mark.filterwarnings("ignore::evermind_runtime.PagingWarning")

# Experts of 1.5 MiB: read in two pieces on a guess.
CONFIG = {
    "vocabSize": 40,
    "dModel": 256,
    "numLayers": 3,
    "hiddenDim": 1536,
    "numExperts": 6,
    "topK": 2,
}
TOKENS = {"tokens": list(range(30))}


def load(package: Path, **options: Any) -> em.Model:
    """A model for which every read takes long, so that there is something to gain."""
    model = em.load(package, plan="paged", **options)
    model._pager.reader._nowait = False
    return model


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(random_source("evermind-lm", CONFIG), tmp_path_factory.mktemp("guess") / "lm")


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_guesses_change_no_bit(package: Path, io: Any) -> None:
    with load(package, budget="50%", guess="off") as model:
        expected = model.forward(TOKENS, steps="decode")
        assert model.stats().prefetches == 0
    with load(package, budget="50%", io=io) as model:
        for _ in range(2):
            assert same_bits(model.forward(TOKENS, steps="decode"), expected)
        settle(model)
        stats = model.stats()
        assert stats.peak_resident_expert_bytes <= model.budget
        assert stats.prefetches_used <= stats.prefetches
        assert stats.prefetch_wasted_bytes <= stats.bytes_read
        assert model._pager.slots.pinned == 0


def test_what_was_guessed_right_is_there_when_it_is_needed(package: Path) -> None:
    with load(package, budget="50%") as model:
        pager = model._pager
        pager.routed(0, [[0, 1]])
        with pager.acquire(0, [0, 1]):
            pager.guess(1, [4, 2])
            settle(model)
        # It stays, whatever else is read, until its layer has run.
        for others in ([2, 3], [4, 5], [0, 1]):
            with pager.acquire(2, others):
                pass
        assert {(1, 4), (1, 2)} <= pager.slots.resident.keys()
        pager.routed(1, [[2, 3]])
        with pager.acquire(1, [2, 3]):
            pass
        stats = model.stats()
        assert (stats.prefetches, stats.prefetches_used) == (2, 1)
        assert stats.prefetch_wasted_bytes == model.manifest.kinds["relu-ffn"].bytes
        assert stats.expert_hits == 1


def test_a_guess_yields_to_a_step(package: Path) -> None:
    """In the middle of a guess a step needs other experts: the guess is read no further."""
    begun, go_on = threading.Event(), threading.Event()
    pieces: list[int] = []
    with load(package, budget="50%") as model:
        pager = model._pager
        store = model._package.store
        honest = store.read_into

        def read(path: str, offset: int, buffer: memoryview) -> None:
            if "l001" in path:
                pieces.append(len(buffer))
                begun.set()
                poll(go_on.is_set)
            else:
                go_on.set()
                poll(lambda: (1, 3) not in pager.slots.loading)
            honest(path, offset, buffer)

        store.read_into = read  # type: ignore[method-assign]
        pager.guess(1, [3])
        poll(begun.is_set)
        with pager.acquire(0, [0]):
            pass
        settle(model)
        assert pieces == [1 << 20]
        assert (1, 3) not in pager.slots.resident
        assert model.stats().prefetch_wasted_bytes == 1 << 20


def test_a_guess_never_takes_the_room_of_a_step(package: Path) -> None:
    with load(package, budget="12%") as model:
        pager = model._pager
        assert pager.slots.most == 2
        with pager.acquire(0, [0, 1]):
            pager.guess(1, [0, 1])
            assert not pager.slots.loading
        pager.guess(1, [0, 1])
        with pager.acquire(0, [2, 3]):
            assert pager.slots.resident.keys() >= {(0, 2), (0, 3)}
        assert pager.slots.pinned == len(pager.slots.loading)


def test_what_is_no_expert_is_passed_over(package: Path) -> None:
    with load(package, budget="50%") as model:
        model._pager.guess(1, [-1, 6, 2**40, 3, 3])
        settle(model)
        assert model._pager.slots.resident.keys() == {(1, 3)}


def test_nothing_is_guessed_while_the_page_cache_has_what_is_missing(package: Path) -> None:
    with em.load(package, plan="paged", budget="50%") as model:
        for _ in range(3):
            model.forward(TOKENS, steps="decode")
        settle(model)
        assert not model._pager.guesses(1)
        guessed = model.stats().prefetches
        model.forward(TOKENS, steps="decode")
        assert model.stats().prefetches == guessed
        # One read that the disk has to serve, and they are of use again.
        model._pager.reader._nowait = False
        with model._pager.acquire(1, [0, 1]), model._pager.acquire(1, [2, 3]):
            pass
        with model._pager.acquire(1, [4, 5]):
            pass
        assert model._pager.guesses(1)


@given(outcomes=st.lists(st.booleans(), max_size=20 * MARGIN))
def test_a_record_is_given_up_once_wrong_guesses_are_ahead(outcomes: list[bool]) -> None:
    record = GuessRecord()
    # As the furthest that any run of outcomes went down, which is what a bound from above leaves.
    steps = [1 if used else -1 for used in outcomes]
    sums = [sum(steps[begin:end]) for end in range(len(steps) + 1) for begin in range(end)]
    from_start = [sum(steps[:end]) for end in range(len(steps) + 1)]
    for used in outcomes:
        record.resolved(used=used)
    assert record.on == (min(from_start) > -MARGIN and min(sums, default=0) > -2 * MARGIN)


def test_guesses_that_are_mostly_wrong_turn_themselves_off(package: Path) -> None:
    """Room for six experts, all of which are pinned at times: what was guessed must go."""
    with load(package, budget="34%") as model:
        pager = model._pager
        assert pager.guesses(1)
        rounds = 0
        while pager.guesses(1):
            for right, guess in (([0, 1], [2, 3]), ([2, 3], [4, 5]), ([4, 5], [0, 1])):
                pager.guess(1, guess)
                settle(model)
                pager.routed(1, [right])
                with pager.acquire(1, right), pager.acquire(0, [0, 1]), pager.acquire(2, [0, 1]):
                    pass
            rounds += 1
            assert rounds < 10 * MARGIN
        assert pager.guesses(2)
        assert model.stats().prefetches_used == 0


def test_guesses_are_off_where_they_are_of_no_use(package: Path, lm_package: Path) -> None:
    for model in (load(package), load(package, guess="off", budget="50%"), load(lm_package)):
        assert not any(model._pager.guesses(layer) for layer in range(3))
    with pytest.raises(InputError, match="guess: expected"):
        load(package, guess="often")  # type: ignore[arg-type]


def test_a_guess_is_as_good_as_the_router_where_experts_add_nothing(tmp_path: Path) -> None:
    """Experts that answer 0 leave nothing to guess about: every guess is then right."""
    source = random_source("evermind-lm", CONFIG)
    for name, tensor in source.tensors.items():
        if ".experts." in name and name.rpartition(".")[2] in ("w2", "b2"):
            tensor[...] = 0
    with load(export(source, tmp_path / "lm"), budget="50%") as model:
        guesses: list[list[int]] = []
        honest = model._pager.guess
        model._pager.guess = lambda layer, ids: (guesses.append(ids), honest(layer, ids))[1]  # type: ignore[method-assign]
        outputs = model.forward(TOKENS, steps="decode")
        rows = [outputs[f"ids.{layer}"][t].tolist() for t in range(30) for layer in (1, 2)]
        assert guesses == rows


# What the manifest may say.


def problems(package: Path, **changes: Any) -> list[str]:
    with open_package(package) as opened:
        manifest = opened.manifest
        first, *rest = manifest.plan.guesses
        guess = msgspec.structs.replace(first, **changes)
        plan = msgspec.structs.replace(manifest.plan, guesses=(guess, *rest))
        manifest = msgspec.structs.replace(manifest, plan=plan)
        path = guess.graph
        graphs = (
            {path: inspect_graph(opened.read_file(path), path)} if path in manifest.files else {}
        )
    found = check_structure(manifest) + interface_problems(manifest, graphs, None)
    return [str(one) for one in found if one.severity == "error"]


def test_the_package_has_a_sound_guess_for_every_layer_but_the_first(package: Path) -> None:
    with open_package(package) as opened:
        assert [guess.layer for guess in opened.manifest.plan.guesses] == [1, 2]
    assert problems(package) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 7}, "no experts of layer 7"),
        (
            {"layer": 0, "inputs": {"base": "base.1", "conv": "conv.1"}},
            "'base.1' is not there before the experts of layer 0 run",
        ),
        ({"inputs": {"base": "nothing", "conv": "conv.1"}}, "'nothing' is not there"),
        ({"inputs": {"base": "base.0"}}, "nothing is bound to the graph's input 'conv'"),
        ({"inputs": {"base": "base.0", "conv": "tokens"}}, "'conv': expected"),
        ({"inputs": {"base": "base.0", "conv": "conv.1", "x": "base.0"}}, "has no input 'x'"),
        ({"ids": "choice"}, "has no output 'choice'"),
        ({"graph": "graphs/none.onnx"}, "'graphs/none.onnx' is not in `files`"),
        ({"weights": {"w": "nothing"}}, "has no input 'w'"),
    ],
)
def test_a_guess_that_does_not_fit_is_named(
    package: Path, changes: dict[str, Any], message: str
) -> None:
    assert any(message in one for one in problems(package, **changes)), problems(package, **changes)


def test_a_guess_may_not_read_what_grows(package: Path) -> None:
    with open_package(package) as opened:
        manifest = opened.manifest
    state = {**manifest.plan.state, "conv.1": StateSpec(dtype="f32", shape=("C", 256), limit=9)}
    plan = msgspec.structs.replace(manifest.plan, state=state)
    found = check_structure(msgspec.structs.replace(manifest, plan=plan))
    assert any("'conv.1' is not there" in str(one) for one in found)
