import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tinysft_jax.model import head_logits
from tinysft_jax.sharding import batch_sharding, make_mesh, spec
from tinysft_jax.training import loss
from tinysft_jax.training.loss import Softmax, supervised_nll, token_nll

VOCAB = 300


def plain_nll(hidden, table, targets, weights):
    """All logits at once, as the formula says."""
    log_p = jax.nn.log_softmax(head_logits(hidden, table, VOCAB))
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])


def inputs(weights):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (*weights.shape, 32))
    table = jax.random.normal(keys[1], (384, 32))
    return hidden, table, jax.random.randint(keys[2], weights.shape, 0, VOCAB, jnp.int32), jnp.asarray(weights)


def some_weights(case: str) -> np.ndarray:
    weights = np.float32(np.random.default_rng(0).random((8, 64)) < 0.3)
    weights[3] = 0  # a row, and with one row a shard a whole shard, without any target
    weights[4] = 1
    return {"mixed": weights, "none": 0 * weights, "all": weights**0, "fractional": weights * 0.7}[case]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 48)  # several chunks, none of which divides the positions evenly


def assert_equal_to_plain(compute, arguments):
    value, gradients = compute(*arguments)
    expected, expected_gradients = jax.value_and_grad(plain_nll, argnums=(0, 1))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=2e-5)


@pytest.mark.parametrize("case", ["mixed", "none", "all", "fractional"])
def test_loss_and_gradients_equal_the_plain_formula(case):
    arguments = inputs(some_weights(case))
    compute = jax.jit(jax.value_and_grad(lambda *a: supervised_nll(*a, VOCAB), argnums=(0, 1)))
    assert_equal_to_plain(compute, arguments)
    np.testing.assert_allclose(supervised_nll(*arguments, VOCAB), plain_nll(*arguments), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_any_mesh_gives_the_same(sizes):
    mesh = make_mesh(*sizes)
    rows, table_sharding = batch_sharding(mesh), NamedSharding(mesh, spec("vocab", "embed"))
    arguments = inputs(some_weights("mixed"))
    placed = jax.device_put(arguments, (rows, table_sharding, rows, rows))
    with jax.set_mesh(mesh):
        compute = jax.jit(jax.value_and_grad(lambda *a: supervised_nll(*a, VOCAB), argnums=(0, 1)))
        value, gradients = compute(*placed)
    assert_equal_to_plain(lambda *_: (value, jax.device_get(gradients)), arguments)


@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (2, 2, 2)])
def test_each_position_has_its_own_loss_and_gradient(sizes):
    """Of any function of them: here with random factors, some of which are 0."""
    hidden, table, targets, weights = arguments = inputs(some_weights("fractional"))
    factors = np.random.default_rng(1).normal(size=weights.shape).astype(np.float32)
    factors[:, ::3] = 0

    def weighted(function, *arguments):
        return jnp.sum(jnp.square(function(*arguments)) * factors)

    def each(hidden, table):
        return token_nll(hidden, table, targets, weights, Softmax(VOCAB))

    def plainly(hidden, table):
        log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, table[:VOCAB], precision="highest"))
        return -weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]

    with jax.set_mesh(make_mesh(*sizes)) if sizes else contextlib.nullcontext():
        values = jax.jit(each)(hidden, table)
        gradients = jax.jit(jax.grad(functools.partial(weighted, each), argnums=(0, 1)))(hidden, table)
    np.testing.assert_allclose(values, plainly(hidden, table), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values.sum(), supervised_nll(*arguments, VOCAB), rtol=1e-6)
    expected = jax.grad(functools.partial(weighted, plainly), argnums=(0, 1))(hidden, table)
    for gradient, plain in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(jax.device_get(gradient), plain, atol=1e-3)  # some are above 100


def test_cost_follows_the_supervised_tokens():
    """The loop over chunks turns as often as supervised positions need, which is what the compiled program counts."""
    turns = []

    def add(carry, _):
        jax.debug.callback(lambda: turns.append(1))
        return carry

    for n_supervised, chunks in ((0, 0), (1, 1), (48, 1), (49, 2), (512, 11)):
        turns.clear()
        weights = np.zeros(512, np.float32)
        weights[:n_supervised] = 1
        hidden, _, targets, weights = inputs(np.random.default_rng(0).permutation(weights).reshape(8, 64))
        loss._over_chunks(add, 0, hidden, targets, weights)
        jax.effects_barrier()
        assert len(turns) == chunks
