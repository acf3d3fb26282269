"""The Tilelli configurations and tensors: one block, and the Atome language model.

Source: specs/tilelli.md, sections 2, 3 and 5. Keys are the reference constructors'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from evermind_manifests.errors import ConfigError

from ...config_fields import ConfigFields
from ...family import Config, Shape

NAME: Final = "tilelli"
PATHWAYS: Final = {
    3: ("local", "state", "sparse"),
    5: ("local", "wide", "state", "sparse", "dense"),
}
#: Parameters that are never quantised.
STATE_VECTORS: Final = ("a_raw", "b", "c_out")
_ATTENTION: Final = ("Wq", "Wk", "Wv")
# Far above any model here; a hostile config must not make us list billions of names.
_MAX_TENSORS: Final = 1_000_000

# What both modules take besides their own dimensions: key and default.
_FLAGS: Final = {"quantize": True, "per_row": False, "fp_attention": False}
#: How matrices are stored (`storage.py`), the default first.
STORAGES: Final = ("ternary", "ternary2", "f16", "bf16", "f32")
_UNDEFINED: Final = ("hadamard", "lsq")


@dataclass(frozen=True, slots=True)
class BlockDims:
    """One block. `pathways` are those that run, in router order; `stored` all that exist."""

    d_model: int
    d_head: int
    kernel: int
    wide: int
    top_k: int
    pathways: tuple[str, ...]
    stored: tuple[str, ...]
    banks: int
    expand: int
    top_k_routing: int
    quantize: bool
    per_row: bool
    fp_attention: bool
    recovered: bool
    infers: bool
    threshold: float

    @property
    def columns(self) -> int:
        """The router's rows: one per pathway and bank, banks innermost."""
        return len(self.pathways) * self.banks

    def quantised(self, tensor: str) -> bool:
        """Whether a unit's tensor, by its name inside the unit, is used in ternary form."""
        head = tensor.partition(".")[0]
        if tensor in STATE_VECTORS or not self.quantize:
            return False
        return not (self.fp_attention and head in _ATTENTION)

    def unit_shapes(self, pathway: str) -> dict[str, Shape]:
        """The tensors of one (pathway, bank) unit, by their names inside it."""
        d = self.d_model
        if pathway in ("local", "wide"):
            return {"weight": (d, 1, self.kernel if pathway == "local" else self.wide)}
        if pathway == "state":
            return dict.fromkeys(STATE_VECTORS, (d,))
        if pathway == "sparse":
            shapes = {"Wq.weight": (self.d_head, d), "Wk.weight": (self.d_head, d)}
            return {**shapes, "Wv.weight": (d, d)}
        hidden = self.expand * d
        return {"up.weight": (hidden, d), "down.weight": (d, hidden)}

    def unit_prefix(self, pathway: str, bank: int) -> str:
        """Where a unit's tensors stand in its block's state dict."""
        return f"{pathway}.{bank}." if self.banks > 1 else f"{pathway}."

    def shapes(self, router: str) -> dict[str, Shape]:
        """Every tensor of the block; `router` is what its router's weight is called."""
        result: dict[str, Shape] = {
            "norm.weight": (self.d_model,),
            "norm.bias": (self.d_model,),
            router: (self.columns, self.d_model),
        }
        for pathway in self.stored:
            for bank in range(self.banks):
                prefix = self.unit_prefix(pathway, bank)
                result |= {prefix + k: v for k, v in self.unit_shapes(pathway).items()}
        return result


def unit_parameters(dims: BlockDims, pathway: str) -> int:
    """Scalars in one unit."""
    return sum(math.prod(shape) for shape in dims.unit_shapes(pathway).values())


def resolve_block(raw: Config) -> dict[str, Any]:
    """The configuration of one block, checked, with defaults. Raises `ConfigError`."""
    fields = _fields("block", raw)
    result: dict[str, Any] = {
        "d_model": fields.integer("d_model"),
        "d_head": fields.integer("d_head", 32),
        "kernel_size": fields.integer("kernel_size", 5),
        "wide_kernel_size": fields.integer("wide_kernel_size", 21),
        "top_k": fields.integer("top_k", 8),
        "pathways": _pathway_count(fields, 5),
        "n_banks": fields.integer("n_banks", 1),
        "dense_expand": fields.integer("dense_expand", 2),
        **_common(fields),
    }
    return _checked("block", fields, result)


def resolve_lm(raw: Config) -> dict[str, Any]:
    """The configuration of the language model, checked, with defaults. Raises `ConfigError`."""
    raw = dict(raw)
    disabled = raw.pop("disable_pathways", [])
    # The trained checkpoints count their pathways under another name.
    if "n_pathways" in raw and "pathways" not in raw:
        raw["pathways"] = raw.pop("n_pathways")
    fields = _fields("lm", raw)
    result: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size", 256),
        "d_model": fields.integer("d_model", 64),
        "n_layers": fields.integer("n_layers", 4),
        "d_head": fields.integer("d_head", 16),
        "kernel_size": fields.integer("kernel_size", 5),
        "wide_kernel_size": fields.integer("wide_kernel_size", 21),
        "top_k": fields.integer("top_k", 4),
        "pathways": _pathway_count(fields, 3),
        "n_banks": fields.integer("n_banks", 1),
        "dense_expand": fields.integer("dense_expand", 2),
        **_common(fields),
    }
    order = PATHWAYS[result["pathways"]]
    if not isinstance(disabled, list) or not set(map(str, disabled)) < set(order):
        fields.refuse("disable_pathways", f"some of {', '.join(order)}, not all", disabled)
    result["disable_pathways"] = [name for name in order if name in disabled]
    return _checked("lm", fields, result)


