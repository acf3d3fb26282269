"""What `plan` says of a config.json against the package that an import makes of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evermind_exporters.huggingface import config_sizes, model_sizes
from evermind_exporters.huggingface.import_ import ImportOptions, import_checkpoint
from evermind_exporters.huggingface.skeleton import looked_up
from evermind_manifests.errors import ConfigError
from evermind_manifests.package import open_package
from evermind_runtime.sizes import ModelSizes, manifest_sizes

from tests.cli.command_line import call

from .conftest import Imported
from .tiny import ARCHITECTURES, COMMON

pytest.importorskip("transformers")
OLMOE = {**COMMON, **ARCHITECTURES["olmoe"], "model_type": "olmoe", "dtype": "float32"}


def sizes_of(package: Path) -> ModelSizes:
    with open_package(package) as opened:
        return manifest_sizes(opened.manifest)


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**OLMOE, **fields}))
    return path


def test_sizes_are_those_of_the_package(
    imported: Callable[[str], Imported], model_type: str, tmp_path: Path
) -> None:
    made = imported(model_type)
    alone = tmp_path / "config.json"
    alone.write_bytes((made.checkpoint / "config.json").read_bytes())
    found = model_sizes(alone)
    assert found.sizes == sizes_of(made.package)
    assert found.notes == ()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_options_of_an_import_are_followed(
    imported: Callable[[str], Imported], tmp_path: Path
) -> None:
    checkpoint = imported("mixtral").checkpoint  # bfloat16
    package = tmp_path / "package"
    import_checkpoint(checkpoint, package, ImportOptions(dtype="f16", trunk="f32"))
    found = model_sizes(checkpoint / "config.json", dtype="f16", trunk="f32").sizes
    assert found == sizes_of(package)
    kept = model_sizes(checkpoint / "config.json").sizes
    assert kept.layers == found.layers
    assert kept.resident_bytes < 0.6 * found.resident_bytes


def test_a_hybrid_is_planned_by_the_command(
    imported: Callable[[str], Imported], tmp_path: Path, capsys: Any
) -> None:
    """Its fields alone do not tell what a recurrent layer keeps."""
    made = imported("jamba")
    config = json.loads((made.checkpoint / "config.json").read_text())
    with pytest.raises(ConfigError, match="recurrent state"):
        config_sizes(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = call(capsys, "plan", tmp_path, "--context", 64, "--memory", "4GiB", "--json")
    planned = json.loads(out)
    _, out, _ = call(capsys, "plan", made.package, "--context", 64, "--memory", "4GiB", "--json")
    assert (code, planned["source"]) == (0, "config")
    assert planned["sizes"] == json.loads(out)["sizes"]


def test_without_transformers_the_fields_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    traced = model_sizes(path).sizes
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = model_sizes(path)
    assert "transformers is not installed" in found.notes[-1]
    assert found.sizes.total_parameters == traced.total_parameters
    assert found.sizes.active_parameters == traced.active_parameters
    assert found.sizes.state_bytes == traced.state_bytes
    assert found.sizes.graph_runs == traced.graph_runs
    assert found.sizes.resident_bytes == pytest.approx(traced.resident_bytes, abs=8192)
    assert found.sizes.all_expert_bytes == pytest.approx(traced.all_expert_bytes, rel=0.01)


def test_what_transformers_does_not_know_is_counted_and_said(tmp_path: Path) -> None:
    found = model_sizes(written(tmp_path, model_type="new_moe"))
    assert "`import` refuses it" in found.notes[-1]
    assert "new_moe" in found.notes[-1]
    assert found.sizes.expert_parameters == model_sizes(written(tmp_path)).sizes.expert_parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama", "num_experts": None}, "expected a Mixture of Experts"),
        ({"hidden_size": "wide"}, "hidden_size: expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: expected a whole number"),
        ({"max_position_embeddings": 8}, "at most 8 tokens, found a context of 64"),
    ],
)
def test_what_makes_no_model_is_one_line(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        model_sizes(written(tmp_path, **fields), context=64)
    assert message in caught.value.message


def test_a_name_on_a_hub_needs_its_config_alone(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(model: str, revision: str | None) -> Path:
        asked.append((model, revision))
        return written(tmp_path)

    monkeypatch.setattr("evermind_exporters.huggingface.hub.fetch_config", fetch)
    monkeypatch.chdir(tmp_path)
    given = ("--memory", "4GiB", "--context", 64)
    code, out, _ = call(capsys, "plan", "org/model", "--revision", "v2", *given, "--json")
    result = json.loads(out)
    assert (code, asked) == (0, [("org/model", "v2")])
    assert (result["model"], result["family"]) == ("org/model", "olmoe")
    assert result["machine"]["disk_where"] == f"a temporary file in {tmp_path}"
    code, _, err = call(capsys, "plan", tmp_path, "--revision", "v2")
    assert (code, "has no revisions" in err) == (2, True)


def test_a_model_that_does_not_name_its_embedding_reads_all_of_it() -> None:
    class Silent:
        def get_input_embeddings(self) -> None:
            raise NotImplementedError

    class Nothing:
        def get_input_embeddings(self) -> None:
            return None

    assert looked_up(Silent()) == looked_up(Nothing()) == 0


def test_a_disk_too_full_for_the_package_is_told(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    sizes = model_sizes(tmp_path / "config.json").sizes
    needed = sizes.resident_bytes + sizes.all_expert_bytes
    for free, full in ((needed - 1, True), (10 * needed, False)):
        given = shutil._ntuple_diskusage(0, 0, free)
        monkeypatch.setattr(
            "evermind_pack.cli.plan.shutil.disk_usage", lambda _, given=given: given
        )
        _, out, _ = call(capsys, "plan", tmp_path, "--memory", "4GiB")
        (row,) = (line for line in out.splitlines() if line.startswith("package "))
        assert ("too full to import it" in row) == full
