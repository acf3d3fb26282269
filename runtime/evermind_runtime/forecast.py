"""Will it run in this memory, and how fast: a forecast from sizes and measured rates. Pure.

Each figure is a range, from routing that chooses experts evenly to routing as skewed as
OLMoE's, unless a recorded trace says more. The formula and its inputs travel with it
(docs/planning.md), so that `bench` can say how far off it was and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from evermind_manifests.manifest import Manifest

from .arrays import PREFILL_CHUNK
from .machine import Machine
from .profile import Profile
from .replay import replay
from .sizes import ModelSizes, manifest_sizes
from .trace import Trace

# Measured on OLMoE-1B-7B (tests/fixtures/traces), policy `decayed`, from 6 to 75 % of the
# experts: the odds of a hit are 5.1 to 7.8 times those of even routing.
SKEW: Final = 5.7
# There, n tokens in a row use as many experts as n^0.7 that choose independently.
REPETITION: Final = 0.7
# What running costs beside arithmetic and reading, in small numpy calls (0.3 µs each on a
# quiet core), so that it follows the machine; measured as docs/planning.md says. For one token:
TOKEN_CALLS: Final = 400
# For each graph it runs, or where one graph does all layers over pools, for each layer:
GRAPH_RUN_CALLS: Final = 70
POOLED_LAYER_CALLS: Final = 40
# One page-in beside its read: bookkeeping, and binding what changed.
PAGE_IN_CALLS: Final = 110
# Making a graph's session, which the first request does, and opening a package, likewise.
SESSION_CALLS: Final = 9_000
LOAD_CALLS: Final = 100_000
# Beside weights and state (docs/architecture.md, "Memory").
OVERHEAD_BYTES: Final = 100 * 2**20
# What a recommended budget leaves of the memory: the page cache and everybody else need some.
HEADROOM: Final = 0.1

FORMULA: Final[Mapping[str, str]] = {
    "tokens_per_second": "1 / (max(4 * active_parameters, active_bytes) / memory_rate"
    " + bytes_per_token / disk_rate"
    f" + (fixed_calls + (1 - hit_rate) * uses * {PAGE_IN_CALLS}) * call_seconds)",
    "fixed_calls": f"{TOKEN_CALLS} + (graph_runs + more_runs) * {GRAPH_RUN_CALLS}"
    f" (over pools: {TOKEN_CALLS} + layers * {POOLED_LAYER_CALLS})",
    "bytes_per_token": "(1 - hit_rate) * cycle_bytes",
    "hit_rate": "min(share * odds / (share * odds + 1 - share), most), where share = budget /"
    f" all_expert_bytes, odds = 1 (even routing) to {SKEW} (routing as skewed as OLMoE's),"
    " most = (budget - step) / (cycle_bytes - step), step = cycle_bytes / layers,"
    " but 1 from cycle_bytes on; 1 with all experts resident; 0 below cycle_bytes with the policy"
    " lru; with a trace what its replay under the policy gives; with a profile, unless the policy"
    " is lru, at least min(what the hottest experts that fill the budget have of the uses, most)",
    "bound": "1 / max(bytes_per_token / disk_rate, active_bytes / memory_rate)",
    "load_seconds": "(resident_bytes + pooled_from) * (1 / disk_rate + 1 / sha256_rate)"
    f" + {LOAD_CALLS} * call_seconds",
    "ttft_seconds": f"(2 * graph_runs + 1) * {SESSION_CALLS} * call_seconds"
    " + prompt_expert_bytes * (1 / disk_rate + 1 / sha256_rate)"
    " + max(2 * (prompt_tokens - 1) * active_parameters / matmul_rate,"
    f" 4 * prompt_parameters / memory_rate) + prompt_graph_runs * {GRAPH_RUN_CALLS} * call_seconds"
    " + last_token_seconds",
    "last_token_seconds": "1 / tokens_per_second; of a prompt of one token, where no pools were"
    " filled, that with hit_rate = 0",
    "prompt_expert_bytes": "first * (1 + (chunks - 1) * (1 - share)), where first = the sum over"
    " layers of chosen * bytes, chosen = experts * (1 - (1 - top_k / experts) ** (choices /"
    f" chunks)), choices = prompt_tokens (even routing) to prompt_tokens ** {REPETITION} (skewed),"
    f" chunks = ceil((prompt_tokens - 1) / {PREFILL_CHUNK}); 0 over pools",
    "prompt_parameters": "chunks * (total_parameters - expert_parameters + all that are chosen *"
    " expert_parameters / all experts)",
    "prompt_graph_runs": "chunks * (all that are chosen + 2 * graph_runs)",
    "rss": "resident_bytes + min(budget, all_expert_bytes) + 2 * state_bytes"
    f" + {OVERHEAD_BYTES // 2**20} MiB",
    "state_bytes": "fixed + per_token * context + the sum over windows of row * min(context, rows)",
    "longest_context": "the most tokens with rss <= memory",
    "recommended_budget": f"the most whole experts with rss <= (1 - {HEADROOM}) * memory",
}
"""How each figure comes about, for people; the names are those of the inputs."""

Verdict: TypeAlias = Literal[
    "fits, all resident", "fits", "fits, but thrashes", "does not fit", "budget too small"
]


@dataclass(frozen=True, slots=True)
class Range:
    """A figure under even and under skewed routing; either may be the larger."""

    even: float
    skewed: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect of one budget. Bytes, seconds, tokens per second.

    `prompt_expert_bytes`, `prompt_parameters` and `prompt_graph_runs` are what the prompt but for
    its last token reads, multiplies and runs. `longest_context` is how many tokens `memory` holds,
    `None` if it or nothing bounds them.
    """

    budget: int
    share: float
    hit_rate: Range
    bytes_per_token: Range
    tokens_per_second: Range
    bound: Range
    load_seconds: float
    ttft_seconds: Range
    prompt_expert_bytes: Range
    prompt_parameters: Range
    prompt_graph_runs: Range
    rss: int
    memory: int | None
    longest_context: int | None
    verdict: Verdict

    @property
    def fits(self) -> bool:
        """Whether it runs at all in this memory."""
        return self.verdict not in ("does not fit", "budget too small")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"fits": self.fits}


