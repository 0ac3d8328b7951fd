import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from flax import nnx
from runs import mesh_of
from tiers import slow
from tiny_model import OTHERS, SCALING, family, random_params

from tinysft_jax import accelerator
from tinysft_jax.console import UserError
from tinysft_jax.gpt_config import GPTConfig, RopeScaling
from tinysft_jax.linear import Linear
from tinysft_jax.model import (
    GPT,
    _head_norm,
    _norm,
    embed,
    fuse_projections,
    head_logits,
    rotary_angles,
    rotary_steps,
    rotate,
    scans_layers,
)
from tinysft_jax.parameters import count_parameters, make_model, pad_vocabulary, trim_vocabulary

CONFIG = GPTConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, max_seq_len=512)


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(CONFIG, rngs=nnx.Rngs(0))


def random_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, CONFIG.vocab_size, jnp.int32)


def check_changed(shape, change) -> None:
    """Only what the class itself checks: these tests also check annotations, and refuse wrong types before."""
    changed = copy.copy(shape)
    for name, value in change.items():
        object.__setattr__(changed, name, value)
    changed.__post_init__()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dim": 30, "n_heads": 4, "head_dim": 0}, "model.dim 30 is not divisible by model.n_heads 4"),
        ({"dim": 30, "head_dim": 0}, "head size 15 .* is odd"),
        ({"head_dim": 7}, "head size 7 .* is odd"),
        ({"head_dim": -2}, "head_dim"),
        ({"n_heads": 4, "n_kv_heads": 3}, "model.n_heads 4 is not divisible by model.n_kv_heads 3"),
        ({"n_kv_heads": 4}, "not divisible by model.n_kv_heads 4"),
        ({"n_kv_heads": 1.0}, "n_kv_heads"),
        ({"norm": "batch"}, "model.norm is 'batch'; it must be one of layer, rms"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"qk_norm": 1}, "model.qk_norm is 1; it must be true or false"),
        ({"tied_head": None}, "tied_head"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"n_layers": True}, "n_layers"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"mlp_ratio": 0.001}, "hidden"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        check_changed(CONFIG, change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"factor": 0.0}, "model.rope_scaling.factor"),
        ({"original_max_seq_len": 128.0}, "original_max_seq_len is 128.0; it must be a positive int"),
        ({"low_freq_factor": 4.0}, "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
    ],
)
def test_a_scaled_rotation_that_cannot_be_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        check_changed(SCALING, change)


def test_heads_that_are_not_given_follow_from_the_others():
    assert (CONFIG.n_kv_heads, CONFIG.head_dim, CONFIG.qkv_dims) == (2, 16, (32, 32, 32))
    assert family("qwen3").qkv_dims == (64, 16, 16)
    changed = dataclasses.replace(CONFIG, n_heads=4, n_kv_heads=0, head_dim=0)
    assert (changed.n_kv_heads, changed.head_dim) == (4, 8)


@pytest.mark.parametrize("name", ["default", "everything", *slow(*OTHERS)])
def test_each_familys_logits_are_those_of_the_formulas(name):
    config = family(name)
    params, tokens = random_params(config), random_tokens(1, 60)
    logits = jax.jit(lambda params: make_model(config, params)(tokens))(params)
    np.testing.assert_allclose(logits[0], numpy_gpt.logits(config, params, np.asarray(tokens[0])), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [
        ("default", 2 * (4 * 32**2 + 3 * 32 * 128 + 4 * 32) + 2 * 32 + 260 * 32),
        ("llama", 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 128 + 2 * 32) + 32 + 2 * 260 * 32),
        ("qwen2", 2 * (2 * 32**2 + 2 * (32 + 1) * 16 + 32 + 3 * 32 * 128 + 2 * 32) + 32 + 260 * 32),
        ("qwen3", 2 * (2 * 32 * 64 + 2 * 32 * 16 + 2 * 16 + 3 * 32 * 128 + 2 * 32) + 32 + 260 * 32),
    ],
)
def test_parameters_by_hand(name, n_parameters):
    assert count_parameters(family(name)) == n_parameters


def test_both_tables_of_an_untied_head_are_trimmed_and_padded():
    config = family("llama")
    params = random_params(config)
    trimmed = trim_vocabulary(params, config)
    padded = pad_vocabulary(trimmed, config)
    for table in ("tok_emb", "head"):
        assert trimmed[table]["embedding"].shape == (260, 32)
        np.testing.assert_array_equal(padded[table]["embedding"][:260], params[table]["embedding"][:260])
        assert padded[table]["embedding"].shape == (384, 32) and not padded[table]["embedding"][260:].any()


def test_logits_are_float32_and_of_real_tokens_only(model):
    logits = model(random_tokens(2, 8))
    assert logits.shape == (2, 8, 200) and logits.dtype == jnp.float32
    padded = head_logits(model.hidden(random_tokens(2, 8)), model.tok_emb.embedding[...], 200)
    assert padded.shape == (2, 8, 256)
    assert np.all(np.asarray(jax.nn.softmax(padded)[..., 200:]) == 0)


