"""What `plan` and `bench` forecast for: a package, or a model known by its config only.

Of a package only the manifest is looked into (and its routing profile, where it has one), of a
Hugging Face model only `config.json`: no weight need be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from evermind_manifests.destination import is_package
from evermind_manifests.errors import InputError, LocationError
from evermind_manifests.location import read_head
from evermind_manifests.manifest import MANIFEST_NAME, Manifest
from evermind_manifests.package import Package
from evermind_runtime.arrays import PREFILL_CHUNK
from evermind_runtime.choose_plan import FETCHED_FIRST, PlanName, choose_plan
from evermind_runtime.choose_threads import suited_threads
from evermind_runtime.forecast import (
    FORMULA,
    GRAPH_RUN_CALLS,
    HEADROOM,
    LOAD_CALLS,
    OVERHEAD_BYTES,
    PAGE_IN_CALLS,
    POOLED_LAYER_CALLS,
    REPETITION,
    SESSION_CALLS,
    SKEW,
    TOKEN_CALLS,
    Forecast,
    expected_hit_rate,
    forecast,
)
from evermind_runtime.machine import Extent, Machine, measure_machine, shard_extents
from evermind_runtime.onnx_runtime import usable_cores
from evermind_runtime.openers import open_location
from evermind_runtime.profile import PROFILE_NAME, Profile, parse_profile, read_profile
from evermind_runtime.sizes import DEFAULT_CONTEXT, ModelSizes, manifest_sizes, pooled_sizes
from evermind_runtime.stores.options import RemoteOptions
from evermind_runtime.stores.urls import is_url
from evermind_runtime.trace import Trace, read_trace

CONFIG_NAME = "config.json"
ImportDType: TypeAlias = Literal["keep", "f16", "bf16", "f32"]
_OF_RUNNING = (
    *("hit_rate", "bytes_per_token", "tokens_per_second", "bound", "ttft_seconds"),
    *("prompt_expert_bytes", "prompt_parameters", "prompt_graph_runs"),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to forecast for. `extents` are its shards, where they lie on a disk here.

    `checkpoint_bytes` is what a model that is no package yet takes as a checkpoint, and
    `weights_here` what lies of that beside its config, `None` for a model on a hub. `unless` is
    why `load` leaves its pooled programs alone unless they are asked for, if so.
    """

    name: str
    family: str
    source: str
    sizes: ModelSizes
    folder: Path
    extents: tuple[Extent, ...] = ()
    manifest: Manifest | None = None
    profile: Profile | None = None
    checkpoint_bytes: int | None = None
    weights_here: int | None = None
    notes: tuple[str, ...] = ()
    unless: str | None = None

    @property
    def package_bytes(self) -> int:
        """About what its package takes on a disk."""
        return self.sizes.resident_bytes + self.sizes.all_expert_bytes

    def measure(self, threads: int | None = None) -> Machine:
        """This machine's figures, measured over the model's own files where it has some."""
        sizes = self.sizes
        if threads is None and self.manifest is not None:
            threads = suited_threads(self.manifest, usable_cores())
        return measure_machine(
            self.extents,
            self.folder,
            block=max((layer.bytes for layer in sizes.layers), default=2**20),
            working_set=sizes.resident_bytes + sizes.all_expert_bytes,
            threads=threads,
        )


@contextmanager
def open_subject(
    location: str,
    *,
    dtype: ImportDType = "keep",
    trunk: ImportDType | None = None,
    context: int | None = None,
    revision: str | None = None,
    remote: RemoteOptions | None = None,
) -> Iterator[Subject]:
    """What `location` is: a package in any form, a `config.json`, the folder it lies in, or the
    name of a model on a hub, of which `config.json` is fetched.

    `dtype` and `trunk` are for a config: what an import will be told of them; `context` is how
    many tokens a sequence has; `remote` says how a URL is read. Raises what opening a package,
    reading a config or fetching one raises, `InputError` for a `revision` of what is not on a hub.
    """
    path = Path(location)
    if not is_url(location):
        if _is_on_a_hub(location):
            from evermind_exporters.huggingface.hub import fetch_config

            config = fetch_config(location, revision)
            found = _config_subject(config, dtype, trunk, context)
            yield replace(found, name=location, folder=Path.cwd(), weights_here=None)
            return
        if revision is not None:
            raise InputError(
                f"--revision {revision}: {location} lies here, and has no revisions",
                hint="Give a name as org/name that is no path here.",
            )
        head = read_head(location, 1)
        if head is None and not is_package(path) and (path / CONFIG_NAME).is_file():
            path, head = path / CONFIG_NAME, b"{"
        elif path.is_dir() and not (path / MANIFEST_NAME).exists():
            from evermind_exporters.huggingface.misfits import without_config

            raise LocationError(
                f"{location}: expected a package, or a checkpoint's {CONFIG_NAME}, found neither",
                hint=without_config(path),
            )
        if head is not None and path.name == MANIFEST_NAME:
            location = str(path.parent)
        elif head == b"{":
            yield _config_subject(path, dtype, trunk, context)
            return
    with open_location(location, remote) as package:
        yield package_subject(package, context, here=not is_url(location))


