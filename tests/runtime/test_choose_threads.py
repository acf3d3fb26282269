"""How many threads a package computes with where nobody says."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import evermind_runtime as em
import pytest
from evermind_manifests.manifest import Kind, Manifest
from evermind_manifests.package import Package
from evermind_runtime import onnx_runtime
from evermind_runtime.choose_threads import SMALL_MATRIX, suited_threads
from evermind_runtime.openers import open_location
from msgspec import structs

CORES = 4


@pytest.fixture
def manifest(lm_package: Path) -> Manifest:
    with open_location(lm_package) as package:
        assert isinstance(package, Package)
        return package.manifest


def _with_matrices(manifest: Manifest, *shape: int, beside: int) -> Manifest:
    """The same model with experts of one matrix each, and other weights of `beside` experts."""

    def reshaped(kind: Kind) -> Kind:
        return structs.replace(kind, tensors=(structs.replace(kind.tensors[0], shape=shape),))

    kinds = {name: reshaped(kind) for name, kind in manifest.kinds.items()}
    size = 1
    for dim in shape:
        size *= dim
    experts = sum(layer.top_k for layer in manifest.layers) * size
    parameters = structs.replace(manifest.parameters, active=experts * (1 + beside))
    return structs.replace(manifest, kinds=kinds, parameters=parameters)


@pytest.mark.parametrize("shape", [(256, 512), (3, 256, 512), (131072, 1)])
def test_small_matrices_are_not_shared_out(manifest: Manifest, shape: tuple[int, ...]) -> None:
    assert suited_threads(_with_matrices(manifest, *shape, beside=1), CORES) == 1


def test_a_large_matrix_takes_all_cores(manifest: Manifest) -> None:
    over = _with_matrices(manifest, SMALL_MATRIX + 1, 1, beside=1)
    assert suited_threads(over, CORES) == CORES


def test_so_does_what_is_large_beside_small_experts(manifest: Manifest) -> None:
    assert suited_threads(_with_matrices(manifest, 128, 256, beside=3), CORES) == CORES


def test_but_not_where_all_of_it_is_small(manifest: Manifest) -> None:
    assert suited_threads(_with_matrices(manifest, 8, 8, beside=300), CORES) == 1
    assert suited_threads(structs.replace(manifest, kinds={}, layers=()), CORES) == 1


@pytest.mark.parametrize("active", [0, 1])
def test_large_matrices_take_all_cores_whatever_is_declared(
    manifest: Manifest, active: int
) -> None:
    large = _with_matrices(manifest, SMALL_MATRIX + 1, 1, beside=1)
    parameters = structs.replace(manifest.parameters, active=active)
    assert suited_threads(structs.replace(large, parameters=parameters), CORES) == CORES


def test_a_model_that_declares_nothing_takes_all_cores(manifest: Manifest) -> None:
    parameters = structs.replace(manifest.parameters, active=0)
    dense = structs.replace(manifest, kinds={}, layers=(), parameters=parameters)
    assert suited_threads(dense, CORES) == CORES


def test_a_model_without_experts_takes_all_cores(manifest: Manifest) -> None:
    parameters = structs.replace(manifest.parameters, active=SMALL_MATRIX + 1)
    dense = structs.replace(manifest, kinds={}, layers=(), parameters=parameters)
    assert suited_threads(dense, CORES) == CORES


def test_a_larger_second_package_says_what_it_would_have(
    lm_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermind_runtime.model.suited_threads", lambda manifest, cores: cores)
    with em.load(lm_package, threads=None) as model:
        threads = model.threads
    monkeypatch.setattr(onnx_runtime, "usable_cores", lambda: threads + 3)
    with pytest.warns(em.ThreadsWarning, match=f"threads={threads + 3} to the first load"):
        em.load(lm_package).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        em.load(lm_package, threads=threads).close()


@pytest.mark.parametrize(("asked", "found"), [("None", 1), ("2", 2)])
def test_the_first_load_of_a_process_decides(lm_package: Path, asked: str, found: int) -> None:
    program = (
        "import sys, evermind_runtime as em\n"
        f"with em.load(sys.argv[1], threads={asked}) as model: print(model.threads)\n"
        "with em.load(sys.argv[1]) as model: print(model.threads)"
    )
    command = [sys.executable, "-c", program, str(lm_package)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(found)] * 2
