"""Import a Hugging Face checkpoint: transformers' own graph, cut at its experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from evermind_manifests.errors import CheckpointError, ConfigError, ExportError
from evermind_manifests.manifest import (
    RESIDENT_NAME,
    SCHEMA,
    Card,
    DType,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Guess,
    Half,
    Layer,
    Manifest,
    Parameters,
    Plan,
    Step,
    ValueSpec,
    Variant,
)
from evermind_manifests.shard import shard_parts
from evermind_manifests.source_map import SOURCE_NAME, encode_source
from evermind_manifests.staging import unfinished
from evermind_manifests.writer import PackageWriter
from evermind_runtime.parity import typical_error

from ..export import Progress, ShardPart, add_kinds, write_shards
from ..onnx_graph import ExternalTensor
from ..parity import PARITY_NAME, encode_case
from .checkpoint import Checkpoint
from .cut import Cut, cut_graph
from .documents import left_out, made_files, read_documents
from .expert_kinds import ExpertKinds
from .expert_map import ExpertRows, map_experts, stored_dtypes
from .experts import ExpertsModule, find_experts
from .guesses import guess_ids, guess_x
from .origin import kept_file, kept_notes, kept_reader, kept_tensors, source_map
from .proof import half_error, parity_error
from .quantized import open_checkpoint
from .quiet import quiet
from .reference import Reference, stored
from .resident_file import ResidentFile
from .room import check_room, package_parts
from .skeleton import looked_up, skeleton
from .states import LOGITS, TOKENS
from .text import Text, read_text
from .trace import empty_model, require_transformers, trace
from .trunk import ImportDType, Trunk, wanted_dtype
from .variant import HalfModel, half_of, tolerance

# Relative to the logits' largest magnitude, both sides in float32.
TOLERANCE = 5e-5
# The tokens that both programs are compared over; up to the most where a window or a chunk of
# attention ends within them.
_PARITY_TOKENS, _MOST_PARITY_TOKENS, _BEYOND_WINDOW = 16, 200, 8
# 5.3 bytes each in the package.
_MOST_LOGITS = 1 << 23


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to write the package.

    `dtype` "keep" copies weights bit by bit; the others round them. `compute` "both" adds graphs
    that compute in half precision, the one most weights are stored in. `trunk` is the same for all
    weights but the experts', by default what `dtype` is: f16 and bf16 round matrices of 512 Ki
    values and more and keep what is smaller, f32 widens all. `restart` removes what an import
    that was cut off has left, in place of going on from there.
    """

    dtype: ImportDType = "keep"
    trunk: ImportDType | None = None
    compute: Literal["f32", "both"] = "f32"
    layout: Literal["files", "pool"] = "files"
    name: str | None = None
    card: Card = field(default_factory=Card)
    overwrite: bool = False
    restart: bool = False


