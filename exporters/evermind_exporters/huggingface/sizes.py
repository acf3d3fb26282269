"""What a package of a Hugging Face model would weigh, from its `config.json` alone.

No weight is read or downloaded. Where transformers is installed it tells what the model is made
of, as it does for an import (`outline.py`); else the config's fields do (`architecture.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evermind_manifests.dtypes import ITEMSIZE
from evermind_manifests.errors import ConfigError, UnsupportedError
from evermind_manifests.json_file import read_object
from evermind_manifests.manifest import DType
from evermind_manifests.shard import plan_shard
from evermind_runtime.layers import ExpertLayer, slot_of
from evermind_runtime.rows import window_rows
from evermind_runtime.sizes import DEFAULT_CONTEXT, ModelSizes, StateSizes, state_sizes

from ..resident import Stored, TensorFile
from .architecture import MOST_LAYERS, Counts, count_parameters
from .expert_kinds import kind_layout
from .fields import Fields
from .trunk import ImportDType, trunk_dtype, wanted_dtype

if TYPE_CHECKING:
    from .outline import Outline

_MOST_BYTES = 4 * 2**20
# The state is float32.
_FLOAT = 4
_DTYPES: dict[str, DType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# What transformers' configs call the longest sequence that a model can take.
_LONGEST = (
    "max_position_embeddings",
    "model_max_length",
    "max_seq_len",
    "n_positions",
    "context_length",
)
# Bytes per weight of the formats checkpoints come in, their scales included.
_MXFP4 = 4.25 / 8
_FP8 = 1 + 4 / 128**2


@dataclass(frozen=True, slots=True)
class ConfigSizes:
    """Sizes of the package a checkpoint would make, and what could not be known.

    `checkpoint_bytes` is about what the checkpoint itself weighs, `None` where its format is
    unknown. `notes` are for people.
    """

    model_type: str
    sizes: ModelSizes
    context: int
    checkpoint_bytes: int | None
    notes: tuple[str, ...]


class _Kept(NamedTuple):
    """What a package has a checkpoint's weights as if it keeps them.

    `matrices` are those that a quantised checkpoint has codes for, beside the experts'.
    """

    experts: DType
    matrices: DType
    others: DType


def read_config(path: Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises `LocationError` where there is none, `ConfigError` for what is no JSON object, has
    a key twice or is over 4 MiB.
    """
    return read_object(path, _MOST_BYTES, ConfigError)


def model_sizes(
    path: Path,
    *,
    dtype: ImportDType = "keep",
    trunk: ImportDType | None = None,
    context: int | None = None,
) -> ConfigSizes:
    """The model of the `config.json` at `path`, imported with these options.

    `context` is as for `config_sizes`. Raises what `read_config` and `config_sizes` do.
    """
    config, where = read_config(path), str(path)
    model = _Model(config, where, dtype, trunk, context)
    try:
        from .outline import outline

        found = outline(path)
    except ImportError:
        counted = config_sizes(config, where, dtype=dtype, trunk=trunk, context=context)
        why = "transformers is not installed ([hf]): counted by the config's fields"
        return replace(counted, notes=(*counted.notes, why))
    except UnsupportedError as refused:
        try:
            counted = config_sizes(config, where, dtype=dtype, trunk=trunk, context=context)
        except ConfigError as error:
            raise ConfigError(error.message, hint=refused.message) from refused
        why = f"`import` refuses it ({refused.message}): counted by the config's fields"
        return replace(counted, notes=(*counted.notes, why))
    return model.outlined(found)


def config_sizes(
    config: Mapping[str, Any],
    where: str = "config.json",
    *,
    dtype: ImportDType = "keep",
    trunk: ImportDType | None = None,
    context: int | None = None,
) -> ConfigSizes:
    """Count a model by its config's fields alone, for sequences of `context` tokens.

    The context is by default 4,096 tokens, or what the model can take if that is less.
    Raises `ConfigError` for a config that is malformed, not of a Mixture of Experts, or of
    layers this cannot count.
    """
    return _Model(config, where, dtype, trunk, context).counted()