def even_hit_rate(share: float) -> float:
    """Where every expert is as likely as any other: what is resident is the share that hits."""
    return min(1.0, max(0.0, share))


def skewed_hit_rate(share: float, skew: float = SKEW) -> float:
    """Where the odds of a hit are `skew` times those of even routing."""
    even = even_hit_rate(share)
    return even * skew / (even * skew + 1 - even)


def most_hits(sizes: ModelSizes, budget: int) -> float:
    """The share of hits that no policy exceeds, Belady's neither, with experts of equal size.

    Between two uses an expert of one layer sits through the steps of all others, beside what
    these pin: over a cycle, every step leaves `budget - step` bytes for the hits of the rest.
    """
    cycle = sizes.cycle_bytes
    if budget >= cycle:
        return 1.0
    step = cycle / len(sizes.layers)
    return max(0.0, (budget - step) / (cycle - step))


def expected_hit_rate(
    sizes: ModelSizes,
    budget: int,
    *,
    policy: str = "decayed",
    trace: Trace | None = None,
    profile: Profile | None = None,
) -> Range:
    """The share of expert uses found resident, once the cache is warm.

    A `trace` of this model is replayed under the policy, `pinned` with the `profile`. Otherwise a
    profile gives what its hottest experts would serve, as the lower end: not for `lru`, which
    knows no heat, and hits nothing below one token's cycle.
    """
    total = sizes.all_expert_bytes
    if budget >= total:
        return Range(1.0, 1.0)
    if budget < sizes.least_budget:
        return Range(0.0, 0.0)
    if trace is not None:
        rate = replay(trace, policy, budget, profile=profile).hit_rate
        return Range(rate, rate)
    if policy == "lru" and budget < sizes.cycle_bytes:
        return Range(0.0, 0.0)
    share = budget / total
    even, skewed = even_hit_rate(share), skewed_hit_rate(share)
    if profile is not None and policy != "lru":
        even = _hottest(sizes, budget, profile)
    most = most_hits(sizes, budget)
    return Range(min(even, most), min(max(even, skewed), most))


