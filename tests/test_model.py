import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import mesh_of
from tiers import slow

from tinysft_jax import accelerator
from tinysft_jax.console import UserError
from tinysft_jax.linear import Linear
from tinysft_jax.model import GPT, GPTConfig, embed, head_logits, rotary_angles, rotate, scans_layers

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
    padded = head_logits(model.hidden(random_tokens(2, 8)), model.tok_emb.embedding[...], 200)
    assert padded.shape == (2, 8, 256)
    assert np.all(np.asarray(jax.nn.softmax(padded)[..., 200:]) == 0)


def test_a_row_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="context is 512"):
        model(random_tokens(1, 513))


@pytest.mark.parametrize("remat", ["full", *slow("dots")])
def test_remat_changes_no_gradient(model, remat):
    tokens = random_tokens(2, 16)

    def gradients(model):
        return nnx.to_pure_dict(nnx.grad(lambda model: jnp.mean(jax.nn.logsumexp(model(tokens), axis=-1)))(model))

    rematerialised = GPT(CONFIG, rngs=nnx.Rngs(0), remat=remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients(model), gradients(rematerialised))


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


def test_rotary_positions_turn_the_halves_of_a_head_against_each_other():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 16)).astype(np.float32)
    positions = jnp.arange(5, dtype=jnp.int32)[None] + 100
    frequencies = CONFIG.rope_theta ** -(np.arange(8) / 8)
    expected = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * np.outer(np.arange(5) + 100, frequencies))[:, None]
    rotated = rotate(jnp.asarray(x), rotary_angles(positions, CONFIG))
    np.testing.assert_allclose(rotated, np.concatenate([expected.real, expected.imag], -1), atol=1e-4)


def test_bfloat16_computes_nearly_the_same():
    tokens = random_tokens(2, 16)
    full, half = (GPT(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)(tokens) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(full - half).max() < 0.02


def test_64_bit_mode_is_refused():
    """Its random numbers, and so the answers for a seed, would be others."""
    with jax.enable_x64(True), pytest.raises(UserError, match=r"64-bit mode .* turn it off"):
        GPT(GPTConfig(vocab_size=8, dim=8, n_layers=1, n_heads=2), rngs=nnx.Rngs(0))


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
    tokens = jnp.full((1, 4096), 3, jnp.int32)

    def total(embedding):
        return embed(tokens, embedding, jnp.bfloat16).astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros((128, 8)))[3], 4096.0)


def test_layers_are_a_loop_where_that_is_faster_or_saves_memory(monkeypatch):
    assert scans_layers("auto", "none", 12), "on a CPU"
    monkeypatch.setattr(accelerator, "is_present", lambda: True)
    assert [scans_layers("auto", remat, 12) for remat in ("none", "dots", "full")] == [False, True, True]
    assert scans_layers("auto", "none", 100), "compiled one by one, they would take minutes"
    assert scans_layers("on", "none", 12) and not scans_layers("off", "full", 100)
    for sizes, expected in (((1, 2, 1), True), ((2, 1, 1), False)):
        with jax.set_mesh(mesh_of(*sizes)):
            assert scans_layers("auto", "none", 12) == expected
