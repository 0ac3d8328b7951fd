"""`map_in_order`: maps a function over a stream with worker processes and a bounded number of tasks in flight."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, TypeVar

from tinysft_jax.console import RunError, explained

Task = TypeVar("Task")
Result = TypeVar("Result")

# In progress, or read ahead.
TASKS_PER_WORKER = 2

# A terminal or a batch system sends these to all processes of a command. Workers leave them to their parent.
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def usable_cpus() -> int:
    """The CPUs that this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yields `function(task)` for every task, in order; with one worker in this process.

    Tasks may be endless: they are read only as far ahead as keeps the workers busy. An error of `function` is raised
    here in its place. The workers end when the iterator ends or is closed, and when this process ends, even by SIGKILL.
    (A process pool of the standard library reads all tasks at once, and can hang when a worker is killed.)

    Raises: RunError, if a worker can't be started or dies.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    pool: dict[Connection, BaseProcess] = {}
    threads = ThreadPoolExecutor(workers, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, STOP_SIGNALS))
    try:
        # Signals are handled in the main thread only: in another thread, no start is interrupted halfway.
        with ThreadPoolExecutor(1) as starter:
            starter.submit(_start, pool, function, workers).result()
        idle: SimpleQueue[Connection] = SimpleQueue()
        for connection in pool:
            idle.put(connection)
        pending: deque[Future[Result]] = deque()
        for task in tasks:
            pending.append(threads.submit(_ask, idle, task))
            if len(pending) == TASKS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        with stop_signals_blocked():
            for process in pool.values():
                process.kill()
                process.join()
            threads.shutdown(cancel_futures=True)  # no thread waits for a process that has ended
            for connection in pool:
                connection.close()


def _start(pool: dict[Connection, BaseProcess], function: Callable[[Task], Result], workers: int) -> None:
    # "spawn": a fork of a process with threads, as JAX has, can deadlock.
    context = multiprocessing.get_context("spawn")
    with explained("can't start a worker process (try fewer --workers)", RunError):
        resource_tracker.ensure_running()  # its start unblocks signals
        with stop_signals_blocked():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                with theirs:
                    process = context.Process(target=_work, args=(theirs, function))
                    process.start()
                pool[ours] = process


def _work(connection: Connection, function: Callable[[Task], Result]) -> None:
    """In a worker: answers each task with (result, error), until the parent is gone."""
    while True:
        try:
            task = connection.recv()
        except Exception:  # the parent is gone, or the task can't be received
            return
        try:
            outcome = function(task), None
        except Exception as error:
            error.add_note(traceback.format_exc())  # the traceback itself can't be pickled
            outcome = None, error
        with contextlib.suppress(OSError):
            _send(connection, outcome)


def _ask(idle: SimpleQueue[Connection], task: Any) -> Any:
    """In a thread: has an idle worker do the task."""
    connection = idle.get()
    try:
        _send(connection, task)
        result, error = connection.recv()
    except (EOFError, OSError):  # a worker that dies, even in the middle of a message, breaks its pipe
        raise RunError("a worker process died, perhaps out of memory; try fewer --workers") from None
    finally:
        idle.put(connection)
    if error is not None:
        raise error
    return result


def _send(connection: Connection, message: object) -> None:
    # `connection.send` keeps a view of a buffer, and Python 3.12.1 can crash on one in the traceback of a broken pipe.
    connection.send_bytes(bytes(ForkingPickler.dumps(message)))


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes that are started in the block inherit the mask; this process's other threads still get the signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
