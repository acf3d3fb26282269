"""Keep transformers' and PyTorch's own reports off the terminal."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

_LOGGERS = ("torch.onnx", "torch.export", "torch", "onnxscript", "onnx_ir")


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings, progress bars nor lines on stdout and stderr; what is raised is as ever.

    torch.export prints the graph that it could not finish before it raises.
    """
    from transformers.utils import logging as transformers_logging

    reports: Any = transformers_logging
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [one.level for one in loggers]
    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    try:
        reports.set_verbosity_error()
        reports.disable_progress_bar()
        for one in loggers:
            one.setLevel(logging.ERROR)
        nowhere = io.StringIO()
        with redirect_stdout(nowhere), redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reports.set_verbosity(verbosity)
        if bars:
            reports.enable_progress_bar()
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