@dataclass(frozen=True, slots=True)
class HalfResult:
    """How far half precision is off, as `evermind_runtime.parity.typical_error` has it.

    `own_error` is that of transformers in the same dtype.
    """

    compute: Half
    error: float
    own_error: float


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What was written.

    `architecture` is transformers' name of the model's type; `parity_error` how far the logits
    are off, relative to the largest; `half` what the graphs in half precision give; `notes` what of
    the checkpoint's text is not carried as it is.
    """

    digest: str
    architecture: str
    parity_error: float
    half: HalfResult | None = None
    notes: tuple[str, ...] = ()


def import_checkpoint(
    folder: Path,
    destination: Path,
    options: ImportOptions | None = None,
    *,
    progress: Progress | None = None,
    stage: Callable[[str], None] | None = None,
) -> ImportResult:
    """Write the checkpoint in `folder` as a package.

    The package is compared with transformers' eager float32 run of the weights as stored, in
    both programs, before it takes its place. An import that was cut off (Ctrl-C, a kill, a full
    disk) leaves its experts beside `destination`, and the same call goes on from there. `stage`
    hears what is being done, `progress(done, total)` counts bytes of experts.

    Raises `UnsupportedError` for a model that cannot be carried,
    `CheckpointError` for a damaged checkpoint, `ExportError` where the package computes
    something else than transformers, cannot be written, or another import was cut off there.
    """
    options = options or ImportOptions()
    wanted = wanted_dtype("dtype", options.dtype)
    trunk_wanted = wanted_dtype("trunk", options.trunk or options.dtype)
    if options.compute not in ("f32", "both"):
        raise ConfigError(f"compute: expected f32 or both, found {options.compute!r}")
    tell = stage or (lambda _: None)
    errors: list[float] = []
    require_transformers()
    checkpoint = open_checkpoint(folder)
    with PackageWriter(
        destination, layout=options.layout, overwrite=options.overwrite, resumable=True
    ) as writer:
        tell("reading the checkpoint")
        with quiet():
            empty = empty_model(folder)
            modules = find_experts(empty)
            layers = map_experts(empty, modules, checkpoint)
            stored_as = stored_dtypes(layers, checkpoint, wanted)
            kinds = ExpertKinds(empty, modules, stored_as)
            trunk = Trunk(empty, modules, checkpoint, trunk_wanted)
            model = skeleton(empty, modules, trunk.name)
        compute = half_of(stored_as, modules, trunk) if options.compute == "both" else None
        kept = _resume(writer, checkpoint, options, tell, progress)
        text = model.config.get_text_config()
        # Before the long part of the work, as it may be damaged.
        said = read_text(folder, getattr(text, "vocab_size", None) or 0)
        places = trunk.places()
        left = kept_tensors(checkpoint, places, layers)
        parts = package_parts(kinds, modules, trunk.weights, left, _parity_logits(text))
        check_room(writer.destination, parts, writer.shard_bytes)
        tell("tracing the model")
        with quiet():
            program = trace(model, modules, trunk.names, cuda=options.compute == "both")
        limit = getattr(text, "max_position_embeddings", None)
        cut = cut_graph(program, trunk, limit)
        del program
        half = None
        if compute is not None:
            tell(f"tracing the model in {compute}")
            with quiet():
                half = HalfModel(folder, compute, modules, kinds, trunk, limit)
        if not any(spec.is_buffer for spec in cut.states.values()):
            tell("keeping caches as they are exported, which is slower: see docs/huggingface.md")
        unread = looked_up(model)
        package = _Draft(
            checkpoint, options, modules, kinds, cut, half, trunk.parameters, unread, said
        )
        tell("computing what transformers gives")
        reference = Reference(model, modules, layers, checkpoint, stored_as, trunk)
        count = _parity_tokens(text, package.vocabulary)
        tokens = np.random.default_rng(1).integers(0, package.vocabulary, count)
        expected = reference.logits(tokens)
        _check_finite(expected, trunk, folder)
        case = encode_case({TOKENS: tokens}, {LOGITS: expected}, TOLERANCE)
        own_error = 0.0
        if half is not None:
            tell(f"computing what transformers gives in {half.compute}")
            own = Reference(half.model, modules, layers, checkpoint, stored_as, trunk)
            own_error = typical_error(expected, own.logits(tokens))
            package.tolerance = tolerance(half.compute, own_error)
        made = made_files(folder, package.text.files)
        used = package.resident.weights.keys()
        places = {name: found for name, found in places.items() if {*found} <= used}
        source = source_map(checkpoint, places, package.layers, layers, made)
        package.notes += kept_notes(source)
        added = {**package.files, PARITY_NAME: case, SOURCE_NAME: encode_source(source)}
        for path, data in added.items():
            writer.add_file(path, data)
        writer.stream_file(RESIDENT_NAME, package.resident.parts(trunk))
        if source.kept is not None:
            writer.stream_file(source.kept, kept_file(source).parts(kept_reader(checkpoint)))
        tell("writing experts")
        shards = _shard_parts(kinds, layers, checkpoint, kept)
        write_shards(writer, shards, package.layers, kinds.blueprints, progress)
        tell("comparing the package with transformers")

        def compare(written: Path) -> None:
            errors.append(parity_error(written))
            if half is not None:
                errors.append(half_error(written, half.compute))

        digest = writer.finish(package.manifest(), compare)
        found = HalfResult(half.compute, errors[1], own_error) if half is not None else None
        return ImportResult(digest, model.config.model_type, errors[0], found, tuple(package.notes))


def _parity_tokens(config: Any, vocabulary: int) -> int:
    """How many tokens the package is compared with transformers over.

    A few more than the longest window or chunk of attention that is not too long for it, if that
    makes no parity file of more than 45 MB, and no more than the model takes.
    """
    widths = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    lengths = [width + _BEYOND_WINDOW for width in widths if isinstance(width, int)]
    most = min(_MOST_PARITY_TOKENS, _MOST_LOGITS // vocabulary)
    fit = [length for length in lengths if length <= most]
    limit = getattr(config, "max_position_embeddings", None) or _MOST_PARITY_TOKENS
    return min(max([_PARITY_TOKENS, *fit]), limit)


def _parity_logits(config: Any) -> int:
    """How many logits the case will have, by the vocabulary that the configuration names."""
    vocabulary = getattr(config, "vocab_size", None) or 0
    return vocabulary * _parity_tokens(config, vocabulary) if vocabulary else 0


def _check_finite(logits: np.ndarray[Any, Any], trunk: Trunk, folder: Path) -> None:
    """Raise `CheckpointError` for logits that nothing can be compared with."""
    if np.isfinite(logits).all():
        return
    named = trunk.damaged()
    where = f"such values are in: {', '.join(named[:3])}" + (", …" if len(named) > 3 else "")
    if not named:
        where = "no weight outside the experts has such values: an expert has, or sums overflowed"
    raise CheckpointError(
        f"{folder}: expected finite logits of these weights, found infinite ones or NaN in "
        f"transformers' own; {where}",
        hint="The checkpoint is damaged, or its training diverged: fetch it again, or another.",
    )


def _resume(
    writer: PackageWriter,
    checkpoint: Checkpoint,
    options: ImportOptions,
    tell: Callable[[str], None],
    progress: Progress | None,
) -> frozenset[tuple[int, int]]:
    """The experts that an import before has written, if it was of the same all."""
    left = unfinished(writer.destination)
    if left is not None and not options.restart:
        tell(f"checking {left.shards:,} experts that are there already")
    key = {
        "checkpoint": checkpoint.identity(),
        "dtype": options.dtype,
        "layout": options.layout,
        "evermind-pack": metadata.version("evermind-pack"),
        "transformers": metadata.version("transformers"),
    }
    return writer.resume(key, restart=options.restart, progress=progress)


class _Draft:
    """A package without its shards: its files and its manifest.

    `trunk` are the parameters no expert has, `looked_up` those of them a token reads a row of.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ImportOptions,
        modules: list[ExpertsModule],
        kinds: ExpertKinds,
        cut: Cut,
        half: HalfModel | None,
        trunk: int,
        looked_up: int,
        text: Text,
    ) -> None:
        cuts = [cut] if half is None else [cut, half.cut]
        for one in cuts:
            if len(one.experts) != len(modules):
                raise ExportError(
                    f"the exported graph: expected {len(modules)} layers with experts, found "
                    f"{len(one.experts)}"
                )
        self._checkpoint = checkpoint
        self._options = options
        self._modules = modules
        self._cut = cut
        self._half = half
        #: Of graphs in half precision, if there are any.
        self.tolerance = 0.0
        self._trunk = trunk
        self._active = trunk - looked_up
        self._experts = kinds
        self._top_k = [int(cut.values[node.ids].dims[1]) for node in cut.experts]
        self.layers = tuple(
            Layer(layer=number, kind=kinds.of[number], experts=one.experts, top_k=top_k)
            for number, (one, top_k) in enumerate(zip(modules, self._top_k, strict=True))
        )
        self.vocabulary = int(cut.values[LOGITS].dims[1])
        self.resident = ResidentFile(cuts)
        self.text = (
            text
            if text.vocabulary == self.vocabulary
            else read_text(checkpoint.folder, self.vocabulary)
        )
        #: Every file but shards, parity and manifest, by path.
        self.files: dict[str, bytes] = {}
        self._add_graphs(cut, kinds.fused, self.resident.index(0), "")
        self._kinds = add_kinds(kinds.blueprints, self.files)
        self._half_kinds: dict[str, str] = {}
        if half is not None:
            suffix = f".{half.compute}"
            self._add_graphs(half.cut, half.experts.fused, self.resident.index(1), suffix)
            for kind in kinds.blueprints:
                self._half_kinds[kind] = f"graphs/expert_{kind}{suffix}.onnx"
                self.files[self._half_kinds[kind]] = half.experts.graph(kind)
        self.files |= self.text.files
        self.files |= read_documents(checkpoint.folder, self.text.files)
        self.notes = [*self.text.notes]
        if lost := left_out(checkpoint.folder):
            self.notes.append(f"{', '.join(lost)}: not carried, so that no way back has them")

    def _add_graphs(
        self,
        cut: Cut,
        fused: Callable[[str, int], bytes],
        index: Mapping[str, ExternalTensor],
        suffix: str,
    ) -> None:
        for number in range(len(cut.segments)):
            self.files[_segment_graph(number, suffix)] = cut.graph(number, index)
        for layer in cut.guesses:
            self.files[_guess_graph(layer, suffix)] = cut.guess(layer, index)
        for one in self.layers:
            path = _fused_graph(one, suffix)
            if path not in self.files:
                self.files[path] = fused(one.kind, one.top_k)

    def manifest(self) -> Manifest:
        """The manifest without `files` and `shards`."""
        folder = self._checkpoint.folder
        config = self._checkpoint.config
        modules = self._modules
        return Manifest(
            schema=SCHEMA,
            name=self._options.name or folder.resolve().name,
            version="1",
            family=f"huggingface/{config.get('model_type', 'unknown')}",
            config=config,
            parameters=Parameters(
                total=self._trunk + sum(one.experts * one.scalars for one in modules),
                active=self._active
                + sum(k * one.scalars for k, one in zip(self._top_k, modules, strict=True)),
            ),
            files={},
            kinds=self._kinds,
            layers=self.layers,
            shards=(),
            plan=self._plan(self._cut, ""),
            variants=self._variants(),
            resident=RESIDENT_NAME,
            tokenizer=self.text.tokenizer,
            generation=self.text.generation,
            parity=PARITY_NAME,
            source=SOURCE_NAME,
            card=self._options.card if self._options.card != Card() else None,
        )

    def _variants(self) -> dict[Half, Variant]:
        half = self._half
        if half is None:
            return {}
        plan = self._plan(half.cut, f".{half.compute}")
        return {half.compute: Variant(plan=plan, kinds=self._half_kinds, tolerance=self.tolerance)}

    def _plan(self, cut: Cut, suffix: str) -> Plan:
        prefill: list[Step] = []
        decode: list[Step] = []
        for number, segment in enumerate(cut.segments):
            step = GraphStep(
                graph=_segment_graph(number, suffix),
                inputs={name: name for name in segment.inputs},
                outputs={name: name.removesuffix(".new") for name in segment.outputs},
            )
            prefill.append(step)
            decode.append(step)
            if number == len(cut.experts):
                continue
            node = cut.experts[number]
            prefill.append(
                ExpertsStep(layer=number, x=node.x, ids=node.ids, gates=node.gates, y=node.y)
            )
            decode.append(
                GraphStep(
                    graph=_fused_graph(self.layers[number], suffix),
                    inputs={"x": node.x, "gates": node.gates},
                    outputs={"y": node.y},
                    experts=FusedExperts(layer=number, ids=node.ids, gates=node.gates),
                )
            )
        return Plan(
            inputs={TOKENS: ValueSpec(dtype="i64", shape=("T",), limit=self.vocabulary)},
            outputs={LOGITS: ValueSpec(dtype="f32", shape=("T", self.vocabulary))},
            state=cut.states,
            prefill=tuple(prefill),
            decode=tuple(decode),
            guesses=tuple(
                Guess(
                    layer=layer,
                    graph=_guess_graph(layer, suffix),
                    inputs={guess_x(layer): cut.experts[layer - 1].x},
                    ids=guess_ids(layer),
                )
                for layer in cut.guesses
            ),
        )