def thrash_warning(
    budget: int, manifest: Manifest, policy: str = "decayed", profile: Profile | None = None
) -> str:
    """A sentence for a budget under one token's cycle: the hit rate and the reads to expect."""
    sizes = manifest_sizes(manifest)
    cycle = sizes.cycle_bytes
    rate = expected_hit_rate(sizes, budget, policy=policy, profile=profile)
    hits, read = f"{rate.even:.0%}", f"{round((1 - rate.even) * cycle):,}"
    if rate.skewed > rate.even:
        hits += f" to {rate.skewed:.0%}"
        read = f"{round((1 - rate.skewed) * cycle):,} to {read}"
    return (
        f"the budget of {budget:,} bytes is below the {cycle:,} bytes of experts that one token "
        f"passes through: most are evicted before their layer comes round again, so expect "
        f"{hits} hits with the policy '{policy}', and {read} bytes to be read for every token"
    )


def forecast(
    sizes: ModelSizes,
    budget: int,
    machine: Machine,
    hit_rate: Range,
    *,
    prompt_tokens: int = 16,
    memory: int | None = None,
) -> Forecast:
    """What a budget (bytes; more than all experts is all of them) gives on this machine.

    `memory` is what the process may take, by default what the machine has available.
    """
    total = sizes.all_expert_bytes
    held = min(budget, total)
    if memory is None and machine.available is not None:
        memory = machine.available.bytes
    rss = process_bytes(sizes, held)
    even, skewed = (
        _prompt_work(sizes, held, prompt_tokens, choices)
        for choices in (float(prompt_tokens), prompt_tokens**REPETITION)
    )
    return Forecast(
        budget=held,
        share=held / total if total else 1.0,
        hit_rate=hit_rate,
        bytes_per_token=_each(hit_rate, lambda rate: (1 - rate) * sizes.cycle_bytes),
        tokens_per_second=_each(hit_rate, lambda rate: 1 / token_seconds(sizes, machine, rate)),
        bound=_each(
            hit_rate,
            lambda rate: bound(
                (1 - rate) * sizes.cycle_bytes / machine.disk_rate,
                sizes.active_bytes,
                machine.memory_rate,
            ),
        ),
        load_seconds=_load(sizes, machine),
        ttft_seconds=Range(
            _ttft(sizes, machine, even, hit_rate.even, prompt_tokens),
            _ttft(sizes, machine, skewed, hit_rate.skewed, prompt_tokens),
        ),
        prompt_expert_bytes=Range(even.expert_bytes, skewed.expert_bytes),
        prompt_parameters=Range(even.parameters, skewed.parameters),
        prompt_graph_runs=Range(even.graph_runs, skewed.graph_runs),
        rss=rss,
        memory=memory,
        longest_context=None if memory is None else longest_context(sizes, held, memory),
        verdict=_verdict(sizes, budget, rss, memory),
    )


def token_seconds(sizes: ModelSizes, machine: Machine, hit_rate: float) -> float:
    """One decoded token: computing, then reading what was not resident, then the graphs' cost.

    Half-precision weights are computed in float32, which takes as long as float32 weights
    take to read: hence 4 bytes a parameter.
    """
    compute = 4 * sizes.active_parameters / machine.memory_rate
    # Compute can never beat the bound's own share of it, however the weights are stored.
    compute = max(compute, sizes.active_bytes / machine.memory_rate)
    missed = 1 - hit_rate
    paging = missed * (
        sizes.cycle_bytes / machine.disk_rate + sizes.uses * PAGE_IN_CALLS * machine.call_seconds
    )
    return compute + paging + fixed_calls(sizes) * machine.call_seconds


def fixed_calls(sizes: ModelSizes) -> int:
    """What a token costs whatever its arithmetic and its misses, in small numpy calls."""
    if sizes.pooled_from:
        return TOKEN_CALLS + len(sizes.layers) * POOLED_LAYER_CALLS
    return TOKEN_CALLS + (sizes.graph_runs + sizes.more_runs) * GRAPH_RUN_CALLS


def bound(io_seconds: float, active_bytes: float, memory_rate: float) -> float:
    """Tokens per second that nothing can beat: reading and computing at once, both at full rate.

    `io_seconds` is what a token's misses take at the disk's rate.
    """
    return 1 / max(io_seconds, active_bytes / memory_rate, 1e-12)


def process_bytes(sizes: ModelSizes, budget: int) -> int:
    """What the process takes with that budget filled."""
    held = min(budget, sizes.all_expert_bytes)
    return sizes.resident_bytes + held + 2 * sizes.state_bytes + OVERHEAD_BYTES


