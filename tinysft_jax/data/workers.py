"""`map_in_order`: maps a function over a stream with worker processes and a bounded number of tasks in flight."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from tinysft_jax.console import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

# In progress, done before their turn, or read ahead.
TASKS_PER_WORKER = 2

# A terminal or a batch system sends these to all processes of a command. Workers leave them to their parent.
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def usable_cpus() -> int:
    """The CPUs that this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yields `function(task)` for every task, in order; with one worker in this process.

    Tasks are read only as far ahead as keeps the workers busy. An error of `function` is raised here in its place. The
    workers end when the iterator ends or is closed, and when this process ends, even by SIGKILL. (A process pool of
    the standard library reads all tasks at once, and can hang when a worker is killed in the middle of a message.)

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
    pool: dict[Connection, BaseProcess] = {}
    try:
        # Signals are handled in the main thread only: in another thread, no start is interrupted halfway.
        with ThreadPoolExecutor(1) as starter:
            starter.submit(_start, pool, function, workers).result()
        yield from _results(list(pool), tasks)
    finally:
        with stop_signals_blocked():
            for connection, process in pool.items():
                connection.close()
                process.kill()
                process.join()


def _start(pool: dict[Connection, BaseProcess], function: Callable[[Task], Result], workers: int) -> None:
    # "spawn": a fork of a process with threads, as JAX has, can deadlock.
    context = multiprocessing.get_context("spawn")
    try:
        resource_tracker.ensure_running()  # its start unblocks signals
        with stop_signals_blocked():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                with theirs:
                    process = context.Process(target=_work, args=(theirs, function))
                    process.start()
                pool[ours] = process
    except OSError as error:
        raise RunError(f"can't start a worker process: {error.strerror}; try fewer --workers") from None


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


def _send(connection: Connection, message: object) -> None:
    # `connection.send` keeps a view of a buffer, and Python 3.12.1 can crash on one in the traceback of a broken pipe.
    connection.send_bytes(bytes(ForkingPickler.dumps(message)))


def _results(connections: list[Connection], tasks: Iterable[Task]) -> Iterator[Any]:
    """Yields the results of the workers at the other ends, in the order of the tasks.

    A worker has one task at a time, so neither side waits to send while the other one does.
    """
    numbered, most = enumerate(tasks), TASKS_PER_WORKER * len(connections)
    waiting: deque[tuple[int, Task]] = deque()
    idle, busy = list(connections), {}  # busy: connection -> task number
    outcomes: dict[int, tuple[Any, Exception | None]] = {}  # by task number; some come before it is their turn
    for turn in itertools.count():
        while turn not in outcomes:
            with _death_noticed():
                while idle and waiting:
                    number, task = waiting.popleft()
                    _send(idle[-1], task)
                    busy[idle.pop()] = number
            waiting.extend(itertools.islice(numbered, most - len(waiting) - len(busy) - len(outcomes)))
            if idle and waiting:
                continue
            if not busy:
                return
            with _death_noticed():
                for connection in wait(list(busy)):
                    outcomes[busy.pop(connection)] = connection.recv()
                    idle.append(connection)
        result, error = outcomes.pop(turn)
        if error is not None:
            raise error
        yield result


@contextlib.contextmanager
def _death_noticed() -> Iterator[None]:
    """A worker that dies, even in the middle of a message, breaks its pipe."""
    try:
        yield
    except (EOFError, OSError):
        raise RunError("a worker process died, perhaps out of memory; try fewer --workers") from None


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes that are started in the block inherit the mask; this process's other threads still get the signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
