"""Maps a function over a stream with worker processes: in order, and with a bounded number of tasks in flight."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tinysft_jax.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yields `function(task)` for every task, in order; one worker means this process.

    The tasks are read no further ahead than keeps the workers busy (the standard library's `imap` and `map` read all
    of them at once). What `function` raises is raised here. Close the iterator to stop the workers early.

    Args:
      function: picklable, with picklable arguments and results.
      tasks: may be endless.
      workers: number of processes.

    Raises:
      RunError: if a worker dies.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    pending: deque[Future[Result]] = deque()
    # "spawn": a fork of a process with threads, as JAX has, can deadlock.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        for task in tasks:
            pending.append(_submit(executor, function, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RunError("a worker process died, perhaps for want of memory; try fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, function: Callable[[Task], Result], task: Task) -> Future[Result]:
    """Submits a task; workers that this starts inherit a blocked SIGINT, so Ctrl-C is this process's business alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(function, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In a worker: ends it when the parent is gone. It would wait for tasks forever, having the queue's other end."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
