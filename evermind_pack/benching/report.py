"""What rounds amount to: medians, the share of the bound, the forecast's error. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evermind_runtime.forecast import Forecast, bound, token_seconds
from evermind_runtime.machine import Machine
from evermind_runtime.sizes import ModelSizes

from .job import Round


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of several rounds' values, and the ends."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Report:
    """One budget's figures. Seconds and bytes; medians over the rounds where it says nothing else.

    `bound` is what this machine could do at most with these misses, and `share_of_bound` how
    much of that was reached. `off` is how far the measured speed lies outside the forecast's
    range, as a share of its nearer end (0 inside), `off_at_hit_rate` how far from the forecast
    for the hit rate that was measured: what then remains is the machine's part of the error.
    `off_first` and `off_rss` are `off` of `first_seconds` and `rss_bytes`. `forecast_disk_rate`
    is what the forecast took a miss to come at, the page cache's if `forecast_disk_how` is "warm".
    """

    name: str
    budget: int
    plan: str
    io: str
    tokens_per_second: Spread
    cpu_seconds_per_token: float
    first_seconds: float
    ttft_seconds: float
    load_seconds: float
    hit_rate: float
    bytes_per_token: float
    disk_bytes_per_token: float | None
    bound: float
    share_of_bound: float
    peak_expert_bytes: int
    rss_bytes: int | None
    rss_beyond: int | None
    forecast: Forecast
    forecast_at_hit_rate: float
    off: float
    off_at_hit_rate: float
    off_first: float
    off_rss: float | None
    forecast_disk_how: str
    forecast_disk_rate: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def report(
    name: str,
    rounds: Sequence[Round],
    predicted: Forecast,
    sizes: ModelSizes,
    machine: Machine,
    at_work: Machine,
) -> Report:
    """Sum up the rounds of one budget; each has decoded a token or more.

    `at_work` is the machine that `predicted` was made for: `machine`, or `machine.warm()` if
    the page cache was to give what is missed. The bound takes what came from a disk at the
    disk's rate and the rest of the misses at the page cache's. Where the system does not tell
    them apart, all of it came from the disk, or nothing if `at_work` is warm.
    """
    speeds = [one.decoded / one.decode_seconds for one in rounds]
    speed = statistics.median(speeds)
    hit_rate = _median(rounds, _hit_rate)
    bounds = [_bound(one, sizes, machine, warm=at_work.disk_how == "warm") for one in rounds]
    at_hit_rate = 1 / token_seconds(sizes, at_work, hit_rate)
    rss = [one.rss_bytes for one in rounds if one.rss_bytes is not None]
    peak = max(one.peak_expert_bytes for one in rounds)
    disk = [one.disk_bytes / one.decoded for one in rounds if one.disk_bytes is not None]
    return Report(
        name=name,
        budget=predicted.budget,
        plan=rounds[0].plan,
        io=rounds[0].io,
        tokens_per_second=Spread(speed, min(speeds), max(speeds)),
        cpu_seconds_per_token=_median(rounds, lambda one: one.cpu_seconds / one.decoded),
        first_seconds=_median(rounds, lambda one: one.first_seconds),
        ttft_seconds=_median(rounds, lambda one: one.ttft_seconds),
        load_seconds=_median(rounds, lambda one: one.load_seconds),
        hit_rate=hit_rate,
        bytes_per_token=_median(rounds, lambda one: one.bytes_read / one.decoded),
        disk_bytes_per_token=statistics.median(disk) if disk else None,
        bound=statistics.median(bounds),
        share_of_bound=statistics.median(
            reached / most for reached, most in zip(speeds, bounds, strict=True)
        ),
        peak_expert_bytes=peak,
        rss_bytes=max(rss) if rss else None,
        rss_beyond=max(rss) - rounds[0].resident_bytes - peak if rss else None,
        forecast=predicted,
        forecast_at_hit_rate=at_hit_rate,
        off=_outside(speed, predicted.tokens_per_second.even, predicted.tokens_per_second.skewed),
        off_at_hit_rate=speed / at_hit_rate - 1,
        off_first=_outside(
            _median(rounds, lambda one: one.first_seconds),
            predicted.ttft_seconds.even,
            predicted.ttft_seconds.skewed,
        ),
        off_rss=max(rss) / predicted.rss - 1 if rss else None,
        forecast_disk_how=at_work.disk_how,
        forecast_disk_rate=at_work.disk_rate,
        warnings=tuple(rounds[0].warnings),
    )


def same_tokens(results: Sequence[Sequence[Round]]) -> bool:
    """Whether every budget made the same tokens in the same round."""
    return all(
        len({tuple(one.tokens) for one in rounds}) == 1 for rounds in zip(*results, strict=True)
    )


def _bound(one: Round, sizes: ModelSizes, machine: Machine, *, warm: bool) -> float:
    guessed = 0 if warm else one.bytes_read
    # Read-ahead may fetch more than was asked for: no miss needs that.
    disk = min(one.bytes_read, guessed if one.disk_bytes is None else one.disk_bytes)
    seconds = disk / machine.disk_rate + (one.bytes_read - disk) / machine.cached_rate
    return bound(seconds / one.decoded, sizes.active_bytes, machine.memory_rate)


def _hit_rate(one: Round) -> float:
    needs = one.hits + one.misses
    return one.hits / needs if needs else 1.0


def _outside(value: float, one: float, other: float) -> float:
    low, high = sorted((one, other))
    nearer = min(max(value, low), high)
    return value / nearer - 1


def _median(rounds: Sequence[Round], figure: Callable[[Round], float]) -> float:
    return statistics.median(figure(one) for one in rounds)
