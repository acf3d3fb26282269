"""Models by their name on a hub, fetched from an imitation of one on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evermind_exporters.huggingface.hub import is_model_id

from tests.cli.command_line import call

from .conftest import Imported
from .hub_server import TOKEN, Hub, serving

pytest.importorskip("huggingface_hub")

# Fetches each `model[@revision]`: a line of JSON with the folder, or with the error. Of one that
# ends in ` config` only that file.
FETCH = """
import json, sys
from evermind_exporters.huggingface.hub import fetch_checkpoint, fetch_config
from evermind_manifests.errors import EvermindPackError

for wanted in sys.argv[1:]:
    model, _, revision = wanted.partition("@")
    told = []
    try:
        if revision.endswith(" config"):
            path = fetch_config(model, revision.removesuffix(" config") or None)
            print(json.dumps({"folder": str(path.parent), "told": []}))
            continue
        folder = fetch_checkpoint(
            model, revision or None, progress=lambda *now: told.append(now)
        )
        print(json.dumps({"folder": str(folder), "told": told[-1:]}))
    except EvermindPackError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error),
                          "code": error.exit_code}))
"""
WHOLE = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}
INDEX = "model.safetensors.index.json"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    listed = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    climbing = {"weight_map": {"a": "../../secret.safetensors"}}
    sharded = {
        "config.json": "{}",
        INDEX: json.dumps(listed),
        "model-1.safetensors": "one",
        "model-2.safetensors": "two",
        "consolidated.safetensors": "the same again",
        "pytorch_model.bin": "a pickle",
        "modeling_custom.py": "import os",
        "onnx/model.onnx": "a graph",
        "generation_config.json": '{"eos_token_id": 2}',
        "tokenizer.json": '{"v": 1}',
        "chat_template.jinja": "{{ x }}",
    }
    with serving() as server:
        server.add(
            "org/sharded",
            main=write(folder / "sharded", sharded),
            v2=write(folder / "v2", sharded | {"tokenizer.json": '{"v": 2}'}),
        )
        server.add("org/whole", main=write(folder / "whole", WHOLE))
        server.add("org/closed", main=write(folder / "closed", WHOLE))
        server.gated.add("org/closed")
        server.add("org/broken", main=write(folder / "broken", WHOLE))
        server.broken.add("org/broken")
        server.add("org/empty", main=write(folder / "empty", {"README.md": "nothing"}))
        server.add(
            "org/climbing",
            main=write(folder / "climbing", {"config.json": "{}", INDEX: json.dumps(climbing)}),
        )
        yield server


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **more}


def fetch(environment: dict[str, str], *wanted: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *wanted],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_only_what_an_import_reads_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    hub.tokens.clear()
    expected = {
        "config.json",
        INDEX,
        "model-1.safetensors",
        "model-2.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    online = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    first, again, other = fetch(online, "org/sharded", "org/sharded", "org/sharded@v2")
    assert names(first["folder"]) == names(other["folder"]) == expected
    assert first["told"] == [[6, 6]]
    assert again["folder"] == first["folder"]
    assert hub.fetched == sorted([*expected, "tokenizer.json"])  # what v2 shares is there
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert Path(first["folder"]).is_relative_to(tmp_path / "home")
    assert json.loads((Path(other["folder"]) / "tokenizer.json").read_text()) == {"v": 2}

    hub.requests.clear()
    offline = online | {"HF_HUB_OFFLINE": "1"}
    cached, revision, absent = fetch(offline, "org/sharded", "org/sharded@v2", "org/whole")
    assert (cached["folder"], revision["folder"]) == (first["folder"], other["folder"])
    assert (absent["error"], absent["code"]) == ("OfflineError", 1)
    assert "HF_HUB_OFFLINE forbids the network" in absent["message"]
    assert hub.requests == []


def test_a_config_comes_alone(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    found, none, absent = fetch(
        environment(hub, tmp_path), "org/sharded@v2 config", "org/empty@ config", "org/no@ config"
    )
    assert names(found["folder"]) == {"config.json"}
    assert hub.fetched == ["config.json"]
    assert "expected a model with a config.json" in none["message"]
    assert absent["error"] == "LocationError"


def test_what_cannot_be_had_is_said_in_a_line(hub: Hub, tmp_path: Path) -> None:
    wanted = {
        "org/unknown": ("LocationError", 2, "neither a folder here nor a model that"),
        "org/whole@gone": ("LocationError", 2, "no branch, tag or commit 'gone'"),
        "org/closed": ("LocationError", 2, "gated"),
        "org/broken": ("NetworkError", 1, "answers with status 500"),
        "org/bar--baz": ("LocationError", 2, "nor a name that a model on a hub can have"),
        "org/bar..x": ("LocationError", 2, "nor a name"),
        "org/empty": ("CheckpointError", 1, "with a config.json, found none"),
        "org/climbing": ("CheckpointError", 1, "weight_map"),
    }
    found = fetch(environment(hub, tmp_path), *wanted)
    for one, (model, (kind, code, message)) in zip(found, wanted.items(), strict=True):
        assert (one.get("error"), one.get("code")) == (kind, code), model
        assert message in one["message"]
        assert one["message"].count("\n") <= 1  # the hint
    (allowed,) = fetch(environment(hub, tmp_path, HF_TOKEN=TOKEN), "org/closed")
    assert names(allowed["folder"]) == WHOLE.keys()


def test_without_a_network_it_is_one_line(hub: Hub, tmp_path: Path) -> None:
    nowhere = environment(hub, tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    (found,) = fetch(nowhere, "org/whole")
    assert (found["error"], found["code"]) == ("NetworkError", 1)
    assert "http://127.0.0.1:9" in found["message"]
    assert found["message"].count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("allenai/OLMoE-1B-7B-0125", True),
        ("org/a.b_c", True),
        ("olmoe", False),
        ("./org/name", False),
        ("../name", False),
        ("/org/name", False),
        ("org/name/", False),
        ("org/a/b", False),
        ("org/..", False),
        ("https://x/y", False),
        ("org/na me", False),
    ],
)
def test_names_are_told_from_paths(text: str, expected: bool) -> None:
    assert is_model_id(text) is expected


def test_a_folder_of_that_name_wins(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "whole", {"config.json": "{}"})
    hub.requests.clear()
    code, _, err = call(capsys, "import", "org/whole", "-o", "p", "-q")
    assert (code, "found neither" in err) == (1, True)
    code, _, err = call(capsys, "import", "org/whole", "-o", "p", "--revision", "v2")
    assert (code, "is a folder, which has no revisions" in err) == (2, True)
    code, _, err = call(capsys, "import", "org/whole/", "-o", "p", "-q")
    assert (code, "found neither" in err) == (1, True)
    assert hub.requests == []


def add_unused(folder: Path) -> None:
    """Tensors that the model has no use for, in a file of their own."""
    from safetensors.numpy import save_file

    unused = {"mtp.weight": np.ones((3, 4), np.float16), "inv_freq": np.arange(4.0)}
    save_file(unused, folder / "more.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(unused, "more.safetensors")
    (folder / INDEX).write_text(json.dumps(index))


def test_a_model_is_imported_by_its_name_and_comes_back(
    imported: Callable[[str], Imported], tmp_path: Path, capsys: Any
) -> None:
    """Of bfloat16 stored as float32, with tensors that no layer uses."""
    source = tmp_path / "source"
    shutil.copytree(imported("mixtral").checkpoint, source)
    add_unused(source)
    with serving() as hub:
        hub.add("org/tiny-mixtral", main=source)
        command = [sys.executable, "-m", "evermind_pack", "import", "org/tiny-mixtral"]
        command += ["-o", str(tmp_path / "p"), "--dtype", "f32", "--json"]
        done = subprocess.run(
            command,
            env=environment(hub, tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    none, note = json.loads(done.stdout)["notes"]
    assert "no tokenizer" in none
    assert note.startswith("2 tensors (56 bytes)")
    assert note.endswith("alone: inv_freq, mtp.weight")
    code, text, _ = call(capsys, *command[3:])
    assert "exists already" in json.loads(text)["error"]["message"]  # before anything is fetched
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["name"] == "tiny-mixtral"
    assert manifest["card"]["base_model"] == "org/tiny-mixtral"
    assert {one["dtype"] for one in manifest["kinds"]["swiglu"]["tensors"]} == {"f32"}
    code, _, _ = call(capsys, "convert", tmp_path / "p", "-o", tmp_path / "back", "--to", "hf")
    assert code == 0
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
