"""The modules that pack on their own: `block`, `x` to `forward`, and `lm`, tokens to logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import numpy as np
from evermind_manifests.manifest import DType, GraphStep, Plan, StateSpec, Step, ValueSpec
from evermind_runtime.lcg import Lcg

from ...blueprint import Blueprint, Tensors
from ...family import Arrays, Config, ModelFamily, Shape, Shapes
from ...onnx_graph import ExternalTensor, GraphBuilder
from ..linear import Weight
from .block import EPSILON, Block, kinds
from .params import (
    NAME,
    STORAGES,
    block_dims,
    block_shapes,
    lm_shapes,
    resolve_block,
    resolve_lm,
    told_block,
    told_lm,
)
from .storage import GROUPS, Matrix, MatrixSpec

Resident = Mapping[str, ExternalTensor]

_EMBED, _UNEMBED = "embed.weight", "unembed.weight"
_FINAL = "final_norm"


class TilelliModule(ModelFamily):
    """What both modules share: blocks, and tensors that are quantised at export."""

    name = NAME
    storages = STORAGES

    def stored_as(self, config: Config, dtype: str) -> tuple[dict[str, Any], DType]:
        """See `ModelFamily.stored_as`; the storage becomes a field of the configuration."""
        return {**config, "storage": dtype}, "f32"

    @abstractmethod
    def blocks(self, config: Config) -> list[Block]:
        """The model's blocks."""

    def expert_names(self, config: Config, layer: int, expert: int) -> dict[str, str]:
        """See `ModelFamily.expert_names`."""
        return self._block_of(config, layer).copied(layer, expert)

    def computed_shard(self, config: Config, tensors: Tensors, layer: int, expert: int) -> Arrays:
        """See `ModelFamily.computed_shard`."""
        return self._block_of(config, layer).computed(tensors, layer, expert)

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        return [name for block in self.blocks(config) for name in block.resident_names()]

    def computed_resident(self, config: Config, tensors: Tensors) -> Arrays:
        """See `ModelFamily.computed_resident`."""
        arrays: Arrays = {}
        for block in self.blocks(config):
            arrays |= block.computed_resident(tensors)
        return arrays

    def _block_of(self, config: Config, layer: int) -> Block:
        number = layer // len(block_dims(config).pathways)
        return self._block(config, number)

    @abstractmethod
    def _block(self, config: Config, number: int) -> Block:
        """The block with that number, in the names of the module's tensors."""


class TilelliBlock(TilelliModule):
    """`x` `(T, d)` to `forward` `(T, d)` (`infer`, where the configuration asks for that)."""

    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        """See `ModelFamily.resolve`."""
        return resolve_block(raw)

    def recognises(self, found: Shapes) -> bool:
        """See `ModelFamily.recognises`."""
        return told_block(found)

    def shapes(self, config: Config) -> dict[str, Shape]:
        """See `ModelFamily.shapes`."""
        return block_shapes(config)

    def blocks(self, config: Config) -> list[Block]:
        """The one block."""
        return [self._block(config, 0)]

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        width = config["d_model"]
        return {"x": Lcg(seed).gaussian(8 * width, 1.0).reshape(8, width)}

    def build(self, config: Config, resident: Resident, dtype: DType) -> Blueprint:
        """See `ModelFamily.build`."""
        block = self._block(config, 0)
        dims = block.dims
        b = GraphBuilder("block", resident)
        block.route(b, b.input("x", "f32", ["T", dims.d_model]), _Weights(b, resident))
        graphs = {"graphs/block.onnx": b.build()}
        b = GraphBuilder("combine")
        b.output(_sum(b, block), "y", "f32", ["T", dims.d_model])
        graphs["graphs/combine.onnx"] = b.build()

        result = config["semantics"]
        steps = (
            *block.steps("graphs/block.onnx", {"x": "x"}),
            GraphStep(
                graph="graphs/combine.onnx", inputs=_sum_inputs(block), outputs={"y": result}
            ),
        )
        rows, count = ("T", dims.d_model), len(dims.pathways)
        outputs = {
            result: ValueSpec(dtype="f32", shape=rows),
            "h": ValueSpec(dtype="f32", shape=rows, value="n.0"),
            "router_weights": ValueSpec(dtype="f32", shape=("T", count), value="shared.0"),
            "router_entropy": ValueSpec(dtype="f32", shape=("T",), value="entropy.0"),
            "router_probs": ValueSpec(
                dtype="f32", shape=("T", dims.columns), value="probabilities.0"
            ),
            "router_after_topk": ValueSpec(dtype="f32", shape=("T", dims.columns), value="kept.0"),
            "pathway_weights": ValueSpec(dtype="f32", shape=("T", count), value="weights.0"),
            "bank_idx": ValueSpec(dtype="i64", shape=("T", count), value="bank.0"),
            **block.routes(),
        }
        return Blueprint(
            kinds=kinds(dims, block.storage),
            layers=tuple(block.layers()),
            graphs=graphs,
            plan=Plan(
                inputs={"x": ValueSpec(dtype="f32", shape=rows)},
                outputs=outputs,
                state=block.state(),
                prefill=steps,
                decode=steps,
            ),
            active_parameters=self.parameter_count(config) - block.unused_parameters(),
        )

    def _block(self, config: Config, number: int) -> Block:
        return Block(block_dims(config), _storage(config), 0, "", "router.weight")


