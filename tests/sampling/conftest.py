"""One tiny model for all of these tests: what costs time here is compiling, so shapes are few."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
from tiny_model import family, random_model

from tinysft_jax.model import GPT


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], GPT]:
    """A model of a family with random parameters, none trivial, so sure of its tokens that round-off decides nothing.

    Its vocabulary is no multiple of 128 and its context no power of two.
    """
    return functools.cache(lambda name: random_model(family(name, vocab_size=200, max_seq_len=96), 0.3))


@pytest.fixture(scope="session")
def model(model_of) -> GPT:
    return model_of("default")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Seven prompts of 1 to 30 tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 200, n).tolist() for n in (5, 1, 30, 12, 2, 21, 8)]
