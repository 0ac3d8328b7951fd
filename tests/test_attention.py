"""Attention within segments, against softmax written out, and what its blocks leave out."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import mesh_of
from tiers import slow

from tinysft_jax import accelerator
from tinysft_jax.attention import backends, tokamax
from tinysft_jax.attention import blocks as block_attention
from tinysft_jax.attention.backends import TOLERANCE, choose_backend, relative_errors, segment_attention
from tinysft_jax.attention.tokamax import segment_starts, tokamax_attention
from tinysft_jax.console import UserError


def random_qkv(*shape: int) -> list[jax.Array]:
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]


def plain_attention(q, k, v, segments):
    """Softmax over the earlier positions of a query's segment, the whole square at once."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    visible = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(q.shape[1], dtype=bool)[None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def rows_of_segments(length: int) -> st.SearchStrategy[np.ndarray]:
    """Two packed rows: conversations side by side, then padding."""

    def lay_out(parts: list[int]) -> np.ndarray:
        ids = np.repeat(np.arange(1, len(parts) + 1), parts)[:length]
        return np.pad(ids, (0, length - len(ids))).astype(np.int32)

    row = st.lists(st.integers(1, length), max_size=6).map(lay_out)
    return st.lists(row, min_size=2, max_size=2).map(np.stack)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, segments):
    """Of a sum in which each entry of the output counts differently."""
    places = jax.random.normal(jax.random.key(9), q.shape)
    return jax.value_and_grad(lambda q, k, v: jnp.sum(places * attend(q, k, v, segments)), argnums=(0, 1, 2))(q, k, v)


def check_against_the_formula(segments: np.ndarray, attend=segment_attention) -> None:
    """Output and gradients."""
    qkv, segments = random_qkv(*segments.shape, 2, 4), jnp.asarray(segments, jnp.int32)
    np.testing.assert_allclose(attend(*qkv, segments), plain_attention(*qkv, segments), atol=2e-6)
    ours, plain = (value_and_gradients(function, *qkv, segments) for function in (attend, plain_attention))
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-4)
    for gradient, expected in zip(ours[1], plain[1], strict=True):
        np.testing.assert_allclose(gradient, expected, atol=2e-5)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_attention, "BLOCK", 8)