class AtomeLm(TilelliModule):
    """The byte language model: `tokens` `(T,)` to `logits` `(T, vocab_size)`."""

    def resolve(self, raw: Config, found: Shapes) -> dict[str, Any]:
        """See `ModelFamily.resolve`."""
        return resolve_lm(raw)

    def recognises(self, found: Shapes) -> bool:
        """See `ModelFamily.recognises`."""
        return told_lm(found)

    def shapes(self, config: Config) -> dict[str, Shape]:
        """See `ModelFamily.shapes`."""
        return lm_shapes(config)

    def blocks(self, config: Config) -> list[Block]:
        """All layers' blocks."""
        return [self._block(config, number) for number in range(config["n_layers"])]

    def resident_names(self, config: Config) -> list[str]:
        """See `ModelFamily.resident_names`."""
        names = [*super().resident_names(config), f"{_FINAL}.weight", f"{_FINAL}.bias"]
        return names if config["quantize"] else [_EMBED, *names, _UNEMBED]

    def computed_resident(self, config: Config, tensors: Tensors) -> Arrays:
        """See `ModelFamily.computed_resident`."""
        arrays = super().computed_resident(config, tensors)
        for name in (_EMBED, _UNEMBED) if config["quantize"] else ():
            recovered = block_dims(config).recovered
            arrays |= _table(config, name).arrays(tensors[name], recovered=recovered, where=name)
        return arrays

    def sample_inputs(self, config: Config, seed: int) -> Arrays:
        """See `ModelFamily.sample_inputs`."""
        # All different: equal tokens have equal scores, and who wins a tie is nobody's to say.
        order = np.argsort(Lcg(seed).uniforms(config["vocab_size"]), kind="stable")
        return {"tokens": order[:16].astype(np.int64)}

    def tokenizer(self, config: Config) -> Literal["bytes"] | None:
        """See `ModelFamily.tokenizer`: 256 tokens are bytes."""
        return "bytes" if config["vocab_size"] == 256 else None

    def build(self, config: Config, resident: Resident, dtype: DType) -> Blueprint:
        """See `ModelFamily.build`."""
        blocks = self.blocks(config)
        dims = blocks[0].dims
        graphs: dict[str, bytes] = {}
        steps: list[Step] = []
        state: dict[str, StateSpec] = {}
        rows = ("T", dims.d_model)
        outputs = {
            "logits": ValueSpec(dtype="f32", shape=("T", config["vocab_size"])),
            "embed": ValueSpec(dtype="f32", shape=rows, value=blocks[0].base),
        }
        for block in blocks:
            path, before = f"graphs/block_{block.number:02d}.onnx", blocks[block.number - 1]
            b = GraphBuilder("block", resident)
            if block.number == 0:
                ids = b.input("tokens", "i64", ["T"])
                x = Matrix(b, _table(config, _EMBED), _Weights(b, resident)).lookup(ids)
                inputs = {"tokens": "tokens"}
            else:
                x = _sum(b, before)
                inputs = _sum_inputs(before)
            block.route(b, x, _Weights(b, resident))
            graphs[path] = b.build()
            steps += block.steps(path, inputs)
            state |= block.state()
            outputs |= _observed(block, blocks[block.number + 1 :]) | block.routes()
        graphs["graphs/head.onnx"] = _head(config, blocks[-1], resident)
        steps.append(
            GraphStep(
                graph="graphs/head.onnx",
                inputs=_sum_inputs(blocks[-1]),
                outputs={"logits": "logits", "x_out": "x.out"},
            )
        )
        vocabulary = ValueSpec(
            dtype="i64", shape=("T",), limit=config["vocab_size"], aliases=("ids",)
        )
        unused = sum(block.unused_parameters() for block in blocks)
        return Blueprint(
            kinds=kinds(dims, blocks[0].storage),
            layers=tuple(layer for block in blocks for layer in block.layers()),
            graphs=graphs,
            plan=Plan(
                inputs={"tokens": vocabulary},
                outputs=outputs,
                state=state,
                prefill=tuple(steps),
                decode=tuple(steps),
            ),
            active_parameters=self.parameter_count(config) - unused,
        )

    def _block(self, config: Config, number: int) -> Block:
        prefix = f"blocks.{number}."
        return Block(block_dims(config), _storage(config), number, prefix, "router.proj.weight")