def _segment_graph(number: int, suffix: str) -> str:
    return f"graphs/segment_{number:02d}{suffix}.onnx"


def _guess_graph(layer: int, suffix: str) -> str:
    return f"graphs/guess_{layer:02d}{suffix}.onnx"


def _fused_graph(layer: Layer, suffix: str) -> str:
    return f"graphs/fused_{layer.kind}_{layer.top_k}{suffix}.onnx"


def _shard_parts(
    kinds: ExpertKinds,
    layers: list[list[ExpertRows]],
    checkpoint: Checkpoint,
    kept: Collection[tuple[int, int]],
) -> Iterator[ShardPart]:
    for layer, experts in enumerate(layers):
        layout = kinds.blueprints[kinds.of[layer]].layout
        types = {spec.name: spec.dtype for spec in layout.tensors}
        for expert, rows in enumerate(experts):
            place = layer, expert
            if place not in kept:
                arrays = _ExpertArrays(rows, checkpoint, types)
                yield from ((place, part) for part in shard_parts(layout, *place, arrays))


class _ExpertArrays(Mapping[str, np.ndarray[Any, Any]]):
    """One expert's tensors as they are stored, each read when it is asked for."""

    def __init__(
        self, rows: ExpertRows, checkpoint: Checkpoint, stored_as: Mapping[str, DType]
    ) -> None:
        self._rows = rows
        self._checkpoint = checkpoint
        self._stored_as = stored_as

    def __getitem__(self, tensor: str) -> np.ndarray[Any, Any]:
        return stored(self._checkpoint, self._rows[tensor], self._stored_as[tensor])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