def test_a_row_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="context is 512"):
        model(random_tokens(1, 513))


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


@pytest.mark.parametrize("scaling", [None, SCALING, RopeScaling(4.0, 0.5, 8.0, 256)])
def test_rotary_positions_turn_the_halves_of_a_head_against_each_other(scaling):
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 16)).astype(np.float32)
    positions, config = np.arange(5, dtype=np.int32) + 100, dataclasses.replace(CONFIG, rope_scaling=scaling)
    np.testing.assert_allclose(1 / rotary_steps(config), numpy_gpt.frequencies(config), rtol=1e-5)
    rotated = rotate(jnp.asarray(x), rotary_angles(jnp.asarray(positions)[None], config))
    for head in range(2):
        expected = numpy_gpt.rotate(config, x[0, :, head], positions)
        np.testing.assert_allclose(rotated[0, :, head], expected, atol=1e-4)


def test_a_scaled_rotation_leaves_short_waves_alone_and_stretches_long_ones():
    config = family("llama")
    factors = rotary_steps(config) / rotary_steps(dataclasses.replace(config, rope_scaling=None))
    assert factors[0] == 1 and 1 < factors[1] < 8
    np.testing.assert_allclose(factors[2:], 8.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["default", *slow("everything", *OTHERS)])
def test_bfloat16_computes_nearly_the_same(name):
    tokens, params = random_tokens(2, 16), random_params(family(name), 0.02)
    full, half = (
        jax.jit(make_model(family(name), params, dtype=dtype).__call__)(tokens) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32
    assert 0 < np.abs(full - half).max() < 0.02


@pytest.mark.parametrize("name", ["everything", *slow("default", *OTHERS)])
def test_projections_side_by_side_are_what_they_were(name):
    """Of unequal widths, with and without biases."""
    layer = jax.tree.map(lambda leaf: leaf[0], random_params(family(name))["blocks"])
    fused = fuse_projections(layer)
    for part, whole, names in (("attn", "wqkv", ("wq", "wk", "wv")), ("mlp", "w13", ("w1", "w3"))):
        assert not fused[part].keys() & set(names) and fused[part].keys() - {whole} == layer[part].keys() - set(names)
        assert fused[part][whole].keys() == layer[part][names[0]].keys()
        for kind, array in fused[part][whole].items():
            separate = [layer[part][each][kind] for each in names]
            np.testing.assert_array_equal(array, np.concatenate(separate, axis=-1))


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
    graph, params = nnx.split(Linear(8, 4, bias=True, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (4096, 8), jnp.bfloat16)
    places = jax.random.normal(jax.random.key(2), (4096, 4), jnp.bfloat16)

    def total(params, x):
        return jnp.sum((places * nnx.merge(graph, params)(x)).astype(jnp.float32))

    d_params, d_x = jax.grad(total, argnums=(0, 1))(params, x)
    places = np.asarray(places, np.float64)
    np.testing.assert_allclose(d_params["kernel"][...], np.asarray(x, np.float64).T @ places, atol=1e-3)
    np.testing.assert_allclose(d_params["bias"][...], places.sum(axis=0), atol=1e-3)
    assert d_x.dtype == jnp.bfloat16
    kernel = np.asarray(params["kernel"][...].astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(d_x.astype(np.float32), places @ kernel.T, atol=2e-3)


@pytest.mark.parametrize("kind", ["layer", "rms", "head"])
def test_norms_take_part_in_float32(kind):
    """Their scales and biases are not rounded to what multiplies, nor are the gradients by these."""
    config = family("default" if kind == "layer" else "qwen3", dim=8, head_dim=8)
    graph, params = nnx.split((_head_norm if kind == "head" else _norm)(config, jnp.bfloat16, nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    x = jax.random.normal(jax.random.key(1), (4096, 8), jnp.bfloat16)
    places = jax.random.normal(jax.random.key(2), (4096, 8), jnp.bfloat16)
    out, pull = jax.vjp(lambda params: nnx.merge(graph, params)(x), params)
    (gradient,) = pull(places)
    values, places = np.asarray(x, np.float64), np.asarray(places, np.float64)
    if kind == "layer":
        values = values - values.mean(axis=-1, keepdims=True)
        np.testing.assert_allclose(gradient["bias"][...], places.sum(axis=0), atol=1e-3)
    normed = values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(gradient["scale"][...], (normed * places).sum(axis=0), atol=1e-3)
    assert out.dtype == jnp.bfloat16
    expected = normed * 1.001 + (0.001 if kind == "layer" else 0)
    off = np.asarray(out, np.float64) - expected
    assert np.abs(off / expected).max() < 2.0**-8, "one rounding, of the result"


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
