"""What manifest.json says: frozen structs for `evermind.package/1`, and strict parsing.

The structs hold what a single JSON value can be checked for (types, ranges, patterns);
`structure.py` checks what needs two values at once. Unknown keys are allowed, so that a
later minor version may add some; what a reader must understand stands in `requires`.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from .errors import ConfigError, ManifestError, UnsupportedError
from .unique_keys import unique_keys

SCHEMA: Final = "evermind.package/1"
#: What a variant may be off by at most: one that is off by more computes something else.
MOST_TOLERANCE: Final = 0.1
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"
CARD_NAME = "README.md"
RESIDENT_NAME = "graphs/resident.safetensors"
EXTERNAL_EXPERT_LOCATION = "expert.bin"

MAX_MANIFEST_BYTES = 64 * 1024 * 1024
# Entries of `requires` this version understands; any other is refused.
KNOWN_REQUIREMENTS: frozenset[str] = frozenset()

# Integers above 2^53 - 1 do not survive a JSON reader in a browser.
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveCount: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
# In Python `$` also matches before a final newline, hence the length.
Sha256: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]
PackagePath: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]
DType: TypeAlias = Literal["f32", "f16", "bf16", "f64", "i64", "i32", "u8", "bool"]
Half: TypeAlias = Literal["f16", "bf16"]
# The cap on the rank keeps the product of a hostile shape small.
Shape: TypeAlias = Annotated[tuple[PositiveCount, ...], Meta(max_length=16)]
# A dimension is a number or the name of one that varies ("T": tokens).
Dims: TypeAlias = Annotated[tuple[PositiveCount | Name, ...], Meta(max_length=16)]


class FileEntry(Struct, frozen=True, kw_only=True, gc=False):
    """One file of the package: its exact length in bytes and its sha256."""

    bytes: Bytes
    sha256: Sha256


class TensorSpec(Struct, frozen=True, kw_only=True):
    """One tensor of a shard: `offset` (a multiple of 64) counts from the shard's first byte."""

    name: Name
    dtype: DType
    shape: Shape
    offset: Bytes
    bytes: Bytes


