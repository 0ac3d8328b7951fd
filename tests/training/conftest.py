"""A finished run that tests share: they copy it, or leave it as it is."""

from pathlib import Path

import pytest
from runs import tiny_config

from tinysft_jax.training import loop


@pytest.fixture(scope="session")
def finished_run(chat_data, tmp_path_factory) -> loop.Run:
    """A run of 12 steps, with the checkpoints 4, 8 and 12."""
    runs, finish = [], loop.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", lambda run, state: runs.append(run) or finish(run, state))
        loop.train(tiny_config(chat_data), tmp_path_factory.mktemp("run") / "work")
    return runs[0]


@pytest.fixture(scope="session")
def finished(finished_run) -> Path:
    """Its work directory."""
    return finished_run.workdir