class _Model:
    """A config, and what is to become of it."""

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        dtype: ImportDType,
        trunk: ImportDType | None,
        context: int | None,
    ) -> None:
        """Raises `ConfigError` for what no model can be made of."""
        self._outer = self._fields = Fields(config, where)
        if (inner := self._outer.within("text_config")) is not None:
            self._fields = inner
        self._fields.count("num_hidden_layers", "n_layers", default=1, least=1, most=MOST_LAYERS)
        self._wanted = wanted_dtype("dtype", dtype)
        self._trunk_wanted = wanted_dtype("trunk", trunk or dtype)
        self._notes: list[str] = []
        self._kept = self._find_kept()
        fields = self._fields
        longest = fields.count(*_LONGEST, default=DEFAULT_CONTEXT, least=1)
        self._longest = longest
        self._context = context or min(DEFAULT_CONTEXT, longest)
        if self._context > longest:
            raise ConfigError(
                f"{where}: the model takes at most {longest:,} tokens, "
                f"found a context of {self._context:,}"
            )

    def counted(self) -> ConfigSizes:
        """By its fields."""
        counts = count_parameters(self._fields)
        notes = []
        if self._fields is not self._outer:
            notes.append("only the text model is counted, not what sees or hears")
        if not counts.known:
            notes.append(
                f"model_type {self._kind!r} is not among those checked: norms and biases may "
                "differ (well under 1 %)"
            )
        ends = counts.embedding + counts.head + counts.norm
        matrices = counts.trunk - ends
        sizes = _counted_sizes(counts, self._stored(), self._context, self._longest)
        return self._result(sizes, counts.experts, matrices, ends, notes)

    def outlined(self, found: Outline) -> ConfigSizes:
        """As transformers has it."""
        trunk = {name: math.prod(shape) for name, shape in found.trunk.items()}
        matrices = sum(trunk[name] for name in found.linear)
        sizes = self._outlined_sizes(found, sum(trunk.values()))
        others = sum(trunk.values()) - matrices
        return self._result(sizes, sizes.expert_parameters, matrices, others, [])

    @property
    def _kind(self) -> str:
        return self._fields.text("model_type") or self._outer.text("model_type") or "unknown"

    def _stored(self) -> _Kept:
        """What the package has weights as, whatever their size."""
        kept = self._kept
        return _Kept(
            self._wanted or kept.experts,
            self._trunk_wanted or kept.matrices,
            self._trunk_wanted or kept.others,
        )

    def _outlined_sizes(self, found: Outline, trunk: int) -> ModelSizes:
        kept = self._kept
        kinds: list[Any] = []
        sizes = []
        for module in found.modules:
            types = {
                name: self._wanted or (kept.experts if len(shape) > 1 else kept.others)
                for name, shape in module.tensors.items()
            }
            alike = [one for one in kinds if one[0] == module.swiglu]
            kind = module.swiglu, module.tensors, types
            number = alike.index(kind) if kind in alike else len(alike)
            if number == len(alike):
                kinds.append(kind)
            sizes.append(kind_layout(module, types, number + 1).bytes)
        slot = slot_of(max(sizes))
        file = TensorFile(
            {
                name: Stored(
                    trunk_dtype(
                        kept.matrices if name in found.linear else kept.others,
                        shape,
                        self._trunk_wanted,
                    ),
                    shape,
                )
                for name, shape in found.trunk.items()
            }
        )
        experts = sum(one.experts * one.scalars for one in found.modules)
        routed = sum(k * one.scalars for k, one in zip(found.top_k, found.modules, strict=True))
        active = trunk - found.looked_up
        return ModelSizes(
            layers=tuple(
                ExpertLayer(layer=number, experts=module.experts, top_k=top_k, bytes=slot)
                for number, (module, top_k) in enumerate(
                    zip(found.modules, found.top_k, strict=True)
                )
            ),
            resident_bytes=file.size,
            active_resident_bytes=round(file.size * active / max(1, trunk)),
            state=state_sizes(found.states),
            total_parameters=trunk + experts,
            active_parameters=active + routed,
            expert_parameters=experts,
            graph_runs=_graph_runs(len(found.modules)),
            context=self._context,
            more_runs=_more_runs(
                found.top_k, slot, bf16=any("bf16" in one[2].values() for one in kinds)
            ),
        )

    def _result(
        self, sizes: ModelSizes, experts: int, matrices: int, others: int, notes: list[str]
    ) -> ConfigSizes:
        return ConfigSizes(
            model_type=self._kind,
            sizes=sizes,
            context=self._context,
            checkpoint_bytes=self._checkpoint_bytes(experts, matrices, others),
            notes=(*notes, *self._notes),
        )

    @property
    def _dtype(self) -> str:
        name = self._fields.text("dtype", "torch_dtype") or self._outer.text("dtype", "torch_dtype")
        return name.removeprefix("torch.")

    @property
    def _quantized(self) -> Fields | None:
        name = "quantization_config"
        return self._outer.within(name) or self._fields.within(name)

    def _find_kept(self) -> _Kept:
        name, quantized = self._dtype, self._quantized
        plain = _DTYPES.get(name, "f32" if quantized is None else "bf16")
        if not name and quantized is None and None in (self._wanted, self._trunk_wanted):
            self._notes.append("the config does not say what weights are stored as: taken for f32")
        if quantized is None:
            return _Kept(plain, plain, plain)
        method = quantized.text("quant_method")
        if method == "mxfp4":
            return _Kept("bf16", plain, plain)
        if method in ("fp8", "mxfp8"):
            # Powers of two times 4 bits fit bfloat16; those of a float32 factor do not.
            short = method == "mxfp8" or quantized.values.get("scale_fmt") == "ue8m0"
            made: DType = "bf16" if short else "f32"
            if not short and self._wanted is None:
                self._notes.append(
                    "fp8 with float32 factors is held in float32, as nothing less keeps it; "
                    "--dtype bf16 halves it"
                )
            return _Kept(made, made, plain)
        self._notes.append(f"`import` reads no checkpoints quantised as {method[:40]!r}")
        return _Kept(plain, plain, plain)

    def _checkpoint_bytes(self, experts: int, matrices: int, others: int) -> int | None:
        """About what the checkpoint weighs: by its dtype, and by how it is quantised."""
        kept = _DTYPES.get(self._dtype)
        plain = None if kept is None else ITEMSIZE[kept]
        quantized = self._quantized
        if quantized is None:
            return None if plain is None else (experts + matrices + others) * plain
        rest = plain or 2
        method = quantized.text("quant_method")
        if method == "mxfp4":
            return round(experts * _MXFP4 + (matrices + others) * rest)
        if method == "fp8":
            return round((experts + matrices) * _FP8 + others * rest)
        if method in ("gptq", "awq") and quantized.has("bits"):
            group = quantized.values.get("group_size")
            scales = 20 / group if isinstance(group, int) and group > 0 else 0.0
            bits = quantized.count("bits", least=1) + scales
            return round((experts + matrices) * bits / 8 + others * rest)
        return None


