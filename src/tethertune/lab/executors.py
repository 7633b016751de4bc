"""Where runs are made: in this process, or in several.

An executor is a :class:`concurrent.futures.Executor`, which other libraries offer for clusters: a new one is one more
entry of :data:`EXECUTORS`.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

__all__ = ["EXECUTORS", "InProcess", "processes"]


class InProcess(Executor):
    """Makes each call when it is submitted, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Call now; the future is done when this returns, and holds the error if there was one."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)
        return future


def processes(workers: int) -> ProcessPoolExecutor:
    """A pool of new processes, which end when this one does, even if it is killed."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


EXECUTORS: dict[str, Callable[[int], Executor]] = {"local": lambda _: InProcess(), "processes": processes}
"""Name -> what makes the executor for a number of workers."""


def _end_with_parent() -> None:
    """End this process as soon as the one that made it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
