"""A device with memory of its own, imitated by host memory that nobody else has.

Like CUDA's, its graphs get copies of what the host binds, made when it is bound, and a state's
buffers stay with it until the host asks for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evermind_runtime as em
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from evermind_exporters.onnx_graph import GraphBuilder
from evermind_manifests.errors import InputError
from evermind_manifests.manifest import DType, GraphStep, ValueSpec
from evermind_runtime import model as model_module
from evermind_runtime.devices import CpuDevice, host_value
from evermind_runtime.state import State
from msgspec.structs import replace

from .hand_made import manifest_of, write_package
from .test_buffers import LIMIT, WANT, D, X, plan_of_sums, sums, write


class Place:
    def __init__(self, device: Apart, array: npt.NDArray[Any], dtype: DType) -> None:
        self._device = device
        self._array = array
        self._memory = array.copy()
        self._value = host_value(self._memory, dtype)
        self.ahead = False
        device.own.append(self._value)

    def bind(self, binding: Any, given: str, taken: str) -> None:
        binding.bind_ortvalue_input(given, self._value)
        binding.bind_ortvalue_output(taken, self._value)

    def pull(self) -> None:
        if self.ahead:
            self._array[...] = self._memory
            self.ahead = False
            self._device.pulled += 1


class Apart(CpuDevice):
    def __init__(self) -> None:
        super().__init__()
        self.name = "apart"
        self.copies = True
        self.own: list[ort.OrtValue] = []
        self.pulled = 0

    def place(self, array: npt.NDArray[Any], dtype: DType) -> Place:
        return Place(self, array, dtype)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Apart:
    """The device that models are opened on, whatever they ask for."""
    device = Apart()
    bind = ort.IOBinding.bind_ortvalue_input

    def bind_a_copy(self: Any, name: str, value: ort.OrtValue) -> None:
        own = any(value is one for one in device.own)
        bind(self, name, value if own else ort.OrtValue.ortvalue_from_numpy(value.numpy().copy()))

    monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", bind_a_copy)
    monkeypatch.setattr(model_module, "open_device", lambda _: device)
    return device


def test_decode_binds_anew_what_changes(lm_package: Path, apart: Apart) -> None:
    tokens = {"tokens": np.arange(12)}
    with em.load(lm_package, plan="half", device="apart") as model:
        decoded = model.forward(tokens, steps="decode")["logits"]
        prefilled = model.forward(tokens)["logits"]
    np.testing.assert_allclose(decoded, prefilled, rtol=1e-4, atol=1e-5)


def test_buffers_stay_on_the_device(tmp_path: Path, apart: Apart) -> None:
    with em.load(write(tmp_path / "p"), device="apart") as model:
        state, at = model.new_state(), 0
        for count, steps in ((70, "prefill"), (30, "decode"), (40, "prefill"), (20, "decode")):
            part = {"x": X[at : at + count]}
            found = model.forward(part, state=state, steps=steps)["y"]  # type: ignore[arg-type]
            np.testing.assert_allclose(found, WANT[at : at + count], atol=1e-4)
            at += count
        # 128 rows and then 256 are too few, and what moves is fetched; nothing else is.
        assert apart.pulled <= 3
        twin, saved = state.copy(), state.save()
        np.testing.assert_array_equal(saved["h"], X[None, :at])
        mark = state.mark()
        model.forward({"x": X[at : at + 9]}, state=state, steps="decode")
        state.rewind(mark)
        for one in (state, twin):
            found = model.forward({"x": X[at:LIMIT]}, state=one)["y"]
            np.testing.assert_allclose(found, WANT[at:LIMIT], atol=1e-4)
        twin.restore(saved)
        found = model.forward({"x": X[at : at + 5]}, state=twin, steps="decode")["y"]
        np.testing.assert_allclose(found, WANT[at : at + 5], atol=1e-4)


def test_generation_goes_on_without_fetching_the_state(tmp_path: Path, apart: Apart) -> None:
    """Each token is the one whose row fits the sum of all rows so far best."""
    table = np.random.default_rng(4).normal(size=(11, D)).astype(np.float32)
    b = GraphBuilder("lm")
    rows = b.op("Gather", b.const(table, np.float32), b.input("tokens", "i64", ["T"]))
    logits = b.op("MatMul", sums(b, rows), b.const(table.T, np.float32))
    b.output(logits, "logits", "f32", ["T", 11])
    step = GraphStep(
        graph="graphs/lm.onnx",
        inputs={"tokens": "tokens", "context": "h", "past": "so_far"},
        outputs={"logits": "logits", "new": "h"},
    )
    plan = replace(
        plan_of_sums(),
        inputs={"tokens": ValueSpec(dtype="i64", shape=("T",), limit=11)},
        outputs={"logits": ValueSpec(dtype="f32", shape=("T", 11))},
        prefill=(step,),
        decode=(step,),
    )
    write_package(tmp_path / "p", manifest_of(plan), {"graphs/lm.onnx": b.build()})
    seen: list[int] = []
    with em.load(tmp_path / "p", device="apart") as model:
        state = model.new_state()
        assert state.fresh
        for prompt in ([1, 2], [3], [7, 5, 0]):
            found = [one.token for one in model.generate(prompt, max_new_tokens=6, state=state)]
            seen += prompt
            for token in found:
                assert token == (table[seen].astype(np.float64).sum(axis=0) @ table.T).argmax()
                seen.append(token)
            seen.pop()  # the last one is not part of the state yet
            assert not state.fresh
        assert apart.pulled == 0
        np.testing.assert_array_equal(state.save()["h"], table[None, seen])


def test_a_state_of_another_device_is_refused(tmp_path: Path, apart: Apart) -> None:
    with em.load(write(tmp_path / "p"), device="apart") as model:
        state = State(model.manifest.plan)
        with pytest.raises(InputError, match="state"):
            model.forward({"x": X[:3]}, state=state)