def _is_on_a_hub(location: str) -> bool:
    if location.count("/") != 1:
        return False
    from evermind_exporters.huggingface.hub import is_model_id

    path = Path(location)
    return is_model_id(location) and not path.exists() and not path.parent.exists()


def package_subject(package: Package, context: int | None = None, *, here: bool = True) -> Subject:
    """A package as it lies; one that is not `here` has files that opening would fetch."""
    manifest = package.manifest
    sizes = manifest_sizes(manifest, context=context or DEFAULT_CONTEXT)
    profile = None
    if here and PROFILE_NAME in manifest.files:
        profile = parse_profile(package.read_file(PROFILE_NAME), sizes.layers, PROFILE_NAME)
    place = Path(package.location) if here else Path.cwd()
    return Subject(
        name=manifest.name,
        family=manifest.family,
        source="manifest",
        sizes=sizes,
        folder=place if place.is_dir() else place.parent,
        extents=tuple(shard_extents(package)) if here else (),
        manifest=manifest,
        profile=profile,
        notes=() if here else ("fetching it is not part of any figure",),
        unless=None if package.store.local else FETCHED_FIRST,
    )


def _weights_here(folder: Path) -> int:
    """Bytes of the checkpoint's weights that lie there; a hub's cache may have links to nothing."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors") if file.is_file())


def _config_subject(
    path: Path, dtype: ImportDType, trunk: ImportDType | None, context: int | None
) -> Subject:
    from evermind_exporters.huggingface import model_sizes

    counted = model_sizes(path, dtype=dtype, trunk=trunk, context=context)
    how = "kept as they are" if dtype == "keep" else f"stored as {dtype}"
    if trunk not in (None, dtype):
        how += f", all but the experts {'kept as they are' if trunk == 'keep' else f'as {trunk}'}"
    return Subject(
        name=path.resolve().parent.name,
        family=counted.model_type,
        source="config",
        sizes=counted.sizes,
        folder=path.resolve().parent,
        checkpoint_bytes=counted.checkpoint_bytes,
        weights_here=_weights_here(path.parent),
        notes=(
            f"weights {how}, the state of a sequence of {counted.context:,} tokens",
            *counted.notes,
        ),
    )


@dataclass(frozen=True, slots=True)
class Routing:
    """What tells the hit rate: a recorded trace, a profile of how hot experts are, or neither.

    `profile_from` says where the profile is from.
    """

    trace: Trace | None = None
    profile: Profile | None = None
    trace_from: str | None = None
    profile_from: str | None = None

    @property
    def kind(self) -> str:
        """What decides, as `--json` calls it."""
        if self.trace is not None:
            return "trace"
        return "model" if self.profile is None else "profile"

    @property
    def text(self) -> str:
        """The same for a person."""
        if self.trace is not None:
            return f"hit rates by replaying {self.trace_from}"
        heat = "" if self.profile is None else f", the lower end by {self.profile_from}"
        return f"ranges from even to skewed routing{heat}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"routing": self.kind, "trace": self.trace_from, "profile": self.profile_from}


def read_routing(
    subject: Subject, policy: str, trace: Path | None, profile: Path | None
) -> Routing:
    """The files a user named, or else the package's own profile where the policy heeds one.

    Raises `InputError` for files that cannot be read or had no effect, and for `pinned` without
    a profile.
    """
    layers = subject.sizes.layers
    if profile and policy == "lru":
        raise InputError("--profile has no meaning with --policy lru: it heeds no heat")
    if trace and profile and policy != "pinned":
        raise InputError("give either --trace or --profile: each says what the hit rate is")
    heat = None if policy == "lru" or (trace and policy != "pinned") else subject.profile
    heat_from = None if heat is None else f"the package's own {PROFILE_NAME}"
    if profile:
        heat, heat_from = read_profile(profile, layers), str(profile)
    if policy == "pinned" and layers and heat is None:
        raise InputError(
            "--policy pinned needs a routing profile, and the package has none: expected --profile"
        )
    record = read_trace(trace).of(layers, str(trace)) if trace else None
    return Routing(record, heat, str(trace) if trace else None, heat_from)


NO_ROUTING = Routing()


@dataclass(frozen=True, slots=True)
class Prediction:
    """A forecast, the plan that `load` would take for it, and the sizes under that plan.

    `plan` is nothing for a model that is no package yet, or a budget that no plan can work with.
    """

    plan: str | None
    forecast: Forecast
    sizes: ModelSizes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what never runs has no speed."""
        values = {"plan": self.plan, **self.forecast.to_dict()}
        return values if self.runs else values | dict.fromkeys(_OF_RUNNING)

    @property
    def runs(self) -> bool:
        """Whether the budget holds at least one step's experts."""
        return self.forecast.verdict != "budget too small"


