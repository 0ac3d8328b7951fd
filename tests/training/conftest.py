"""A finished run that tests share: they copy it, or leave it as it is."""

from pathlib import Path

import jax
import pytest
from runs import tiny_config

from tinysft_jax.training import loop


@pytest.fixture
def not_from_disk():
    """What is compiled here is not stored, and so never loaded.

    A program for CPU with collectives over different groups of devices can hang once it comes from the cache: its
    devices then run them in different orders.
    """
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="session")
def finished_run(chat_data, tmp_path_factory) -> tuple[Path, tuple[int, int]]:
    """The work directory of a run of 12 steps, with the checkpoints 4, 8 and 12.

    With it, the numbers of programs that its train and its evaluation step were compiled to.
    """
    runs, finish = [], loop.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", lambda run, state: runs.append(run) or finish(run, state))
        loop.train(tiny_config(chat_data), tmp_path_factory.mktemp("run") / "work")
    steps = runs[0].steps
    # Private: nothing public counts them.
    return runs[0].workdir, (steps.train._cache_size(), steps.evaluate._cache_size())


@pytest.fixture(scope="session")
def finished(finished_run) -> Path:
    """Its work directory."""
    return finished_run[0]
