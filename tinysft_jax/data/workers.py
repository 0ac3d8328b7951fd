"""Maps a function over a stream with worker processes: in order, and with a bounded number of tasks in flight."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from tinysft_jax.console import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

# One to do, and the next one at hand.
TASKS_PER_WORKER = 2

# What a terminal or a batch system sends to all processes of a command. Workers leave it to their parent.
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class _Worker(NamedTuple):
    """A process, and this process's end of the pipe to it."""

    process: BaseProcess
    connection: Connection


class _Outcome(NamedTuple):
    """What became of a task: a result, or the error that the function raised."""

    result: Any = None
    error: Exception | None = None


def usable_cpus() -> int:
    """The CPUs that this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yields `function(task)` for every task, in order; one worker means this process.

    The tasks are read no further ahead than keeps the workers busy (the standard library's `imap` and `map` read all
    of them at once). What `function` raises is raised here. The workers end when the iterator does or is closed, and
    when this process ends, however it does.

    Args:
      function: picklable, with picklable arguments, results and errors.
      tasks: may be endless.
      workers: number of processes.

    Raises:
      RunError: if a worker can't be started or dies.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    pool: list[_Worker] = []
    try:
        # Signals are handled in the main thread alone: in another one, no start can be interrupted halfway.
        with ThreadPoolExecutor(1) as starter:
            starter.submit(_start, pool, function, workers).result()
        yield from _results([worker.connection for worker in pool], tasks)
    finally:
        _end(pool)


def _start(pool: list[_Worker], function: Callable[[Task], Result], workers: int) -> None:
    """Adds workers to the pool as they start."""
    # "spawn": a fork of a process with threads, as JAX has, can deadlock.
    context = multiprocessing.get_context("spawn")
    try:
        resource_tracker.ensure_running()  # as it starts, it unblocks signals
        with stop_signals_blocked():  # which the workers inherit
            for _ in range(workers):
                ours, theirs = context.Pipe()
                with theirs:
                    process = context.Process(target=_work, args=(theirs, function))
                    process.start()
                pool.append(_Worker(process, ours))
    except OSError as error:
        raise RunError(f"can't start a worker process: {error.strerror}; try fewer --workers") from None


def _work(connection: Connection, function: Callable[[Task], Result]) -> None:
    """In a worker: answers each task with its outcome, until the parent is gone."""
    tasks: SimpleQueue[Task] = SimpleQueue()
    # Tasks are taken from the pipe at any time: the parent never waits to send one while this waits to send a result.
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    with contextlib.suppress(OSError):
        while True:
            _send(connection, _outcome(function, tasks.get()))


def _receive(connection: Connection, tasks: SimpleQueue[Task]) -> None:
    try:
        while True:
            tasks.put(connection.recv())
    finally:
        os._exit(1)  # the parent is gone, or there is no memory for the task


def _outcome(function: Callable[[Task], Result], task: Task) -> _Outcome:
    try:
        return _Outcome(function(task))
    except Exception as error:
        error.add_note(traceback.format_exc())  # the traceback itself can't travel
        return _Outcome(error=error)


def _send(connection: Connection, message: object) -> None:
    # `connection.send` keeps a view of a buffer, and Python 3.12.1 can crash on one in the traceback of a broken pipe.
    connection.send_bytes(bytes(ForkingPickler.dumps(message)))


def _results(connections: list[Connection], tasks: Iterable[Task]) -> Iterator[Any]:
    """Yields the results of the workers at the other ends, in the order of the tasks."""
    numbered = enumerate(tasks)
    given: dict[Connection, deque[int]] = {connection: deque() for connection in connections}
    outcomes: dict[int, _Outcome] = {}  # by number; some come before their turn
    for turn in itertools.count():
        for number, task in itertools.islice(numbered, 1 if turn else TASKS_PER_WORKER * len(connections)):
            connection = min(connections, key=lambda connection: len(given[connection]))
            given[connection].append(number)
            with _death_noticed():
                _send(connection, task)
        while busy := [connection for connection in connections if given[connection]]:
            ready = wait(busy, timeout=0 if turn in outcomes else None)
            if not ready:
                break
            for connection in ready:
                with _death_noticed():
                    outcomes[given[connection].popleft()] = connection.recv()
        if turn not in outcomes:
            return
        outcome = outcomes.pop(turn)
        if outcome.error is not None:
            raise outcome.error
        yield outcome.result


@contextlib.contextmanager
def _death_noticed() -> Iterator[None]:
    """For an exchange with a worker: when it dies, even amid a message, its pipe breaks."""
    try:
        yield
    except (EOFError, OSError):
        raise RunError("a worker process died, perhaps for want of memory; try fewer --workers") from None


def _end(pool: list[_Worker]) -> None:
    """Ends the workers at once: what they are at is not wanted any more."""
    with stop_signals_blocked():
        for worker in pool:
            worker.connection.close()
            worker.process.kill()
        for worker in pool:
            worker.process.join()


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """What is started in the block is born without a care for these signals; other threads of this process get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
