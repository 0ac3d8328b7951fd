"""Mapping over a stream with worker processes."""

import itertools
import multiprocessing
import operator
import os
import signal
import threading
import time

import pytest

from tinysft_jax.console import RunError, UserError
from tinysft_jax.data.workers import map_in_order


def reject(number: int) -> int:
    """Fails for 3, as a malformed item does."""
    if number == 3:
        raise UserError("3 is malformed")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_from_an_endless_stream(workers):
    results = map_in_order(operator.neg, itertools.count(), workers)
    assert list(itertools.islice(results, 50)) == [-i for i in range(50)]
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_read_no_further_ahead_than_keeps_the_workers_busy(workers):
    tasks = iter(range(1000))
    results = map_in_order(operator.neg, tasks, workers)
    next(results)
    results.close()
    assert next(tasks) <= 1 + 2 * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_the_function_arrive_in_their_place(workers):
    results = map_in_order(reject, range(10), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="3 is malformed"):
        next(results)


class Fatal:
    """Ends the process that it is sent to, or can't be received there."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "task"),
    [(os._exit, 1), (operator.neg, Fatal(os._exit, (1,))), (operator.neg, Fatal(int, ("no number",)))],
    ids=["at work", "receiving", "unable to receive"],
)
def test_a_worker_that_dies_ends_the_run(function, task):
    with pytest.raises(RunError, match="a worker process died"):
        list(map_in_order(function, [task], 2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("n_bytes", [1, 8 << 20], ids=["small", "large"])
@pytest.mark.parametrize("first", ["before its first task", "after"])
def test_a_worker_that_is_killed_ends_the_run_whatever_it_and_the_parent_are_at(n_bytes, first):
    """One of two workers that stand still: the parent is sending to it, or waits for it."""

    def kill() -> None:
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        for child in children:
            os.kill(child.pid, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(children[0].pid, signal.SIGKILL)
        os.kill(children[1].pid, signal.SIGCONT)

    killer = threading.Thread(target=kill)
    results = map_in_order(len, itertools.repeat(bytes(n_bytes)), 2)
    if first == "after":
        next(results)
    killer.start()
    with pytest.raises(RunError, match="a worker process died"):
        for _ in results:
            pass
    killer.join()
    assert not multiprocessing.active_children()


def test_workers_end_at_once_with_an_iterator_that_is_closed():
    results = map_in_order(time.sleep, [0, 30, 30], 2)
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 10 and not multiprocessing.active_children()