def _observed(block: Block, after: list[Block]) -> dict[str, ValueSpec]:
    """A block's output and routes, by the names the reference's traces have."""
    dims = block.dims
    name, count = f"block{block.number}", len(dims.pathways)
    result = {
        f"{name}/forward": ValueSpec(
            dtype="f32", shape=("T", dims.d_model), value=after[0].base if after else "x.out"
        ),
        f"{name}/router": ValueSpec(
            dtype="f32", shape=("T", count), value=f"shared.{block.number}"
        ),
        f"{name}/entropy": ValueSpec(dtype="f32", shape=("T",), value=f"entropy.{block.number}"),
    }
    if dims.banks > 1:
        result[f"{name}/bank_idx"] = ValueSpec(
            dtype="i64", shape=("T", count), value=f"bank.{block.number}"
        )
    return result


def _head(config: Config, last: Block, resident: Resident) -> bytes:
    b = GraphBuilder("head", resident)
    x = _sum(b, last)
    n = b.op(
        "LayerNormalization",
        x,
        b.weight(f"{_FINAL}.weight"),
        b.weight(f"{_FINAL}.bias"),
        axis=-1,
        epsilon=EPSILON,
    )
    logits = Matrix(b, _table(config, _UNEMBED), _Weights(b, resident)).linear(n)
    b.output(logits, "logits", "f32", ["T", config["vocab_size"]])
    b.output(x, "x_out", "f32", ["T", config["d_model"]])
    return b.build()


def _sum_inputs(block: Block) -> dict[str, str]:
    return {f"part_{at}": value for at, value in enumerate(block.parts)}


def _sum(b: GraphBuilder, block: Block) -> str:
    """The block's output: its input and its pathways' contributions, added in order."""
    width = block.dims.d_model
    return str(b.op("Sum", *(b.input(name, "f32", ["T", width]) for name in _sum_inputs(block))))


def _table(config: Config, name: str) -> MatrixSpec:
    """The embedding or its counterpart; always in memory, packed where the units are."""
    storage = _storage(config)
    shape = (config["vocab_size"], config["d_model"])
    plain = storage if storage in GROUPS else "f32"
    return MatrixSpec(name, shape, config["quantize"], config["per_row"], plain)


def _storage(config: Config) -> str:
    """What `stored_as` recorded."""
    return str(config["storage"])


class _Weights(Mapping[str, Weight]):
    """Resident tensors of a graph, declared when they are used."""

    def __init__(self, b: GraphBuilder, resident: Resident) -> None:
        self._b = b
        self._resident = resident

    def __getitem__(self, name: str) -> Weight:
        spec = self._resident[name]
        return Weight(self._b.weight(name), spec.dtype, spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._resident)

    def __len__(self) -> int:
        return len(self._resident)


MODULES: Final = {"block": TilelliBlock(), "lm": AtomeLm()}