def block_dims(config: Config) -> BlockDims:
    """The dimensions of a resolved configuration's block (of each, for a language model)."""
    stored = PATHWAYS[config["pathways"]]
    disabled = config.get("disable_pathways", [])
    infers = config["semantics"] == "infer"
    banks = config["n_banks"]
    return BlockDims(
        d_model=config["d_model"],
        d_head=config["d_head"],
        kernel=config["kernel_size"],
        wide=config["wide_kernel_size"],
        top_k=config["top_k"],
        pathways=tuple(name for name in stored if name not in disabled),
        stored=stored,
        banks=banks,
        expand=config["dense_expand"],
        # `infer` never had top-k routing; with several banks it skips nothing either.
        top_k_routing=0 if infers else config["top_k_routing"],
        quantize=config["quantize"],
        per_row=config["per_row"],
        fp_attention=config["fp_attention"],
        recovered=config["weights"] == "ternary",
        infers=infers,
        threshold=config["skip_threshold"] if infers and banks == 1 else 0.0,
    )


def block_shapes(config: Config) -> dict[str, Shape]:
    """The state dict of one block."""
    return block_dims(config).shapes("router.weight")


def lm_shapes(config: Config) -> dict[str, Shape]:
    """The state dict of the language model."""
    dims = block_dims(config)
    table = (config["vocab_size"], dims.d_model)
    shapes: dict[str, Shape] = {"embed.weight": table}
    block = dims.shapes("router.proj.weight")
    for layer in range(config["n_layers"]):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"final_norm.weight": (dims.d_model,), "final_norm.bias": (dims.d_model,)}
    return {**shapes, "unembed.weight": table}


def _fields(module: str, raw: Config) -> ConfigFields:
    for name in _UNDEFINED:
        value = raw.get(name, False)
        if value is not False:
            raise ConfigError(
                f"{NAME} {module} config: {name}: expected false, found {value!r}: this variant "
                "is named in the reference and defined nowhere",
                hint="Export a model that was trained without it.",
            )
    return ConfigFields(
        f"{NAME} {module}", {key: value for key, value in raw.items() if key not in _UNDEFINED}
    )


def _pathway_count(fields: ConfigFields, default: int) -> int:
    count = fields.integer("pathways", default)
    if count not in PATHWAYS:
        fields.refuse("pathways", "3 or 5", count)
    return count


def _common(fields: ConfigFields) -> dict[str, Any]:
    return {
        "top_k_routing": fields.integer("top_k_routing", 0, low=0),
        "skip_mode": fields.choice("skip_mode", ("per_call", "per_token"), "per_call"),
        "skip_threshold": fields.number("skip_threshold", 0.05, low=0.0, high=1.0),
        **{key: fields.flag(key, default) for key, default in _FLAGS.items()},
        "semantics": fields.choice("semantics", ("forward", "infer"), "forward"),
        "weights": fields.choice("weights", ("shadow", "ternary"), "shadow"),
        "seed": fields.integer("seed", 0, low=0, high=2**63 - 1),
        "storage": fields.choice("storage", STORAGES, STORAGES[0]),
    }


def _checked(module: str, fields: ConfigFields, result: dict[str, Any]) -> dict[str, Any]:
    fields.finish()
    if result["weights"] == "ternary" and not result["quantize"]:
        fields.refuse("weights", "shadow, as quantize is false", "ternary")
    calls = result["skip_mode"] == "per_call" and result["skip_threshold"] > 0
    if result["semantics"] == "infer" and result["n_banks"] == 1 and calls:
        raise ConfigError(
            f"{NAME} {module} config: skip_mode: 'per_call' drops a pathway by its largest weight "
            "over the whole batch and all its tokens, so what a token gives would depend on the "
            "others in the call",
            hint='Use "skip_mode": "per_token", or "skip_threshold": 0, which gives the '
            "reference's numbers for calls in which it drops nothing. For those in which it does, "
            "there is no package.",
        )
    units = result["pathways"] * result["n_banks"] * result.get("n_layers", 1)
    if 3 * units > _MAX_TENSORS:
        raise ConfigError(
            f"{NAME} {module} config: expected at most {_MAX_TENSORS:,} tensors, "
            f"found {3 * units:,}"
        )
    return result


def told_block(found: Mapping[str, Shape]) -> bool:
    """Whether these are the tensors of one block."""
    return {"norm.weight", "norm.bias", "router.weight"} <= found.keys() and any(
        name.startswith("state.") and name.endswith("a_raw") for name in found
    )


def told_lm(found: Mapping[str, Shape]) -> bool:
    """Whether these are the tensors of the language model."""
    marks = {"embed.weight", "unembed.weight", "final_norm.weight", "blocks.0.norm.weight"}
    return marks <= found.keys()
