"""Which steps of a program run, and how long what they give is kept."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import pytest
from evermind_manifests.errors import GraphError
from evermind_manifests.manifest import ExpertsStep, GraphStep, Step
from evermind_runtime import program
from evermind_runtime.program import needed_steps, run_graph

from tests.packages import LM_CONFIG, export, random_source


def layer(number: int) -> list[Step]:
    graph = GraphStep(
        graph=f"graphs/{number}.onnx",
        inputs={"x": f"e.{number - 1}" if number else "x", "conv": f"conv.{number}"},
        outputs={
            "n": f"n.{number}",
            "ids": f"ids.{number}",
            "gates": f"gates.{number}",
            "conv": f"conv.{number}",
        },
    )
    experts = ExpertsStep(
        layer=number, x=f"n.{number}", ids=f"ids.{number}", gates=f"gates.{number}", y=f"e.{number}"
    )
    return [graph, experts]


def test_what_is_needed_after_each_step() -> None:
    steps = [*layer(0), *layer(1)]
    state = {"conv.0", "conv.1"}
    found = needed_steps(steps, ["ids.0"], state)
    kept = frozenset({"ids.0", *state})
    # The last layer's experts change nothing that anybody wants.
    assert [step for step, _ in found] == steps[:3]
    assert [later for _, later in found] == [kept | {"n.0", "gates.0", "e.0"}, kept | {"e.0"}, kept]


def test_a_prompts_values_do_not_outlive_their_last_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most: list[int] = []
    original = program._run_experts

    def watched(engine: Any, step: ExpertsStep, board: Any, observer: Any) -> Any:
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        y = original(engine, step, board, observer)
        alive.extend(weakref.ref(one) for one in (board[step.x], y))
        return y

    monkeypatch.setattr(program, "_run_experts", watched)
    package = tmp_path / "p"
    export(random_source("evermind-lm", LM_CONFIG), package)
    with em.load(package, plan="paged") as model:
        given = {"tokens": np.arange(8)}
        model.forward(given, outputs=["logits"])
    # Before the experts of a layer run, nothing is left of those below.
    assert len(most) > 1
    assert most == [0] * len(most)


@pytest.mark.parametrize(
    ("provider", "device", "advice"),
    [("CPU", "cpu", "validate PACKAGE"), ("CUDA", "cuda", "a smaller budget")],
)
def test_a_graph_that_fails_names_itself_its_device_and_what_to_do(
    provider: str, device: str, advice: str
) -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return [f"{provider}ExecutionProvider", "CPUExecutionProvider"]

        def run_with_iobinding(self, _binding: Any) -> None:
            raise RuntimeError("CUDA failure 2: out of memory")

    session: Any = Session()
    message = f"graphs/x.onnx: the graph failed on device '{device}': CUDA failure 2: out of memory"
    with pytest.raises(GraphError) as caught:
        run_graph("graphs/x.onnx", session, session)
    assert caught.value.message == message
    assert advice in str(caught.value.hint)
