import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tinysft_jax.console import UserError
from tinysft_jax.model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, max_seq_len=512)


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(CONFIG, rngs=nnx.Rngs(0))


def random_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, CONFIG.vocab_size, jnp.int32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dim": 30, "n_heads": 4}, "not divisible"),
        ({"dim": 30, "n_heads": 10}, "odd"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"n_layers": True}, "n_layers"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"mlp_ratio": 0.001}, "hidden"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        dataclasses.replace(CONFIG, **change)


def test_logits_are_float32_and_of_real_tokens_only(model):
    logits = model(random_tokens(2, 8))
    assert logits.shape == (2, 8, 200) and logits.dtype == jnp.float32
    padded = model.logits(model.hidden(random_tokens(2, 8)))
    assert padded.shape == (2, 8, 256)
    assert np.all(np.asarray(jax.nn.softmax(padded)[..., 200:]) == 0)


def test_a_row_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="context is 512"):
        model(random_tokens(1, 513))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(model, remat):
    tokens = random_tokens(2, 16)

    def gradients(model):
        return nnx.to_pure_dict(nnx.grad(lambda model: jnp.mean(jax.nn.logsumexp(model(tokens), axis=-1)))(model))

    rematerialised = GPT(CONFIG, rngs=nnx.Rngs(0), remat=remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients(model), gradients(rematerialised))


def test_unstacked_layers_compute_the_same(model):
    tokens = random_tokens(2, 16)
    np.testing.assert_allclose(model(tokens), model.unstacked()(tokens), atol=1e-5)


@pytest.mark.parametrize("length", [40, 300])
def test_a_conversation_never_sees_its_row_neighbours(model, length):
    """Changing one segment leaves the others' logits as they were, within a block of queries and across blocks."""
    tokens = random_tokens(1, length)
    third = length // 3
    segments = jnp.minimum(jnp.arange(length) // third, 2)[None].astype(jnp.int32)
    positions = (jnp.arange(length)[None] - third * segments).astype(jnp.int32)
    middle = segments[0] == 1
    changed = jnp.where(middle[None], (tokens + 1) % CONFIG.vocab_size, tokens)
    before, after = model(tokens, segments, positions), model(changed, segments, positions)
    np.testing.assert_array_equal(before[0, ~middle], after[0, ~middle])
    assert np.abs(before - after)[0, middle].max() > 1e-3


def test_a_segment_in_a_row_is_as_if_alone(model):
    tokens = random_tokens(1, 30)
    segments = jnp.array([[1] * 10 + [2] * 20], jnp.int32)
    positions = jnp.concatenate([jnp.arange(10), jnp.arange(20)])[None].astype(jnp.int32)
    packed = model(tokens, segments, positions)
    np.testing.assert_allclose(packed[:, 10:], model(tokens[:, 10:]), atol=1e-5)


def test_bfloat16_computes_nearly_the_same():
    tokens = random_tokens(2, 16)
    full, half = (GPT(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)(tokens) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(full - half).max() < 0.02


def test_64_bit_mode_is_refused():
    """Its random numbers, and so the answers for a seed, would be others."""
    with jax.enable_x64(True), pytest.raises(UserError, match=r"64-bit mode .* turn it off"):
        GPT(GPTConfig(vocab_size=8, dim=8, n_layers=1, n_heads=2), rngs=nnx.Rngs(0))
