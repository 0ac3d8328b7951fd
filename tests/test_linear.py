"""Sums over positions in half precision: what bfloat16 would lose."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinysft_jax.model import GPT, GPTConfig, Linear


def test_a_layer_multiplies_in_its_inputs_precision():
    layer = Linear(8, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (3, 8))
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(layer(x), x @ layer.kernel[...], rtol=1e-6)


def test_gradients_by_weights_are_summed_in_float32():
    """As products of what was rounded, and no rounder: bfloat16 would keep 3 of 7 digits."""
    graph, params = nnx.split(Linear(8, 4, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (4096, 8), jnp.bfloat16)
    places = jax.random.normal(jax.random.key(2), (4096, 4), jnp.bfloat16)

    def total(params, x):
        return jnp.sum((places * nnx.merge(graph, params)(x)).astype(jnp.float32))

    d_params, d_x = jax.grad(total, argnums=(0, 1))(params, x)
    expected = np.asarray(x, np.float64).T @ np.asarray(places, np.float64)
    np.testing.assert_allclose(d_params["kernel"][...], expected, atol=1e-3)
    assert d_x.dtype == jnp.bfloat16
    kernel = np.asarray(params["kernel"][...].astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(d_x.astype(np.float32), np.asarray(places, np.float64) @ kernel.T, atol=2e-3)


def test_a_frequent_tokens_row_gathers_all_its_gradient():
    """Four thousand equal small parts: in bfloat16 a sum stops growing where a part is below its last digit."""
    config = GPTConfig(vocab_size=16, dim=8, n_layers=1, n_heads=2, max_seq_len=4096)
    graph, params = nnx.split(GPT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    tokens = jnp.full((1, 4096), 3, jnp.int32)

    def total(params):
        return jnp.sum(nnx.merge(graph, params)._embed(tokens).astype(jnp.float32))

    gradient = jax.grad(total)(params)["tok_emb"]["embedding"][...]
    np.testing.assert_array_equal(gradient[3], 4096.0)