class Kind(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all experts of one kind share: the graph that runs one, and a shard's layout.

    `graph` has the input `x` `(n, d_in)`, one input per tensor, and the output `y`
    `(n, d_out)`; an experts step may bind more inputs. `graph_external` computes the same
    without the tensors, which are external initializers in `expert.bin` at their shard
    offsets. `graph_statistics` is `graph` with more outputs, each `(n,)` f32: a statistic of
    every row, for introspection. `bytes` is the length of a whole shard, a multiple of 64.
    """

    graph: PackagePath
    graph_external: PackagePath | None = None
    graph_statistics: PackagePath | None = None
    tensors: tuple[TensorSpec, ...]
    bytes: Bytes
    scope: Literal["token", "sequence"] = "token"


class Layer(Struct, frozen=True, kw_only=True):
    """One MoE layer: how many experts it has and how many a token is routed to."""

    layer: Count
    kind: Name
    experts: PositiveCount
    top_k: PositiveCount


class Shard(Struct, frozen=True, kw_only=True, gc=False):
    """Where one expert's shard lies, and the sha256 of its `bytes` bytes from `offset`."""

    layer: Count
    expert: Count
    file: PackagePath
    offset: Bytes
    bytes: Bytes
    sha256: Sha256


class ValueSpec(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A plan's input or output.

    `default` fills an input the caller leaves out. `limit` is the exclusive upper bound of
    an integer input whose values are indices (token ids below the vocabulary size). `value`
    names the blackboard value an output is taken from, where that is not its own name (an
    output called like an input). `aliases` are other names a caller may give an input.
    `finite` asks a runtime to refuse an output that is not: see `StateSpec`.
    """

    dtype: DType
    shape: Dims
    default: float | None = None
    limit: PositiveCount | None = None
    value: Name | None = None
    aliases: tuple[Name, ...] = ()
    finite: Text | None = None


class StateSpec(Struct, frozen=True, kw_only=True):
    """A value carried from call to call.

    Of fixed shape, it is filled with `init` at the start. If its first dimension is a name
    (`"C"`), it grows: it starts with no rows, and the T rows a step writes are appended to
    it, up to `limit` rows in all. With `finite`, a call that would leave an infinity or NaN
    in it fails, and the state stays as it was; the text says what usually is the cause.
    A state `(1,)` i64 with `limit` counts tokens: each program adds T to it, and a call that
    would take it beyond `limit` fails before it begins.

    With `length` it is a buffer, of which one dimension, a name, is how many rows it has room
    for. `length` is a value `(1,)` i64 that a runtime puts on the blackboard: how many rows
    are filled, from the first on. A program's one graph step that writes the buffer reads it
    too, and gives it back in the same shape, the filled rows as they were and T new ones behind
    them; what comes after those means nothing. A runtime may give that step one memory for both.

    With `window` a new row needs only the last so many rows, itself included. A runtime may
    forget earlier ones, and move those that it keeps to the front.
    """

    dtype: DType
    shape: Dims
    init: float = 0.0
    finite: Text | UnsetType = UNSET
    limit: PositiveCount | UnsetType = UNSET
    length: Name | UnsetType = UNSET
    window: PositiveCount | UnsetType = UNSET

    @property
    def is_counter(self) -> bool:
        """Whether it counts tokens."""
        return not self.grows and bool(self.limit)  # unset counts as none

    @property
    def is_buffer(self) -> bool:
        """Whether it has room for rows that are not there yet."""
        return self.length is not UNSET

    @property
    def grows(self) -> bool:
        """Whether rows are appended to it, by the runtime or, in a buffer, by a graph."""
        return self.is_buffer or (bool(self.shape) and isinstance(self.shape[0], str))

    @property
    def axis(self) -> int:
        """The dimension along which it grows."""
        return next(axis for axis, dim in enumerate(self.shape) if isinstance(dim, str))

    @property
    def fixed(self) -> tuple[int, ...]:
        """The dimensions that do not grow."""
        return tuple(dim for dim in self.shape if not isinstance(dim, str))


class FusedExperts(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Experts unrolled inside a decode graph.

    For the token's `ids` `(1, top_k)` the runtime binds the tensors of expert `ids[0, i]`
    to the graph inputs `expert{i}.{tensor}`. `gates` `(1, top_k)` f32 is for statistics only.
    """

    layer: Count
    ids: Name
    gates: Name | None = None


class Pool(Struct, frozen=True, kw_only=True):
    """One tensor of all experts of a layer, stacked and in float32: `(experts, *shape)`."""

    layer: Count
    tensor: Name


class GraphStep(
    Struct, frozen=True, kw_only=True, omit_defaults=True, tag="graph", tag_field="step"
):
    """Run one graph. `inputs` and `outputs` map graph names to blackboard values.

    `weights` binds resident tensors as graph inputs, so that one graph can serve several
    layers; `pools` binds stacked experts (in pooled programs only). An output named like a
    state replaces that state for the next call: later steps of this one still read the old
    value, and only the plan's outputs see the new one.
    """

    graph: PackagePath
    inputs: dict[Name, Name]
    outputs: dict[Name, Name]
    weights: dict[Name, Name] = {}
    pools: dict[Name, Pool] = {}
    experts: FusedExperts | None = None


class ExpertsStep(
    Struct, frozen=True, kw_only=True, omit_defaults=True, tag="experts", tag_field="step"
):
    """`y = sum_i gates[:, i] * Expert[ids[:, i]](x)` for one layer.

    `x` `(T, d)`, `ids` `(T, top_k)` i64 and `gates` `(T, top_k)` f32 are blackboard values;
    `y` `(T, d)` is written. Contributions are added in ascending expert order. With
    `skips` an id of -1 stands for no expert; without, it is refused like any other stranger.
    A gate of exactly 0 needs no expert: it is neither read nor run for that token. `inputs`
    binds further values, whole, to the expert's graph; for `scope: sequence` only.
    """

    layer: Count
    x: Name
    ids: Name
    gates: Name
    y: Name
    skips: bool = False
    inputs: dict[Name, Name] = {}


Step: TypeAlias = GraphStep | ExpertsStep


class Guess(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A graph that guesses which experts the router of `layer` is about to choose, in decode.

    Its output `ids` is `(1, n)` i64, likeliest first; `inputs` and `weights` are as in a graph
    step, of values that decode has before it runs the layer's experts and that do not grow.
    A runtime may read these experts ahead, or ignore all guesses: nothing depends on them.
    """

    layer: Count
    graph: PackagePath
    inputs: dict[Name, Name]
    ids: Name
    weights: dict[Name, Name] = {}


class Router(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What introspection reads of one router, as values that prefill produces.

    `ids` `(T, top_k)` i64, best first, `gates` `(T, top_k)` f32, and `probabilities`
    `(T, experts)` f32. `names` labels the experts. A token's pathway is the labels of its
    experts, by index, joined with `+`; with every token the strength of its pathway grows by
    `rate`, then all strengths are multiplied by `decay` (specs/synapse.md, section 2.3).
    """

    layer: Count
    ids: Name
    gates: Name
    probabilities: Name
    names: tuple[Name, ...] = ()
    rate: float = 0.01
    decay: float = 0.999


class Pooled(Struct, frozen=True, kw_only=True):
    """The programs for a memory that holds every expert in float32: graphs over pools alone.

    They produce the router's choice under the names that `prefill` gives it.
    """

    prefill: tuple[GraphStep, ...]
    decode: tuple[GraphStep, ...]


class Plan(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The programs of a package; all compute the same function of their inputs.

    `pooled` is the same once more for a runtime that has room for it, within rounding.
    `observations` are values for introspection, which prefill alone produces; the steps that
    nothing else depends on run only when they are asked for.
    """

    inputs: dict[Name, ValueSpec]
    outputs: dict[Name, ValueSpec]
    state: dict[Name, StateSpec]
    prefill: tuple[Step, ...]
    decode: tuple[Step, ...]
    pooled: Pooled | None = None
    observations: dict[Name, ValueSpec] = {}
    routers: tuple[Router, ...] = ()
    guesses: tuple[Guess, ...] = ()

    @property
    def lengths(self) -> frozenset[str]:
        """The values that say how many rows of buffers are filled."""
        return frozenset(spec.length for spec in self.state.values() if spec.length)


class Variant(Struct, frozen=True, kw_only=True):
    """The same function through other graphs, which compute in half precision.

    `plan` and `kinds` (kind -> graph) take the place of the manifest's own: same inputs, outputs
    and layers, same shards and resident tensors, values between steps of f32, f16 or integers;
    bf16 only in buffers. A result is off by up to `tolerance` where it is held against the
    package's parity cases: the largest error of a token, relative to the output's largest
    magnitude, as the median over tokens; parts of them may be off by twice that (docs/format.md).
    """

    plan: Plan
    kinds: dict[Name, PackagePath]
    tolerance: Annotated[float, Meta(gt=0, le=MOST_TOLERANCE)]


class Parameters(Struct, frozen=True, kw_only=True):
    """Parameter counts: all of them, and those that one token uses."""

    total: Bytes
    active: Bytes


class Tokenizer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`bytes`: token id = byte value. `tokenizers`: a Hugging Face tokenizer.json in `file`.

    `chat_templates` are Jinja files by name; `default` is the one for plain messages, and
    `tool_use`, if there is one, for messages with tools. `special_tokens` (`bos_token`,
    `eos_token`, …) are what templates may write by these names.
    """

    kind: Literal["bytes", "tokenizers"]
    file: PackagePath | None = None
    chat_templates: dict[Name, PackagePath] = {}
    special_tokens: dict[Name, Text] = {}


class Generation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Defaults for generation; a caller's own values go first.

    `temperature` 0 is greedy. The others count only where tokens are drawn, except
    `repetition_penalty`, which divides the logits of tokens that were there (multiplies, where
    they are negative). `top_k` 0 keeps all tokens. An empty prompt begins with `bos_token`.
    """

    stop_tokens: tuple[Count, ...] = ()
    bos_token: Count | None = None
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    top_k: Count = 0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    max_new_tokens: PositiveCount = 64


class Card(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the model card says that the numbers cannot."""

    description: str = ""
    license: str | None = None
    author: str | None = None
    tags: tuple[str, ...] = ()
    training_summary: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()


class Manifest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole of manifest.json.

    `plan` and `kinds` compute in float32; `variants` has others by the dtype they compute in.
    """

    schema: Literal["evermind.package/1"]
    name: Name
    version: Name
    family: Name
    config: dict[str, Any]
    parameters: Parameters
    files: dict[PackagePath, FileEntry]
    kinds: dict[Name, Kind]
    layers: tuple[Layer, ...]
    shards: tuple[Shard, ...]
    plan: Plan
    variants: dict[Half, Variant] = {}
    requires: tuple[str, ...] = ()
    resident: PackagePath | None = None
    tokenizer: Tokenizer | None = None
    generation: Generation | None = None
    parity: PackagePath | None = None
    source: PackagePath | None = None
    card: Card | None = None
    created: str | None = None


class _Envelope(Struct, frozen=True):
    """The two fields that decide whether the rest may be read at all."""

    schema: str
    requires: tuple[str, ...] = ()


_ENVELOPE = msgspec.json.Decoder(_Envelope)
_MANIFEST = msgspec.json.Decoder(Manifest)
_ENCODER = msgspec.json.Encoder(order="sorted")


def parse_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and type-check the bytes of a manifest.json.

    Raises `UnsupportedError` for another schema or an unknown requirement, `ManifestError`
    for anything else: over 64 MiB, not UTF-8 JSON, a duplicate key, a wrong type or range.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{where}: expected at most {MAX_MANIFEST_BYTES:,} bytes, found {len(data):,}"
        )
    try:
        envelope = _ENVELOPE.decode(data)
        _check_envelope(envelope, where)
        manifest = _MANIFEST.decode(data)
        # msgspec keeps the last of two equal keys: a second reader may keep the first. What
        # encodes back to the same bytes has none, and is told so ten times as fast.
        if _ENCODER.encode(manifest) + b"\n" != data:
            json.loads(data, object_pairs_hook=unique_keys)
    except ManifestError:
        raise
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from error
    except RecursionError:
        raise ManifestError(f"{where}: nested too deeply to be a manifest") from None
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The one canonical encoding: keys sorted, no spaces, one newline at the end.

    Raises `ConfigError` for a number in `config` that JSON cannot hold.
    """
    _check_config(manifest.config)
    return _ENCODER.encode(manifest) + b"\n"


def package_digest(manifest_bytes: bytes) -> str:
    """A package's identity: the sha256 (hex) of its manifest.json."""
    return hashlib.sha256(manifest_bytes).hexdigest()


def _check_config(config: dict[str, Any]) -> None:
    pending: list[tuple[str, Any]] = [("config", config)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            pending += ((f"{place}.{key}", item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            pending += ((f"{place}[{number}]", item) for number, item in enumerate(value))
        elif isinstance(value, float) and not math.isfinite(value):
            # The encoder would write null.
            raise ConfigError(f"{place}: expected a finite number, found {value}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise ConfigError(
                f"{place}: expected a number of 64 bits, found one of {value.bit_length()}"
            )


def _check_envelope(envelope: _Envelope, where: str) -> None:
    if envelope.schema != SCHEMA:
        raise UnsupportedError(
            f"{where}: schema: expected {SCHEMA!r}, found {envelope.schema[:80]!r}",
            hint="The package was written for another version of evermind-pack.",
        )
    unknown = sorted(set(envelope.requires) - KNOWN_REQUIREMENTS)
    if unknown:
        raise UnsupportedError(
            f"{where}: requires: this version does not know {', '.join(map(repr, unknown[:5]))}",
            hint="Upgrade evermind-pack, or ask for a package without these features.",
        )
