"""One tiny model for all of these tests: what costs time here is compiling, so shapes are few."""

import jax
import numpy as np
import pytest
from flax import nnx

from tinysft_jax.model import GPT, GPTConfig


@pytest.fixture(scope="session")
def model() -> GPT:
    """A model with random parameters, none trivial, sure enough of its tokens that round-off decides nothing.

    Its vocabulary is no multiple of 128 and its context no power of two.
    """
    model = GPT(GPTConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, max_seq_len=96), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), nnx.to_pure_dict(state)
    )
    return nnx.merge(graph, params)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Seven prompts of 1 to 30 tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 200, n).tolist() for n in (5, 1, 30, 12, 2, 21, 8)]
