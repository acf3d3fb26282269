"""Ways to decode one `evermind-lm`, each in a process of its own, with weights read or mapped.

Every side has `decode(tokens) -> logits` (count, V), from an empty state, and `files`, where its
weights are read from. `timed` is what a benchmark asks a side for. `own_limit` bounds, in bytes,
the memory that is the process's own: the kernel refuses more.
"""

from __future__ import annotations

import math
import resource
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import evermind_runtime as em
import numpy as np
from evermind_exporters.checkpoints import canonical_shapes
from evermind_exporters.checkpoints.peer_file import PeerFile
from evermind_runtime.decode import BoundDecode

from tests.interop.peer import Peer, floats

from .common import cached_bytes, drop_cached, files_below, own_bytes, reserved_bytes
from .mapped_pager import map_experts
from .sides import CompiledModel, DenseGraph, NumpyModel

Array: TypeAlias = np.ndarray


class Side(ABC):
    """What a benchmark asks of any side."""

    files: Sequence[Path]

    def __init__(self, own_limit: int | None) -> None:
        if own_limit is not None:
            # It counts what is reserved; what libraries have reserved and not used, comes on top.
            size = own_limit + reserved_bytes() - own_bytes()
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    @abstractmethod
    def decode(self, tokens: list[int]) -> Array:
        """Logits after each token, one after the other."""

    def own(self) -> int:
        """Bytes of memory that are no file's."""
        return own_bytes()

    def timed(self, tokens: list[int], file: str, *, cold: bool = False) -> dict[str, float]:
        """Seconds of decoding `tokens`, from a cold disk or as it is; logits are written to `file`.

        Bytes afterwards: what is the process's own, and what the page cache has of its files.
        """
        if cold:
            assert drop_cached(self.files), "the disk cannot be made cold here"
        started = time.perf_counter()
        logits = self.decode(tokens)
        seconds = time.perf_counter() - started
        np.save(file, logits)
        return {"seconds": seconds, "own": self.own(), "cached": cached_bytes(self.files)}


class Ours(Side):
    """This runtime; options as `load` takes them. `mapped` leaves paging to the system."""

    def __init__(
        self,
        package: str,
        threads: int,
        own_limit: int | None = None,
        *,
        mapped: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(own_limit)
        warnings.simplefilter("ignore", em.PagingWarning)
        self._model = em.load(package, threads=threads, **options)
        if mapped:
            map_experts(self._model, package)
        # Sessions are made when a state is first bound: as others' are, before anything is timed.
        BoundDecode(self._model._engine, self._model.new_state())
        self.files = files_below(Path(package))

    def decode(self, tokens: list[int]) -> Array:
        state = self._model.new_state()
        rows = []
        for token in tokens:
            values = self._model.decode({"tokens": np.array([token])}, state)
            # The next token's are written to the same place.
            rows.append(values["logits"].copy())
        return np.concatenate(rows)


class Numpy(Side):
    """numpy over the tensors of a peer's file."""

    def __init__(
        self, file: str, threads: int, own_limit: int | None = None, *, mapped: bool
    ) -> None:
        super().__init__(own_limit)
        config, tensors = _tensors(file, mapped=mapped)
        self._model = NumpyModel(config, tensors)
        self.files = [Path(file)]

    def decode(self, tokens: list[int]) -> Array:
        return self._model.decode(tokens)


class Compiled(Side):
    """C over the tensors of a peer's file; one thread."""

    def __init__(
        self, file: str, library: str, threads: int, own_limit: int | None = None, *, mapped: bool
    ) -> None:
        super().__init__(own_limit)
        config, tensors = _tensors(file, mapped=mapped)
        self._model = CompiledModel(config, tensors, Path(library))
        self.files = [Path(file)]

    def decode(self, tokens: list[int]) -> Array:
        return self._model.decode(tokens)


class Dense(Side):
    """One graph of all experts, whose weights lie inside `model` or in a file that is mapped."""

    def __init__(
        self,
        model: str,
        config: dict[str, Any],
        threads: int,
        own_limit: int | None = None,
        *,
        weights: str | None = None,
    ) -> None:
        super().__init__(own_limit)
        # Repacked weights would be copies.
        self._model = DenseGraph(config, Path(model), threads, packed=weights is None)
        self.files = [Path(model), *([Path(weights)] if weights else [])]

    def decode(self, tokens: list[int]) -> Array:
        return self._model.decode(tokens)


class Npm(Side):
    """The npm peer in node, which computes its whole context again for every token."""

    def __init__(
        self, file: str, config: dict[str, Any], threads: int, own_limit: int | None = None
    ) -> None:
        super().__init__(own_limit)
        self.files = [Path(file)]
        self._peer = Peer()
        self._peer("hold", config=config, file=file)
        self._vocab = config["vocabSize"]

    def decode(self, tokens: list[int]) -> Array:
        logits: Array = floats(self._peer("decode", tokens=tokens)["logits"])
        return logits.reshape(len(tokens), self._vocab)

    def own(self) -> int:
        self._peer("collect")
        return own_bytes(self._peer.process)


def _tensors(file: str, *, mapped: bool) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config and the tensors of a float32 file, as views of all its bytes."""
    opened = PeerFile(file)
    data = np.memmap(file, np.uint8, mode="r") if mapped else np.fromfile(file, np.uint8)
    tensors = {}
    for name, shape in canonical_shapes(opened.family, opened.config).items():
        begin = opened.offset(name)
        tensors[name] = data[begin : begin + 4 * math.prod(shape)].view("<f4").reshape(shape)
    return opened.config, tensors
