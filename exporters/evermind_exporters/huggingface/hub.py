"""Fetch a checkpoint from a model hub, by `huggingface_hub`: only the files an import reads.

The library's own settings hold: HF_ENDPOINT, HF_TOKEN (or a login), HF_HOME with the cache,
HF_HUB_OFFLINE. Pickled weights and code are never fetched.
"""

from __future__ import annotations

import glob
import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from evermind_manifests.errors import (
    CheckpointError,
    EvermindPackError,
    LocationError,
    MissingExtraError,
    NetworkError,
    OfflineError,
)

from .chat_templates import TEMPLATES_FOLDER
from .checkpoint import read_index
from .documents import DOCUMENTS, VOCABULARIES
from .misfits import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from .text import TOKENIZER_NAME

Progress: TypeAlias = Callable[[int, int], None]

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_model_id(text: str) -> bool:
    """Whether this may be a hub's name of a model, `organisation/model`, and no path."""
    return _ID.fullmatch(text) is not None


def fetch_checkpoint(
    model: str, revision: str | None = None, *, progress: Progress | None = None
) -> Path:
    """The folder of the hub's cache that has the model's checkpoint, fetched where it is not.

    `revision` is a branch, tag or commit (default: `main`). `progress(done, total)` counts
    bytes. Raises `LocationError` for a model or revision that is not there or may not be read,
    `NetworkError` where the hub cannot be reached, `OfflineError` where it may not be and the
    cache has not all, `CheckpointError` for what is no checkpoint.
    """
    fetch = _fetcher(model, progress)
    with _as_our_errors(model, revision), _silent():
        folder = fetch(revision, [*DOCUMENTS, f"{TEMPLATES_FOLDER}/*.jinja", INDEX_NAME])
        _check_config(folder, model)
        listed = read_index(folder)
        names = [WEIGHTS_NAME] if listed is None else sorted(set(listed.values()))
        if not (folder / TOKENIZER_NAME).is_file():
            names += VOCABULARIES
        # By the commit found above: the branch may move meanwhile.
        return fetch(folder.name, [glob.escape(name) for name in names])


def fetch_config(model: str, revision: str | None = None) -> Path:
    """The model's `config.json` in the hub's cache, fetched where it is not, and nothing else.

    Raises what `fetch_checkpoint` does.
    """
    fetch = _fetcher(model, None)
    with _as_our_errors(model, revision), _silent():
        folder = fetch(revision, [CONFIG_NAME])
    _check_config(folder, model)
    return folder / CONFIG_NAME


def _fetcher(model: str, progress: Progress | None) -> Callable[[str | None, list[str]], Path]:
    """What fetches a revision's files of some patterns, and gives the folder that has them."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf", "Fetching a model by its name") from error

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                library_name="evermind-pack",
                tqdm_class=_bar_type(progress),
            )
        )

    return fetch


def _check_config(folder: Path, model: str) -> None:
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{model}: expected a model with a {CONFIG_NAME}, found none",
            hint="It may be of another library, or hold no model.",
        )


@contextmanager
def _as_our_errors(model: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except EvermindPackError:
        raise
    except errors.HFValidationError as error:
        raise LocationError(
            f"{model}: neither a folder here nor a name that a model on a hub can have",
            hint="Check the name.",
        ) from error
    except errors.GatedRepoError as error:
        raise LocationError(
            f"{model}: gated: {hub} gives it to those only who accepted its terms",
            hint=f"Accept them at {hub}/{model}, then run `hf auth login` or set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LocationError(
            f"{model}: {hub} has no branch, tag or commit {revision!r} of it"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        # What the hub answered, where the cache was looked at because of that.
        cause = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(model, hub, cause) from error
        if constants.HF_HUB_OFFLINE:
            raise OfflineError(
                f"{model}: not all of it is in the cache ({constants.HF_HUB_CACHE}), and "
                "HF_HUB_OFFLINE forbids the network"
            ) from error
        raise NetworkError(
            f"{model}: no folder here; {hub} cannot be reached, and the cache has not all of it",
            hint="Check the network, or the path if a folder was meant.",
        ) from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise NetworkError(f"{model}: {hub}: {type(error).__name__}: {error}") from error


def _refused(model: str, hub: str, error: Any) -> EvermindPackError:
    status = getattr(error.response, "status_code", None)
    if status in (401, 404):  # hubs do not tell whether there is such a model
        return LocationError(
            f"{model}: neither a folder here nor a model that {hub} shows",
            hint="Check the name. A private model needs `hf auth login` or HF_TOKEN.",
        )
    return NetworkError(f"{model}: {hub} answers with status {status}")


@contextmanager
def _silent() -> Iterator[None]:
    """No remarks of the library's; what matters is raised."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _bar_type(progress: Progress | None) -> Any:
    """A tqdm bar that draws nothing, and tells of the one among a download's that counts bytes."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": _Nowhere(), "disable": False})
            if kwargs.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if progress and bars:
                done = max(int(one.n) for one in bars)
                progress(done, max(done, *(int(one.total or 0) for one in bars)))

    return Bar


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)
