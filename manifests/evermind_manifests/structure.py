"""What must be true between the values of one manifest; no file is read.

`check_structure` is linear in the manifest's size (20,000 shards take a fraction of a
second) and reports every problem it finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from .dtypes import FLOATS, tensor_bytes
from .errors import PathError, UnsupportedError
from .manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    ExpertsStep,
    FusedExperts,
    GraphStep,
    Manifest,
    Name,
    Plan,
    Shard,
    StateSpec,
    Step,
)
from .paths import ORDINARY, check_file_kind, check_path
from .problems import Problem, problem, problem_of
from .shard import ALIGNMENT, check_layout
from .variants import each_variant

POOL_SUFFIX = ".moe0p"
POOL_ALIGNMENT = 4096
MAX_STATE_BYTES = 1 << 36


def check_structure(manifest: Manifest) -> list[Problem]:
    """Every contradiction in `manifest`, in the order of its fields; empty when it is sound."""
    return [
        *check_files(manifest.files),
        *_check_references(manifest),
        *_check_kinds(manifest),
        *_check_layers(manifest),
        *_check_shards(manifest),
        *_check_plan(manifest),
        *_check_variants(manifest),
        *_check_rest(manifest),
    ]


def check_files(files: Mapping[str, object]) -> Iterator[Problem]:
    """The paths of `files`: portable, of an allowed kind, and distinct in any letter case."""
    if all(map(ORDINARY.fullmatch, files)) and len(set(map(str.casefold, files))) == len(files):
        return
    folded: dict[str, str] = {}
    for path in files:
        place = f"files[{path!r}]"
        try:
            check_path(path)
            check_file_kind(path)
        except UnsupportedError as error:
            yield problem_of("file-kind", place, error)
        except PathError as error:
            yield problem_of("bad-path", place, error)
        if path in (MANIFEST_NAME, SIGNATURE_NAME):
            yield problem("bad-path", place, f"{path} cannot hold its own digest")
        other = folded.setdefault(path.casefold(), path)
        if other != path:
            yield problem("path-collision", place, f"differs from {other!r} in letter case only")
    folders: dict[str, str] = {}
    for path in folded:
        end = path.rfind("/")
        # Once a folder is known, so are those above it.
        while end > 0 and path[:end] not in folders:
            folders[path[:end]] = path
            end = path.rfind("/", 0, end)
    for path in folded.keys() & folders.keys():
        yield problem(
            "path-collision", f"files[{folded[path]!r}]", f"also a folder of {folders[path]!r}"
        )


def referenced_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(place, path) of every file the manifest uses, shards apart."""
    yield from _graphs(manifest)
    for where, variant in each_variant(manifest):
        yield from ((where + place, path) for place, path in _graphs(variant))
    if manifest.resident is not None:
        yield "resident", manifest.resident
    if manifest.tokenizer is not None and manifest.tokenizer.file is not None:
        yield "tokenizer.file", manifest.tokenizer.file
    if manifest.tokenizer is not None:
        for name, path in manifest.tokenizer.chat_templates.items():
            yield f"tokenizer.chat_templates[{name!r}]", path
    if manifest.parity is not None:
        yield "parity", manifest.parity
    if manifest.source is not None:
        yield "source", manifest.source