def longest_context(sizes: ModelSizes, budget: int, memory: int) -> int | None:
    """How many tokens a sequence can have in this memory with that budget filled.

    `None` where that is as many as you like.
    """
    room = memory - process_bytes(sizes, budget) + 2 * sizes.state_bytes
    return sizes.state.tokens(room // 2)


def recommended_budget(sizes: ModelSizes, memory: int) -> int | None:
    """The largest budget of whole experts that this memory holds with a tenth of it to spare.

    `None` where not even one step's experts fit.
    """
    room = int(memory * (1 - HEADROOM)) - process_bytes(sizes, 0)
    slot = max((layer.bytes for layer in sizes.layers), default=1)
    budget = min(sizes.all_expert_bytes, room)
    budget -= budget % slot
    return budget if budget >= sizes.least_budget else None


def _verdict(sizes: ModelSizes, budget: int, rss: int, memory: int | None) -> Verdict:
    if budget < sizes.least_budget:
        return "budget too small"
    if memory is not None and rss > memory:
        return "does not fit"
    if budget >= sizes.all_expert_bytes:
        return "fits, all resident"
    return "fits" if budget >= sizes.cycle_bytes else "fits, but thrashes"


def _load(sizes: ModelSizes, machine: Machine) -> float:
    read = sizes.resident_bytes + sizes.pooled_from
    verified = read * (1 / machine.disk_rate + 1 / machine.sha256_rate)
    return verified + LOAD_CALLS * machine.call_seconds


@dataclass(frozen=True, slots=True)
class _PromptWork:
    """What a prompt but for its last token takes: bytes of experts read, parameters that are
    multiplied, graphs that run."""

    expert_bytes: float
    parameters: float
    graph_runs: float


def _prompt_work(sizes: ModelSizes, budget: int, tokens: int, choices: float) -> _PromptWork:
    """It runs expert by expert in chunks; `choices` is how many independent tokens would use as
    many experts."""
    chunks = math.ceil((tokens - 1) / PREFILL_CHUNK)
    if chunks <= 0:
        return _PromptWork(0.0, 0.0, 0.0)
    first = used = 0.0
    for layer in sizes.layers:
        chosen = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** (choices / chunks))
        used += chosen
        first += chosen * layer.bytes
    total = sizes.all_expert_bytes
    # What the budget holds of a chunk is there for the next; pools were filled by opening.
    read = first * (1 + (chunks - 1) * (1 - budget / total if total else 0.0))
    per_expert = sizes.expert_parameters / max(1, sum(one.experts for one in sizes.layers))
    trunk = sizes.total_parameters - sizes.expert_parameters
    return _PromptWork(
        0.0 if sizes.pooled_from else read,
        chunks * (used * per_expert + trunk),
        chunks * (used + 2 * sizes.graph_runs),
    )


def _ttft(
    sizes: ModelSizes, machine: Machine, prompt: _PromptWork, hit_rate: float, tokens: int
) -> float:
    """Seconds from a loaded model with nothing paged in to its first token."""
    compute = max(
        2 * max(0, tokens - 1) * sizes.active_parameters / machine.matmul_rate,
        4 * prompt.parameters / machine.memory_rate,
    )
    paging = prompt.expert_bytes * (1 / machine.disk_rate + 1 / machine.sha256_rate)
    # The last token finds what the prompt left; alone it reads its whole cycle.
    last = token_seconds(sizes, machine, hit_rate if tokens > 1 or sizes.pooled_from else 0.0)
    calls = (2 * sizes.graph_runs + 1) * SESSION_CALLS + prompt.graph_runs * GRAPH_RUN_CALLS
    return paging + compute + calls * machine.call_seconds + last


def _hottest(sizes: ModelSizes, budget: int, profile: Profile) -> float:
    """The share of uses that the hottest experts serve which fill the budget."""
    size = {layer.layer: layer.bytes for layer in sizes.layers}
    heat = {layer.layer: layer.uses for layer in profile.layers}
    weight = {layer.layer: layer.top_k for layer in sizes.layers}
    served = 0.0
    for layer, expert in profile.hottest():
        budget -= size[layer]
        if budget < 0:
            break
        served += weight[layer] * heat[layer][expert] / sum(heat[layer])
    return served / max(1, sum(weight.values()))


def _each(hit_rate: Range, figure: Callable[[float], float]) -> Range:
    return Range(figure(hit_rate.even), figure(hit_rate.skewed))
