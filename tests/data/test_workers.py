"""Mapping over a stream with worker processes."""

import itertools
import operator
import os

import pytest

from tinysft_jax.data.workers import map_in_order
from tinysft_jax.errors import RunError, UserError


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


def test_a_worker_that_dies_ends_the_run():
    with pytest.raises(RunError, match="a worker process died"):
        list(map_in_order(os._exit, [1], 2))