def _graphs(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(place, path) of every graph, those of variants apart."""
    for name, kind in manifest.kinds.items():
        yield f"kinds[{name!r}].graph", kind.graph
        if kind.graph_external is not None:
            yield f"kinds[{name!r}].graph_external", kind.graph_external
        if kind.graph_statistics is not None:
            yield f"kinds[{name!r}].graph_statistics", kind.graph_statistics
    for program, steps in programs(manifest.plan):
        for number, step in enumerate(steps):
            if isinstance(step, GraphStep):
                yield f"plan.{program}[{number}].graph", step.graph
    for number, guess in enumerate(manifest.plan.guesses):
        yield f"plan.guesses[{number}].graph", guess.graph


def programs(plan: Plan) -> Iterator[tuple[str, Sequence[Step]]]:
    """The plan's programs by name."""
    yield "prefill", plan.prefill
    yield "decode", plan.decode
    if plan.pooled is not None:
        yield "pooled.prefill", plan.pooled.prefill
        yield "pooled.decode", plan.pooled.decode


def routes(plan: Plan) -> dict[int, tuple[Name, Name]]:
    """By layer, the values that say where tokens go: expert ids, and their gates."""
    return {
        step.layer: (step.ids, step.gates) for step in plan.prefill if isinstance(step, ExpertsStep)
    }


def _check_references(manifest: Manifest) -> Iterator[Problem]:
    for place, path in referenced_files(manifest):
        if path not in manifest.files:
            yield problem("unlisted-file", place, f"{path!r} is not in `files`")
        elif place.startswith(("kinds", "plan", "variants")) and not path.endswith(".onnx"):
            yield problem("file-kind", place, f"expected an .onnx file, found {path!r}")
        elif place.startswith("tokenizer.chat") and not path.endswith(".jinja"):
            yield problem("file-kind", place, f"expected a .jinja file, found {path!r}")
    if manifest.resident is not None and not manifest.resident.endswith(".safetensors"):
        yield problem(
            "file-kind", "resident", f"expected a .safetensors file, found {manifest.resident!r}"
        )


def _check_kinds(manifest: Manifest) -> Iterator[Problem]:
    for name, kind in manifest.kinds.items():
        place = f"kinds[{name!r}]"
        if kind.bytes % ALIGNMENT or not kind.bytes:
            yield problem(
                "kind-layout",
                place,
                f"bytes: not a multiple of {ALIGNMENT}: {kind.bytes}",
            )
        data_offset = kind.tensors[0].offset if kind.tensors else 0
        if kind.tensors and data_offset < ALIGNMENT:
            yield problem("kind-layout", place, f"no room for a header before offset {data_offset}")
        for message in check_layout(kind.tensors, data_offset, kind.bytes):
            yield problem("kind-layout", place, message)


def _check_layers(manifest: Manifest) -> Iterator[Problem]:
    for layer, count in Counter(entry.layer for entry in manifest.layers).items():
        if count > 1:
            yield problem("layer-invalid", f"layers: layer {layer}", f"stands {count} times")
    for number, entry in enumerate(manifest.layers):
        place = f"layers[{number}]"
        if entry.kind not in manifest.kinds:
            yield problem("layer-invalid", place, f"kind {entry.kind!r} is not in `kinds`")
        if entry.top_k > entry.experts:
            yield problem(
                "layer-invalid", place, f"top_k {entry.top_k} is more than {entry.experts} experts"
            )


def _check_shards(manifest: Manifest) -> Iterator[Problem]:
    layers = {entry.layer: entry for entry in manifest.layers}
    sizes = {
        entry.layer: manifest.kinds[entry.kind].bytes
        for entry in manifest.layers
        if entry.kind in manifest.kinds
    }
    seen: dict[tuple[int, int], int] = {}
    shards = manifest.shards
    for number, shard in enumerate(shards):
        layer = layers.get(shard.layer)
        if layer is None or shard.expert >= layer.experts:
            yield problem(
                "shard-surplus",
                f"shards[{number}]",
                f"there is no expert {shard.expert} in layer {shard.layer}",
            )
        first = seen.setdefault((shard.layer, shard.expert), number)
        if first != number:
            yield problem(
                "shard-surplus",
                f"shards[{number}]",
                f"layer {shard.layer} expert {shard.expert} stands in shards[{first}] too",
            )
        expected = sizes.get(shard.layer, shard.bytes)
        if shard.bytes != expected:
            yield problem(
                "shard-size", f"shards[{number}]", f"expected {expected} bytes, found {shard.bytes}"
            )
        yield from _check_shard_file(manifest, number, shard)
    yield from _check_missing(manifest, seen)
    ranges = sorted((shard.file, shard.offset, number) for number, shard in enumerate(shards))
    for (path, begin, one), (other_path, other_begin, other) in pairwise(ranges):
        if path == other_path and other_begin < begin + shards[one].bytes:
            yield problem("shard-range", f"shards[{other}]", f"overlaps shards[{one}] in {path}")


def _check_shard_file(manifest: Manifest, number: int, shard: Shard) -> Iterator[Problem]:
    place = f"shards[{number}]"
    entry = manifest.files.get(shard.file)
    alignment = POOL_ALIGNMENT if shard.file.endswith(POOL_SUFFIX) else ALIGNMENT
    if shard.offset % alignment:
        yield problem(
            "shard-range",
            place,
            f"offset: not a multiple of {alignment}: {shard.offset}",
        )
    if not shard.file.endswith((".moe0", POOL_SUFFIX)):
        yield problem("file-kind", place, f"expected a .moe0 or .moe0p file, found {shard.file!r}")
    if entry is None:
        yield problem("unlisted-file", place, f"{shard.file!r} is not in `files`")
        return
    if shard.offset + shard.bytes > entry.bytes:
        yield problem(
            "shard-range",
            place,
            f"ends at {shard.offset + shard.bytes}, {shard.file} has {entry.bytes} bytes",
        )
    whole = shard.offset == 0 and shard.bytes == entry.bytes
    if whole and shard.sha256 != entry.sha256:
        yield problem(
            "digest-conflict", place, f"sha256 {shard.sha256[:12]}…, files: {entry.sha256[:12]}…"
        )


def _check_missing(manifest: Manifest, seen: Mapping[tuple[int, int], int]) -> Iterator[Problem]:
    # A hostile manifest may claim 2^31 experts: compare counts before counting one by one.
    present = Counter(layer for layer, _ in seen)
    for entry in {entry.layer: entry for entry in manifest.layers}.values():
        missing = entry.experts - present[entry.layer]
        if missing <= 0:
            continue
        examples: list[int] = []
        for expert in range(entry.experts):
            if (entry.layer, expert) not in seen:
                examples.append(expert)
                if len(examples) == min(missing, 5):
                    break
        yield problem(
            "shard-missing",
            f"shards: layer {entry.layer}",
            f"{missing} of {entry.experts} experts have no shard: expert"
            f" {', '.join(map(str, examples))}{', …' if missing > len(examples) else ''}",
        )


def _check_plan(manifest: Manifest) -> Iterator[Problem]:
    plan = manifest.plan
    for name in plan.inputs.keys() & plan.state.keys():
        yield problem("plan-redefined", f"plan.state[{name!r}]", "is an input too")
    for name, state in plan.state.items():
        place = f"plan.state[{name!r}]"
        rows = state.window or (state.grows and state.limit) or 1  # unset counts as none
        size = tensor_bytes(state.dtype, state.fixed) * rows
        if size > MAX_STATE_BYTES:
            yield problem("state-too-large", place, f"{size:,} bytes")
        named = len(state.shape) - len(state.fixed)
        if state.is_buffer:
            if named != 1:
                found = f"a buffer has one name in its shape, not {named}"
                yield problem("state-shape", place, found)
            yield from _check_buffer(plan, name, state)
        elif named > state.grows:
            yield problem("state-shape", place, "only the first dimension grows")
        if state.is_counter and (state.dtype, state.shape) != ("i64", (1,)):
            yield problem("state-shape", place, "limit: this state neither grows nor counts")
        if state.dtype == "bf16" and not state.is_buffer:
            yield problem("state-shape", place, "dtype: bf16, but this state is no buffer")
        if state.window and not state.is_buffer:
            yield problem("state-shape", place, "window: this state is no buffer")
        if state.window and state.limit:
            yield problem("state-shape", place, "limit: a buffer with a window has none")
    for program, steps in programs(plan):
        yield from _check_program(manifest, program, steps)
    taken = {*plan.inputs, *plan.state}
    for name, spec in plan.inputs.items():
        for alias in spec.aliases:
            if alias in taken:
                yield problem("plan-redefined", f"plan.inputs[{name!r}]", f"{alias!r} is taken")
            taken.add(alias)
    yield from _check_guesses(manifest)
    for name in plan.observations.keys() & plan.outputs.keys():
        yield problem("plan-redefined", f"plan.observations[{name!r}]", "is an output too")


def _check_buffer(plan: Plan, name: str, state: StateSpec) -> Iterator[Problem]:
    """Each program reads and writes a buffer in one graph step, and nothing else has it."""
    place = f"plan.state[{name!r}]"
    if any(
        one.length == state.length and one.window != state.window for one in plan.state.values()
    ):
        yield problem("state-buffer", place, f"{state.length!r}: buffers of other windows have it")
    if state.length in {*plan.inputs, *plan.state}:
        yield problem("plan-redefined", place, f"length: {state.length!r} is an input or a state")
    if state.finite:
        yield problem("state-buffer", place, "finite: a buffer cannot be checked")
    if any((spec.value or output) == name for output, spec in plan.outputs.items()):
        yield problem("state-buffer", place, "an output of the plan is taken from it")
    for program, steps in programs(plan):
        for number, step in enumerate(steps):
            writes = name in _writes(step)
            if not isinstance(step, GraphStep) or list(step.outputs.values()).count(name) > 1:
                wrong = name in _reads(step) or writes
            else:
                wrong = list(step.inputs.values()).count(name) != writes
            if wrong:
                yield problem(
                    "state-buffer",
                    f"plan.{program}[{number}]",
                    f"{name!r} is not read and written once by one graph step",
                )


def _check_guesses(manifest: Manifest) -> Iterator[Problem]:
    """Each guess reads what decode has before it runs the experts of the guess's layer."""
    plan = manifest.plan
    fixed = {*plan.inputs, *(name for name, state in plan.state.items() if not state.grows)}
    before: dict[int, set[str]] = {}
    for step in plan.decode:
        experts = step.experts if isinstance(step, GraphStep) else step
        if experts is not None:
            before.setdefault(experts.layer, set(fixed))
        fixed |= {name for name in _writes(step) if name not in plan.state}
    for number, guess in enumerate(plan.guesses):
        place = f"plan.guesses[{number}]"
        if guess.layer not in before:
            yield problem("plan-experts", place, f"decode runs no experts of layer {guess.layer}")
            continue
        for name in sorted(set(guess.inputs.values()) - before[guess.layer]):
            yield problem(
                "plan-undefined",
                place,
                f"{name!r} is not there before the experts of layer {guess.layer} run, or grows",
            )
        if guess.weights and manifest.resident is None:
            yield problem("plan-weights", place, "weights are bound, but `resident` is not set")


def _check_program(manifest: Manifest, program: str, steps: Sequence[Step]) -> Iterator[Problem]:
    """Walk the blackboard: who produces which value, and is it there when it is read?

    A state can be read before and after the step that writes it, and means the old value.
    """
    plan = manifest.plan
    produced: set[str] = set()
    available = {*plan.inputs, *plan.state, *plan.lengths}
    executed: Counter[int] = Counter()
    known = {entry.layer for entry in manifest.layers}
    pooled = program.startswith("pooled.")
    for number, step in enumerate(steps):
        place = f"plan.{program}[{number}]"
        for name in _reads(step):
            if name not in available:
                yield problem("plan-undefined", place, f"{name!r} is read before it is produced")
        for name in _writes(step):
            if name in produced or name in plan.inputs or name in plan.lengths:
                yield problem("plan-redefined", place, f"{name!r} is produced twice")
            produced.add(name)
        available |= produced
        experts = step.experts if isinstance(step, GraphStep) else step
        if experts is not None:
            executed[experts.layer] += 1
            if experts.layer not in known:
                yield problem("plan-experts", place, f"layer {experts.layer} is not in `layers`")
        if isinstance(step, ExpertsStep) and step.inputs and not _whole(manifest, step.layer):
            yield problem("plan-experts", place, "inputs: the experts do not see all tokens")
        if isinstance(experts, FusedExperts) and program == "prefill":
            yield problem("plan-experts", place, "fused experts take one token: decode only")
        if isinstance(step, GraphStep):
            if step.weights and manifest.resident is None:
                yield problem("plan-weights", place, "weights are bound, but `resident` is not set")
            yield from _check_pools(manifest, place, step, pooled)
    for layer in sorted(known):
        if executed[layer] != (not pooled):
            yield problem(
                "plan-experts", f"plan.{program}", f"layer {layer} runs {executed[layer]} times"
            )
    wanted = {f"plan.outputs[{name!r}]": spec.value or name for name, spec in plan.outputs.items()}
    wanted |= {f"plan.state[{name!r}]": name for name in plan.state}
    if pooled:
        for layer, (ids, gates) in routes(plan).items():
            wanted |= {f"layer {layer}: ids": ids, f"layer {layer}: gates": gates}
    if program == "prefill":
        wanted |= {
            f"plan.observations[{name!r}]": spec.value or name
            for name, spec in plan.observations.items()
        }
        for number, router in enumerate(plan.routers):
            for name in (router.ids, router.gates, router.probabilities):
                wanted[f"plan.routers[{number}]: {name}"] = name
    for place, name in wanted.items():
        if name not in produced:
            yield problem("plan-output", place, f"{program} never produces {name!r}")


def _whole(manifest: Manifest, layer: int) -> bool:
    """Whether the layer's experts see the whole sequence; True where another problem is."""
    kinds = (manifest.kinds.get(entry.kind) for entry in manifest.layers if entry.layer == layer)
    return all(kind is None or kind.scope == "sequence" for kind in kinds)


def _check_pools(
    manifest: Manifest, place: str, step: GraphStep, pooled: bool
) -> Iterator[Problem]:
    if step.pools and not pooled:
        yield problem("plan-pools", place, "pools are bound outside the pooled programs")
    kinds = {entry.layer: entry.kind for entry in manifest.layers}
    for name, pool in step.pools.items():
        kind = manifest.kinds.get(kinds.get(pool.layer, ""))
        if kind is None or all(spec.name != pool.tensor for spec in kind.tensors):
            found = f"layer {pool.layer} has no tensor {pool.tensor!r}"
        elif any(spec.name == pool.tensor and spec.dtype not in FLOATS for spec in kind.tensors):
            found = f"{pool.tensor!r} of layer {pool.layer} is not made of floats"
        else:
            continue
        yield problem("plan-pools", place, f"pools[{name!r}]: {found}")


def _reads(step: Step) -> list[str]:
    if isinstance(step, ExpertsStep):
        return [step.x, step.ids, step.gates, *step.inputs.values()]
    experts = step.experts
    if experts is None:
        return list(step.inputs.values())
    return [*step.inputs.values(), experts.ids, *([experts.gates] if experts.gates else [])]


def _writes(step: Step) -> list[str]:
    return [step.y] if isinstance(step, ExpertsStep) else list(step.outputs.values())


def _check_variants(manifest: Manifest) -> Iterator[Problem]:
    """Each is sound by itself, and takes and gives what the manifest's own plan does."""
    for (place, one), variant in zip(
        each_variant(manifest), manifest.variants.values(), strict=True
    ):
        for found in _check_plan(one):
            yield replace(found, place=place + found.place)
        for name in sorted(variant.kinds.keys() - manifest.kinds.keys()):
            yield problem("variant", place + "kinds", f"{name!r} is not in `kinds`")
        for name in ("inputs", "outputs"):
            if getattr(one.plan, name) != getattr(manifest.plan, name):
                yield problem("variant", f"{place}plan.{name}", f"are not those of `plan.{name}`")
        if one.plan.state.keys() != manifest.plan.state.keys():
            yield problem("variant", f"{place}plan.state", "has other names than `plan.state`")


def _check_rest(manifest: Manifest) -> Iterator[Problem]:
    parameters = manifest.parameters
    if parameters.active > parameters.total:
        yield problem(
            "parameters", "parameters", f"active {parameters.active:,} > total {parameters.total:,}"
        )
    tokenizer = manifest.tokenizer
    if tokenizer is not None and tokenizer.kind == "tokenizers" and tokenizer.file is None:
        yield problem("tokenizer", "tokenizer.file", "expected a path, found none")
    if manifest.parity is None:
        yield problem("no-parity", "parity", "not set")
