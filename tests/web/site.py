"""What the pages of the tests load: the browser runtime, ONNX Runtime, and a package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evermind_runtime
import numpy as np
import numpy.typing as npt

from .browser import Page, find_chromium

WEB = Path(evermind_runtime.__file__).parent / "web"
ORT = WEB / "node_modules" / "onnxruntime-web" / "dist"
DEMO = Path(__file__).parents[2] / "examples" / "browser"

# Every page of a test gets these names.
_PRELUDE = """
const { EvermindPack } = await import('/evermind/index.js');
const events = [];
const open = (options = {}) => EvermindPack.open('/package/', {
  ortUrl: '/ort/', threads: 1, onProgress: (event) => events.push(event), ...options,
});
const numbers = (array) => ({ shape: array.shape, data: Array.from(array.data, Number) });
const all = (arrays) => Object.fromEntries(
  Object.entries(arrays).map(([name, array]) => [name, numbers(array)]));
"""


def missing() -> str | None:
    """Why pages cannot be run here, if so."""
    if find_chromium() is None:
        return "no Chromium: apt-get install chromium"
    if not ORT.is_dir():
        return f"onnxruntime-web is not installed: run `npm ci` in {WEB}"
    return None


def make_site(folder: Path, package: Path) -> Path:
    """A folder to serve: /evermind/, /ort/, /package/, and an empty page."""
    folder.mkdir(parents=True)
    for name, target in {"evermind": WEB, "ort": ORT, "package": package}.items():
        (folder / name).symlink_to(target)
    (folder / "index.html").write_text("<!doctype html><title>test</title>")
    return folder


def run(page: Page, code: str, **arguments: Any) -> Any:
    """`code` in the page, with `EvermindPack`, `open(options)`, `events` and `all(arrays)`."""
    return page.run(_PRELUDE + code, **arguments)


def to_page(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Named arrays as what `forward` takes in JavaScript."""
    return {
        name: {"data": array.ravel().tolist(), "shape": list(array.shape)}
        for name, array in arrays.items()
    }


def from_page(found: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """What `all(arrays)` gave."""
    return {
        name: np.array(one["data"], dtype=np.float64).reshape(one["shape"])
        for name, one in found.items()
    }
