"""What the pager counts, and the reads it hands from thread to thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from .devices import Slot
from .policies import ExpertKey


@dataclass(slots=True)
class PagerCounters:
    """What has happened so far. Bytes are as read from the store, times in seconds."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    #: Summed over reads; several may run at once.
    read_seconds: float = 0.0
    #: What callers spent until the experts they missed were there, whoever read them.
    wait_seconds: float = 0.0
    #: Experts read on a guess, those of them that were needed, and the bytes of the others.
    prefetches: int = 0
    prefetches_used: int = 0
    prefetch_wasted_bytes: int = 0


@dataclass(slots=True)
class ExpertPages:
    """What has happened to one expert so far."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0


class Job:
    """One read into slots, which it pins until it is done. Guarded by the pager's lock."""

    __slots__ = (
        "cancelled",
        "claimed",
        "done",
        "error",
        "gates",
        "guess",
        "keys",
        "left",
        "read",
        "slots",
        "thread",
        "wanted",
    )

    def __init__(
        self, keys: list[ExpertKey], slots: list[Slot], *, wanted: bool, guess: bool = False
    ) -> None:
        #: Whether a step waits for it; else it is read ahead, and may be given up.
        self.wanted = wanted
        #: Whether it is read on a guess: with what the disk can spare, in pieces.
        self.guess = guess
        self.keys = keys
        self.slots = slots
        #: Bytes read so far, by key.
        self.read = [0] * len(keys)
        #: What it had to read besides, each expert a job that a reader may do.
        self.left: list[Job] = []
        #: Whether a thread has begun with it; `thread` is that one, or who made it.
        self.claimed = False
        self.thread = threading.get_ident()
        self.cancelled = False
        self.done = False
        self.error: BaseException | None = None
        #: Held locks of callers that wait; released when it is done.
        self.gates: list[threading.Lock] = []


def make_gate(gates: list[threading.Lock]) -> threading.Lock:
    """A held lock in `gates`: whoever opens them lets its next `acquire` through."""
    gate = threading.Lock()
    gate.acquire()
    gates.append(gate)
    return gate


def open_gates(gates: list[threading.Lock]) -> None:
    """Let all who wait at them go on."""
    while gates:
        gate = gates.pop()
        # One that waited in vain for a while may hold it no more.
        if gate.locked():
            gate.release()