@settings(max_examples=25)
@given(rows_of_segments(40))
def test_blocks_equal_the_formula(segments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", 8)
        check_against_the_formula(segments)


@pytest.mark.parametrize("length", [5, *slow(8, 13, 300)])
def test_rows_of_any_length(length):
    """Shorter than a block, and not a multiple of one."""
    check_against_the_formula(np.stack([np.arange(length) // 170, np.arange(length) // 3]))


@pytest.mark.slow
def test_segments_in_any_order(small_blocks):
    """Ids that come back, fall, or interleave: more blocks are visited, none too few."""
    positions = np.arange(40)
    rows = [positions % 3, 7 - positions // 6, np.where(positions // 10 == 2, 0, 5)]
    check_against_the_formula(np.stack(rows))


def test_large_scores_overflow_nowhere(small_blocks):
    q, k, v = random_qkv(1, 24, 1, 4)
    segments = jnp.repeat(jnp.array([[1, 2, 3]]), 8, axis=1)
    out = segment_attention(1e4 * q, 1e4 * k, v, segments)
    np.testing.assert_allclose(out, plain_attention(1e4 * q, 1e4 * k, v, segments), atol=1e-5)


def test_blocks_of_other_segments_are_not_visited(small_blocks):
    row = np.repeat([1, 2, 3, 0], [10, 12, 6, 12]).astype(np.int32)
    blocks = row.reshape(5, 1, 8)
    assert block_attention.first_key_blocks(jnp.asarray(blocks)).tolist() == [0, 0, 1, 2, 3]
    # Another row that is one conversation needs all of them.
    both = np.concatenate([blocks, np.ones_like(blocks)], axis=1)
    assert block_attention.first_key_blocks(jnp.asarray(both)).tolist() == [0] * 5


@pytest.mark.parametrize("backend", ["xla", "cudnn", "tokamax"])
def test_neighbours_in_a_row_are_never_seen(backend):
    """For every backend that can run here: whatever another conversation holds changes no bit."""
    dtype = jnp.float32 if backend == "xla" else jnp.bfloat16
    try:
        choose_backend(backend, 300, 2, 64, dtype)
    except UserError as error:
        pytest.skip(str(error))
    q, k, v = (jnp.asarray(array, dtype) for array in random_qkv(1, 300, 2, 64))
    segments = jnp.repeat(jnp.array([[1, 2, 3]]), 100, axis=1)
    middle = segments[0] == 2
    before = segment_attention(q, k, v, segments, backend)
    after = segment_attention(*(jnp.where(middle[None, :, None, None], 3 - x, x) for x in (q, k, v)), segments, backend)
    np.testing.assert_array_equal(before[:, ~middle], after[:, ~middle])
    assert not np.array_equal(before[:, middle], after[:, middle])


def test_half_precision_is_near(small_blocks):
    q, k, v = random_qkv(1, 40, 2, 8)
    segments = jnp.arange(40)[None] // 15
    half = segment_attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), segments)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), plain_attention(q, k, v, segments), atol=0.03)


def test_a_backend_that_cannot_run_here_refuses():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(UserError, match="cudnn can't run here: there is no NVIDIA GPU"):
        segment_attention(q, q, q, jnp.ones((1, 4), jnp.int32), "cudnn")
    with pytest.raises(UserError, match="'flash' is not one of auto, tokamax, cudnn, xla"):
        segment_attention(q, q, q, jnp.ones((1, 4), jnp.int32), "flash")


@pytest.fixture
def not_proven():
    """No backend is proven, or found wrong, yet; afterwards what this test made them do is forgotten."""

    def forget() -> None:
        backends._best_backend.cache_clear()
        backends._fault.cache_clear()
        backends._relative_errors.clear_cache()

    forget()
    yield
    forget()


def ignores_segments(q, k, v, segment_ids):
    return plain_attention(q, k, v, jnp.zeros_like(segment_ids))


@jax.custom_vjp
def has_no_gradient(q, k, v, segment_ids):
    return plain_attention(q, k, v, segment_ids)


has_no_gradient.defvjp(
    lambda *arrays: (has_no_gradient(*arrays), arrays),
    lambda arrays, d_out: (*(jnp.zeros_like(x) for x in arrays[:3]), None),
)


def does_not_compile(q, k, v, segment_ids):
    raise NotImplementedError("not on this GPU")


@pytest.mark.parametrize(
    ("attend", "complaint"),
    [
        (ignores_segments, r"differs from the formula, out by 0\.\d+, dq by"),
        (has_no_gradient, "differs from the formula, dq by 1, dk by 1, dv by 1 of its norm"),
        (does_not_compile, "it fails: not on this GPU"),
    ],
)
def test_a_backend_that_is_wrong_is_dropped(not_proven, monkeypatch, capsys, attend, complaint):
    """Also where the model is traced before anything is computed; with a line, once."""
    monkeypatch.setitem(backends._ATTEND, "tokamax", attend)
    monkeypatch.setattr(backends, "obstacle", lambda backend, *_: "no cuDNN" if backend == "cudnn" else "")
    q, k, v = random_qkv(2, 40, 2, 8)
    segments = jnp.arange(40)[None] // 15 + jnp.zeros((2, 1), jnp.int32)
    for _ in range(2):
        out = jax.jit(lambda *arrays: segment_attention(*arrays))(q, k, v, segments)
    np.testing.assert_allclose(out, plain_attention(q, k, v, segments), atol=2e-6)
    said = capsys.readouterr().err
    assert re.fullmatch(rf"attention=tokamax is not used: .*{complaint}.*\n", said)
    with pytest.raises(UserError, match=f"attention=tokamax can't be used here: .*{complaint}"):
        segment_attention(q, k, v, segments, "tokamax")


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_backend_that_is_right_is_used(not_proven, monkeypatch, capsys, mesh_sizes):
    monkeypatch.setitem(backends._ATTEND, "tokamax", backends._by_shards(plain_attention))
    monkeypatch.setattr(backends, "obstacle", lambda *_: "")
    q, segments = jnp.ones((4, 40, 2, 8), jnp.bfloat16), jnp.ones((4, 40), jnp.int32)
    with jax.set_mesh(mesh_of(*mesh_sizes)):
        jax.jit(lambda q: segment_attention(q, q, q, segments))(q)
        assert choose_backend("auto", 40, 2, 8, jnp.bfloat16) == "tokamax"
        errors = relative_errors("tokamax", 4, 40, 2, 8, jnp.bfloat16)
    assert errors.keys() == {"out", "dq", "dk", "dv"} and 1e-4 < max(errors.values()) < TOLERANCE
    assert capsys.readouterr().err == ""


def test_too_little_memory_is_no_fault_of_the_backend(not_proven, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setitem(backends._ATTEND, "tokamax", exhausted)
    monkeypatch.setattr(backends, "obstacle", lambda *_: "")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        choose_backend("auto", 40, 2, 8, jnp.bfloat16)


@settings(max_examples=10)
@given(rows_of_segments(40))
def test_blocks_without_loops_equal_the_formula(segments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", 8)
        patch.setattr(accelerator, "is_present", lambda: True)
        check_against_the_formula(segments)


@settings(max_examples=10)
@given(rows_of_segments(40))
def test_tokamax_gets_the_right_mask(segments):
    """Its reference implementation, which runs on a CPU, with the mask that its kernels get."""
    pytest.importorskip("tokamax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokamax, "KERNEL", "xla")
        with jax.numpy_rank_promotion("allow"):
            check_against_the_formula(segments, tokamax_attention)


@given(rows_of_segments(12))
def test_a_segment_starts_where_its_id_first_occurs(segments):
    expected = [[row.tolist().index(id_) for id_ in row] for row in segments]
    assert segment_starts(jnp.asarray(segments)).tolist() == expected


def test_tokamax_says_nothing_of_its_configurations():
    """For each shape it would be a line of a thousand characters."""
    records = [logging.makeLogRecord({"msg": msg}) for msg in ("Autotuning cache miss for %s on %s", "something else")]
    assert [tokamax._is_news(record) for record in records] == [False, True]
