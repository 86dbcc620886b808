"""Work on small matrices side by side: a thread a core, in each of which torch has one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Workers:
    """As many threads as torch has, each with a scratch of its own and one thread of torch's; on a GPU this thread.

    Products of small matrices gain nothing from torch's threads, and no bit depends on how many of these there are.

    Parameters
    ----------
    scratch : makes what each thread has of its own. device : of the work; None: the CPU.
    """

    def __init__(self, scratch: Callable[[], Any] = lambda: None, device: torch.device | None = None) -> None:
        self._make, self._own, self._threads = scratch, threading.local(), torch.get_num_threads()
        several = (device is None or device.type == "cpu") and self._threads > 1
        self._pool = ThreadPoolExecutor(self._threads, initializer=self._start, initargs=(True,)) if several else None
        if not several:
            self._start(False)

    def _start(self, alone: bool) -> None:
        self._own.scratch = self._make()
        if alone:
            torch.set_num_threads(1)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)

    def map(self, work: Callable[[Any, Any], Any], values: Sequence[Any]) -> list[Any]:
        """What `work` returns of each value and a scratch."""
        return list((self._pool.map if self._pool else map)(lambda value: work(value, self._own.scratch), values))
