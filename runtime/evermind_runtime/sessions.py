"""ONNX Runtime sessions for a package's graphs: checked first, made once, shared by all steps."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from evermind_manifests.errors import DeviceError, GraphError, UnsupportedError
from evermind_manifests.graph import check_graph, inspect_graph
from evermind_manifests.interface import check_graph_interface
from evermind_manifests.package import Package

from . import onnx_runtime
from .devices import Device
from .resident import Resident

if TYPE_CHECKING:
    import onnxruntime as ort


class Sessions:
    """One session per graph file, created when first asked for. Thread-safe."""

    def __init__(self, package: Package, resident: Resident, device: Device) -> None:
        self._package = package
        self._resident = resident
        self.device = device
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> ort.InferenceSession:
        """The session of the graph at `path` in the package.

        Raises `DigestError` if the file is not what the manifest says, `GraphError` if the
        graph reaches for anything outside the package or does not fit the plan,
        `UnsupportedError` if ONNX Runtime cannot run it, `DeviceError` if it cannot on a device
        that is not the CPU.
        """
        with self._lock:
            if path not in self._sessions:
                self._sessions[path] = self._create(path)
            return self._sessions[path]

    def close(self) -> None:
        """Drop all sessions."""
        with self._lock:
            self._sessions.clear()

    def _create(self, path: str) -> ort.InferenceSession:
        model = self._package.read_file(path)
        resident = self._resident
        external = {resident.location: resident.buffer.nbytes} if resident.path else {}
        info = inspect_graph(model, path)
        check_graph(info, path, external=external)
        check_graph_interface(self._package.manifest, path, info)
        ort = onnx_runtime.require()
        options = onnx_runtime.session_options()
        # Weights are used where they lie: no second copy in memory, none repacked.
        options.add_session_config_entry("session.disable_prepacking", "1")
        if resident.path:
            options.add_session_config_entry(
                "session.use_external_initializer_file_buffers_directly", "1"
            )
            options.add_external_initializers_from_files_in_memory(
                [resident.location], [resident.buffer], [resident.buffer.nbytes]
            )
        device = self.device
        try:
            # ONNX Runtime would print what failed, and take the CPU instead.
            session = ort.InferenceSession(
                model, options, providers=device.providers, enable_fallback=False
            )
        except Exception as error:
            fault = f"{path}: ONNX Runtime {ort.__version__} cannot run this graph"
            if device.name == "cpu":
                raise UnsupportedError(f"{fault}: {error}") from error
            raise DeviceError(
                f"{fault} on device {device.name!r}: {error}", hint=_ELSEWHERE
            ) from error
        _check_provider(session, path, device)
        return session


def graph_failed(path: str, session: ort.InferenceSession, error: Exception | str) -> GraphError:
    """What to raise where ONNX Runtime failed while it ran the graph at `path`."""
    provider = session.get_providers()[0].removesuffix("ExecutionProvider").lower()
    return GraphError(
        f"{path}: the graph failed on device {provider!r}: {error}",
        hint="`evermind-pack validate PACKAGE --deep --run` tells whether the package is sound."
        if provider == "cpu"
        else "If the device is out of memory: give a smaller budget, prompt or context, or run on "
        "the CPU (without --device). After other failures it can be used by a new process only.",
    )


_ELSEWHERE = (
    "Are the driver and the CUDA and cuDNN libraries there (pip install 'evermind-pack[cuda]')? "
    "Without --device it runs on the CPU."
)


def _check_provider(session: ort.InferenceSession, path: str, device: Device) -> None:
    """A provider that cannot be set up is left out with no more than a warning."""
    wanted = device.providers[0]
    name = wanted if isinstance(wanted, str) else wanted[0]
    found = session.get_providers()
    if found[:1] != [name]:
        raise DeviceError(
            f"{path}: expected {name} on device {device.name!r}, found {', '.join(found)}",
            hint=_ELSEWHERE,
        )