def predict(
    subject: Subject,
    budget: int | None,
    machine: Machine,
    *,
    plan: PlanName = "auto",
    policy: str = "decayed",
    routing: Routing = NO_ROUTING,
    prompt_tokens: int,
    memory: int | None,
) -> Prediction:
    """What `load` with this budget (`None`: none) and plan would do.

    Raises `BudgetError` or `UnsupportedError` for a plan that cannot be had.
    """
    sizes, chosen = subject.sizes, None
    too_small = budget is not None and budget < sizes.least_budget
    if subject.manifest is not None and not too_small:
        chosen = choose_plan(plan, subject.manifest, budget, "cpu", memory, subject.unless).name
        if chosen == "resident":
            sizes = pooled_sizes(subject.manifest, sizes)
            budget = None
    held = sizes.all_expert_bytes if budget is None else budget
    rate = expected_hit_rate(
        sizes, held, policy=policy, trace=routing.trace, profile=routing.profile
    )
    figures = forecast(sizes, held, machine, rate, prompt_tokens=prompt_tokens, memory=memory)
    return Prediction(chosen, figures, sizes)


def standard_budgets(sizes: ModelSizes) -> dict[str, int | None]:
    """The budgets worth comparing, smallest first; two that are the same stand together.

    `all` is no budget at all, which leaves it to `load` how to hold them.
    """
    total = sizes.all_expert_bytes
    if total == 0:
        return {"no experts": None}
    slot = slot_bytes_of(sizes)
    named = {
        "least": sizes.least_budget,
        "one token's cycle": sizes.cycle_bytes,
        "25%": total // 4,
        "50%": total // 2,
    }
    by_size: dict[int, list[str]] = {}
    for name, size in sorted(named.items(), key=lambda item: item[1]):
        if sizes.least_budget <= size < total:
            by_size.setdefault(size - size % slot, []).append(name)
    return {", ".join(names): size for size, names in by_size.items()} | {"all": None}


def slot_bytes_of(sizes: ModelSizes) -> int:
    """What one expert takes."""
    return max((layer.bytes for layer in sizes.layers), default=1)


def method() -> dict[str, Any]:
    """How a forecast comes about: the formula, and the constants in it."""
    return {
        "formula": dict(FORMULA),
        "constants": {
            "skew": SKEW,
            "repetition": REPETITION,
            "token_calls": TOKEN_CALLS,
            "graph_run_calls": GRAPH_RUN_CALLS,
            "pooled_layer_calls": POOLED_LAYER_CALLS,
            "page_in_calls": PAGE_IN_CALLS,
            "session_calls": SESSION_CALLS,
            "load_calls": LOAD_CALLS,
            "overhead_bytes": OVERHEAD_BYTES,
            "prefill_chunk": PREFILL_CHUNK,
            "headroom": HEADROOM,
        },
    }
