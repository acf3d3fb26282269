"""What a folder is that is no checkpoint to import, and what to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from evermind_manifests.destination import is_package

CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
# How a file begins that git-lfs has not fetched (its specification, version 1).
_POINTER: Final = b"version https://git-lfs"
_ADAPTER: Final = (
    "It holds an adapter, not a model: merge it into its base model first (peft's "
    "`merge_and_unload`, then `save_pretrained`)."
)
_GGUF: Final = "GGUF files are not read: give the checkpoint that they were made of."


def no_folder(path: Path) -> str | None:
    """What to do with a path where no folder is."""
    if path.suffix == ".gguf":
        return _GGUF
    if not path.is_file():
        return None
    if path.suffix in {".json", ".safetensors"}:
        return f"Give the folder that it lies in: {path.parent}"
    return "A checkpoint is a folder; packages are run as they are: `evermind-pack run`."


def without_config(folder: Path) -> str:
    """What to do with a folder that has no config.json."""
    if is_package(folder):
        return "It is a package already: `evermind-pack run` and `inspect` take it as it is."
    if (folder / "adapter_config.json").is_file():
        return _ADAPTER
    if any(folder.glob("*.gguf")):
        return _GGUF
    if (folder / "model_index.json").is_file():
        return "It is a pipeline of several models, none of which makes text."
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not inner:  # the cache of a hub has a folder for each revision
        inner = sorted(path.parent for path in folder.glob(f"snapshots/*/{CONFIG_NAME}"))
    if inner:
        return f"Was {inner[0]} meant?"
    return "Give a folder as `save_pretrained` writes it, or a model is downloaded to."


def without_weights(folder: Path) -> str:
    """What to do with a folder that has a config.json and neither weights nor their index."""
    for name in (WEIGHTS_NAME, INDEX_NAME):
        if (folder / name).is_symlink():
            return f"{name} is a link to a file that is not there: fetch it again."
    if (folder / "adapter_config.json").is_file():
        return _ADAPTER
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) > 1:
        return f"{others[0]} and others are there: fetch the index that belongs to them."
    if others:
        return f"{others[0]} is there: if it holds the whole model, call it {WEIGHTS_NAME}."
    if any(folder.glob("*.bin")) or any(folder.glob("*.bin.index.json")):
        return (
            "Pickled .bin files are not read, as they may run code: load them where they may, and "
            "write the model with `save_pretrained`, which makes safetensors files."
        )
    if any(folder.glob("*.gguf")):
        return _GGUF
    return "Its weights are missing: fetch them too. Only safetensors files are read."


def damaged(head: bytes) -> str:
    """What to do with a weights file that is none; `head` is how it begins."""
    if head.startswith(_POINTER):
        return "It is a pointer to the file, not the file: run `git lfs pull` in its folder."
    return "Fetch the file again."
