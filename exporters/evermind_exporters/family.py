"""What a model family is to the exporter: one object that knows everything about itself.

`export.py`, `source.py` and the command line know no family by name: they ask the object that
`families/` registers. docs/architecture.md, "Adding a family", says how to write one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import numpy.typing as npt
from evermind_manifests.errors import ConfigError
from evermind_manifests.manifest import DType

from .blueprint import Blueprint, Tensors
from .onnx_graph import ExternalTensor

Config: TypeAlias = Mapping[str, Any]
Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


class ModelFamily(ABC):
    """One family: configuration, tensors, graphs, plan and sample inputs.

    `name` is `family` in config.json and in the manifest. `config` is always what `resolve`
    gave. Tensors are named as in the reference implementation's state dict and read one at a
    time, when they are asked for.
    """

    name: str
    # Relative to an output's largest magnitude. Float32 graphs agree with a float64 reference
    # to about 3e-7 (specs/evermind-formats.md, section 17.1); kernels differ between machines.
    parity_tolerance: float = 1e-5
    # Raw configurations by name, for `export FAMILY:PRESET`; those families have `initial`.
    presets: Mapping[str, Config] = MappingProxyType({})
    # How expert weights may be stored (`export --dtype`), the default first.
    storages: tuple[str, ...] = ("f16", "bf16", "f32")

    @abstractmethod
    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        """The checked configuration with defaults filled in; what the manifest records.

        `raw` is config.json without `family`; `found` are the tensors the model comes with
        (empty where nothing is known of them), from which what `raw` leaves out may be told.
        Raises `ConfigError`.
        """

    @abstractmethod
    def recognises(self, found: Shapes) -> bool:
        """Whether a state dict with these tensors, and no word on its family, is of this one."""

    @abstractmethod
    def shapes(self, config: Config) -> dict[str, Shape]:
        """The name and shape of every tensor of the state dict, in its order."""

    @abstractmethod
    def resident_names(self, config: Config) -> list[str]:
        """The model's tensors that are always in memory, as they are, in float32."""

    @abstractmethod
    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """Graphs, kinds, layers and plan; `dtype` is what expert matrices are stored as.

        `resident` says where each resident tensor lies, for `GraphBuilder`.
        """

    @abstractmethod
    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """Inputs of a parity case, by the plan's names; another seed gives other ones."""

    def stored_as(self, config: Config, dtype: str) -> tuple[dict[str, Any], DType]:
        """The configuration to record, and what to `build` with, for one of `storages`."""
        return dict(config), cast(DType, dtype)

    def tokenizer(self, config: Config) -> Literal["bytes"] | None:
        """The vocabulary a model has by its definition; one beside the weights goes first."""
        return None

    def canonical_name(self, name: str) -> str | None:
        """The name used here for a tensor that other writers call `name`.

        None for an entry of a state dict that is no weight (a buffer of the running model).
        """
        return name

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """Shard tensor → the model's tensor that it holds, rounded to its dtype in the layout."""
        return {}

    def computed_resident(self, config: Config, tensors: Tensors) -> Arrays:
        """Resident tensors that are no copies of the model's, by names of their own."""
        return {}

    def computed_shard(self, config: Config, tensors: Tensors, layer: int, expert: int) -> Arrays:
        """Shard tensors that are no copies of the model's (packed codes, scales).

        float32 arrays are rounded to their dtype in the layout; any other array is in it
        already. The parity reference gets the tensors they were made of as they are.
        """
        return {}

    def initial(self, config: Config) -> Tensors:
        """Every tensor of a fresh model, each drawn when it is asked for; the seed decides.

        Raises `ConfigError` for a family that has `presets` of no kind.
        """
        raise ConfigError(f"{self.name} config: expected a family that draws initial weights")

    def parameter_count(self, config: Config) -> int:
        """Scalars in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes(config).values())


class ModularFamily(ModelFamily):
    """A family of modules that pack on their own, each a `ModelFamily` with the module's name.

    config.json names one in `module`; where it does not, the tensors tell.
    """

    def __init__(self, name: str, modules: Mapping[str, ModelFamily]) -> None:
        self.name = name
        self.modules = modules
        self.presets = {
            preset: {"module": key, **raw}
            for key, module in modules.items()
            for preset, raw in module.presets.items()
        }
        first = next(iter(modules.values()))
        self.storages = first.storages
        self.parity_tolerance = first.parity_tolerance

    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        """See `ModelFamily.resolve`; the result begins with `module`."""
        rest = {key: value for key, value in raw.items() if key != "module"}
        module = raw["module"] if "module" in raw else self._tell_module(found)
        if not isinstance(module, str) or module not in self.modules:
            raise ConfigError(
                f"{self.name} config: module: expected one of {', '.join(self.modules)}, "
                f"found {module!r}"
            )
        return {"module": module, **self.modules[module].resolve(rest, found)}

    def recognises(self, found: Shapes) -> bool:
        """See `ModelFamily.recognises`."""
        return any(module.recognises(found) for module in self.modules.values())

    def stored_as(self, config: Config, dtype: str) -> tuple[dict[str, Any], DType]:
        """See `ModelFamily.stored_as`."""
        return self.module(config).stored_as(config, dtype)

    def tokenizer(self, config: Config) -> Literal["bytes"] | None:
        """See `ModelFamily.tokenizer`."""
        return self.module(config).tokenizer(config)

    def module(self, config: Config) -> ModelFamily:
        """The object of the module that `config` names."""
        return self.modules[config["module"]]

    def shapes(self, config: Config) -> dict[str, Shape]:
        """See `ModelFamily.shapes`."""
        return self.module(config).shapes(config)

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return self.module(config).resident_names(config)

    def build(
        self, config: Config, resident: Mapping[str, ExternalTensor], dtype: DType
    ) -> Blueprint:
        """See `ModelFamily.build`."""
        return self.module(config).build(config, resident, dtype)

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        return self.module(config).sample_inputs(config, seed)

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        return self.module(config).expert_names(config, layer, expert)

    def computed_resident(self, config: Config, tensors: Tensors) -> Arrays:
        """See `ModelFamily.computed_resident`."""
        return self.module(config).computed_resident(config, tensors)

    def computed_shard(self, config: Config, tensors: Tensors, layer: int, expert: int) -> Arrays:
        """See `ModelFamily.computed_shard`."""
        return self.module(config).computed_shard(config, tensors, layer, expert)

    def initial(self, config: Config) -> Tensors:
        """See `ModelFamily.initial`."""
        return self.module(config).initial(config)

    def parameter_count(self, config: Config) -> int:
        """See `ModelFamily.parameter_count`."""
        return self.module(config).parameter_count(config)

    def _tell_module(self, found: Shapes) -> str:
        told = [name for name, module in self.modules.items() if module.recognises(found)]
        if len(told) != 1:
            names = sorted(found)
            listed = ", ".join(names[:5]) or "none"
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ConfigError(
                f"{self.name} config: module: expected one of {', '.join(self.modules)}, found "
                f"none, and the tensors are those of {' and '.join(told) or 'none'}: "
                f"{listed}{more}",
                hint='Add "module" to config.json.',
            )
        return told[0]
