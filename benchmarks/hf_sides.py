"""Four ways to run one Hugging Face checkpoint: this runtime, llama.cpp, transformers, accelerate.

Each side is an object with `prefill(tokens)` and `decode(token)`, which give the logits of the
last token, from an empty context on after `begin()`. `timed` is what a benchmark asks a side for.
"""

from __future__ import annotations

import ctypes
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .common import cached_bytes, resident_bytes

Array = np.ndarray[Any, Any]

INSTALL = {
    "llama_cpp": "pip install llama-cpp-python==0.3.36 (a C++ compiler, and some minutes)",
    "gguf": "pip install gguf==0.19.0",
    "accelerate": "pip install accelerate==1.15.0",
}


def missing(*modules: str) -> str | None:
    """How to install what a side needs and is not there; `None` if all of it is."""
    absent = [INSTALL[one] for one in modules if find_spec(one) is None]
    return "; ".join(absent) or None


class Side(ABC):
    """What a benchmark asks of any side."""

    #: Seconds it took to open the model, libraries loaded.
    opening = 0.0

    @abstractmethod
    def begin(self) -> None:
        """Forget the context."""

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> Array:
        """Logits `(V,)` after `tokens`."""

    @abstractmethod
    def decode(self, token: int) -> Array:
        """Logits `(V,)` after one more."""

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """Where its weights are read from."""

    def logits(self, prompt: list[int], forced: list[int], file: str) -> dict[str, float]:
        """Write the logits after the prompt and after each forced token, `(1 + n, V)`.

        Returns the seconds of opening, and of that and the first prompt.
        """
        self.begin()
        started = time.perf_counter()
        rows = [self.prefill(prompt).copy()]
        first = self.opening + time.perf_counter() - started
        rows += [self.decode(token).copy() for token in forced]
        np.save(file, np.stack(rows).astype(np.float32))
        return {"opening": self.opening, "first": first}

    def timed(self, prompt: list[int], forced: list[int]) -> dict[str, float]:
        """Seconds of a prompt and of decoding `forced` after it, and bytes held afterwards.

        `cached` is what the page cache has of its files.
        """
        self.begin()
        started = time.perf_counter()
        self.prefill(prompt)
        prefilled = time.perf_counter()
        for token in forced:
            self.decode(token)
        return {
            "prefill": prefilled - started,
            "prefill tokens": len(prompt),
            "decode": time.perf_counter() - prefilled,
            "decode tokens": len(forced),
            "resident": resident_bytes(),
            "cached": cached_bytes(self.files()),
        }


class Ours(Side):
    """This runtime; options as `load` takes them.

    With a `limit` in bytes the budget is what of it the resident weights leave.
    """

    def __init__(
        self, package: str, threads: int, limit: int | None = None, **options: Any
    ) -> None:
        import evermind_runtime as em
        from evermind_manifests.package import open_package

        warnings.simplefilter("ignore", em.PagingWarning)
        with open_package(package) as opened:
            manifest = opened.manifest
        if limit is not None:
            resident = manifest.files[manifest.resident].bytes if manifest.resident else 0
            options["budget"] = limit - resident
        started = time.perf_counter()
        self.model = em.load(package, threads=threads, **options)
        self.opening = time.perf_counter() - started
        self._state = self.model.new_state()
        self._files = [Path(package) / one for one in {s.file for s in manifest.shards}]

    def begin(self) -> None:
        self._state = self.model.new_state()

    def prefill(self, tokens: Sequence[int]) -> Array:
        # As `generate` does it: the head of the model sees the last token alone.
        self.model.forward({"tokens": np.array(tokens[:-1])}, state=self._state, outputs=[])
        return self.decode(tokens[-1])

    def decode(self, token: int) -> Array:
        return self.model.decode({"tokens": np.array([token])}, self._state)["logits"][0]

    def files(self) -> Sequence[Path]:
        return self._files


class LlamaCpp(Side):
    """llama.cpp through its C interface, weights mapped from the file."""

    def __init__(self, file: str, threads: int, context: int = 1024) -> None:
        import llama_cpp

        self._llama = llama_cpp
        self._file = file
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        parameters = llama_cpp.llama_model_default_params()
        parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, 512, 512
        options.n_threads = options.n_threads_batch = threads
        assert self._model, f"llama.cpp cannot load {file}"
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        assert self._context, "llama.cpp cannot make a context"
        self.opening = time.perf_counter() - started
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._width = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def begin(self) -> None:
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_clear(memory, True)

    def prefill(self, tokens: Sequence[int]) -> Array:
        buffer = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._llama.llama_batch_get_one(buffer, len(tokens))
        assert self._llama.llama_decode(self._context, batch) == 0, "llama.cpp failed"
        last = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(last, shape=(self._width,))

    def decode(self, token: int) -> Array:
        return self.prefill([token])

    def files(self) -> Sequence[Path]:
        return [Path(self._file)]


class Transformers(Side):
    """transformers with its default implementations."""

    def __init__(self, folder: str, threads: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        started = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        self._model = model.eval()
        self.opening = time.perf_counter() - started
        self._cache: Any = None
        self._files = sorted(Path(folder).glob("*.safetensors"))

    def begin(self) -> None:
        self._cache = None

    def prefill(self, tokens: Sequence[int]) -> Array:
        import torch

        with torch.inference_mode():
            found = self._model(
                input_ids=torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = found.past_key_values
        logits: Array = found.logits[0, -1].float().numpy()
        return logits

    def decode(self, token: int) -> Array:
        return self.prefill([token])

    def files(self) -> Sequence[Path]:
        return self._files


class Accelerate(Transformers):
    """transformers with every module's weights on disk, read for each of its calls."""

    def __init__(self, folder: str, threads: int, dtype: str, offload: str) -> None:
        from accelerate import disk_offload

        super().__init__(folder, threads, dtype)
        disk_offload(self._model, offload_dir=offload)
        self._files = sorted(Path(offload).glob("*.dat"))


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: Any) -> None:
    pass
