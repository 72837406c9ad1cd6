"""A thread that prepares what comes next while the step is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs requests in a background thread, at most ``depth`` ahead, and gives their results in order.

    ``Prefetcher(lambda r: stage.take(*r), requests)``; an error in the thread is raised where its result is asked for.
    Use it in a ``with`` block, or call ``close``.
    """

    def __init__(self, work: Callable[..., T], requests: Iterable, depth: int = 2) -> None:
        self._results: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work, requests), daemon=True, name="prefetch")
        self._thread.start()

    def _run(self, work: Callable[..., T], requests: Iterable) -> None:
        try:
            for request in requests:
                if not self._put((work(request), None)):
                    return
            self._put((None, StopIteration()))
            # Stays until it is closed: with its OpenMP threads gone, libgomp lets the model's spin at every barrier,
            # and the last steps of a stage took 3 to 7 times as long on two busy cores.
            self._stop.wait()
        except BaseException as error:  # handed to the thread that waits for the result
            self._put((None, error))

    def _put(self, result: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        result, error = self._results.get()
        if error is not None:
            self.close()
            raise error
        return result

    def close(self) -> None:
        """Stop the thread; results that were ready are dropped."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=30)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_) -> None:
        self.close()