def _counted_sizes(counts: Counts, stored: _Kept, context: int, longest: int) -> ModelSizes:
    layers = []
    for number, layer in enumerate(counts.layers):
        if layer.experts:
            tensors = [
                (f"w{at}", stored.experts, (size,)) for at, size in enumerate(layer.expert_tensors)
            ]
            layers.append(
                ExpertLayer(
                    layer=number,
                    experts=layer.experts,
                    top_k=layer.top_k,
                    bytes=slot_of(plan_shard("expert", "silu", tensors).bytes),
                )
            )
    windows: Counter[int] = Counter()
    for layer in counts.layers:
        windows[layer.window] += layer.kept_per_token * _FLOAT
    per_token = windows.pop(0, 0)
    bounded = [(size, window_rows(window)) for window, size in sorted(windows.items())]
    ends = counts.embedding + counts.head + counts.norm
    matrix, other = ITEMSIZE[stored.matrices], ITEMSIZE[stored.others]
    resident = (counts.trunk - ends) * matrix + ends * other
    unread = 0 if counts.tied else counts.embedding * other
    return ModelSizes(
        layers=tuple(layers),
        resident_bytes=resident,
        active_resident_bytes=resident - unread,
        state=StateSizes(0, per_token, tuple(bounded), longest),
        total_parameters=counts.trunk + counts.experts,
        active_parameters=counts.active,
        expert_parameters=counts.experts,
        graph_runs=_graph_runs(len(layers)),
        context=context,
        more_runs=_more_runs(
            [layer.top_k for layer in layers],
            max((layer.bytes for layer in layers), default=0),
            bf16=stored.experts == "bf16",
        ),
    )


def _graph_runs(layers: int) -> int:
    """For one token: the experts of each, and a segment before, between and after them."""
    return 2 * layers + 1


def _more_runs(top_k: Sequence[int], slot: int, *, bf16: bool) -> int:
    """Beyond those, where each of a token's experts decodes in a run of its own."""
    from evermind_runtime.open_engine import decodes_one_by_one

    return sum(top_k) - len(top_k) if decodes_one_by_one(slot, bf16=bf16) else 0
