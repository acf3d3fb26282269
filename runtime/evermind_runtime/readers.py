"""The threads that read: started when first needed, asleep while there is nothing to do."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

# While one waits for the disk the other hashes; a third gains nothing (the disk is as fast
# with one request in flight as with eight).
COUNT = 2


class Readers:
    """Runs what it is handed, on `COUNT` threads. Forgotten without `close`, it closes itself.

    What runs must not raise. A sleeping thread starts 0.02 to 0.1 ms after `wake` (measured).
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _stop, self._work)

    def wake(self, work: Callable[[], None]) -> None:
        """Have a thread call `work` as soon as one is free. Not after `close`."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=_run, args=(self._work,), name="evermind-reader")
                for _ in range(COUNT)
            ]
            for thread in self._threads:
                # A model that nobody closed must not keep the process from ending.
                thread.daemon = True
                thread.start()
        self._work.put(work)

    def close(self) -> None:
        """End the threads, when what they run now is done."""
        _stop(self._work)
        for thread in self._threads:
            thread.join()


def _run(work: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := work.get()) is not None:
        call()
        # Its owner must not be kept alive by a sleeping thread.
        del call


def _stop(work: SimpleQueue[Callable[[], None] | None]) -> None:
    for _ in range(COUNT):
        work.put(None)
