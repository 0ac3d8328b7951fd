"""What is drawn, against plain NumPy that sorts the whole vocabulary."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tinysft_jax.sampling.filters import BLOCK, Knobs, SamplingOptions, draw, penalize, top_k_by_blocks

VOCAB, N_DRAWS = 3 * BLOCK, 8_000

jitted_draw = jax.jit(draw, static_argnames="top_k")
jitted_top_k = jax.jit(top_k_by_blocks, static_argnames="k")


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Some forty tokens share most of the probability; a few can't be drawn."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.0, VOCAB)
    logits[rng.choice(VOCAB, 40, replace=False)] += 3
    logits[rng.choice(VOCAB, 5, replace=False)] = -np.inf
    return logits.astype(np.float32)


def distribution(logits: np.ndarray, temperature: float, top_p: float, top_k: int, min_p: float = 0) -> np.ndarray:
    """Softmax at the temperature, of the k largest, of the smallest set of these with the share top_p, without those
    less likely than min_p times the likeliest."""
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled[order])
    if top_k:
        probabilities[top_k:] = 0
    probabilities /= probabilities.sum()
    if top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        probabilities[(before >= top_p) & (np.arange(len(order)) > 0)] = 0
    probabilities[probabilities < min_p * probabilities[0]] = 0
    out = np.zeros(len(logits))
    out[order] = probabilities / probabilities.sum()
    return out


def knobs(temperature: float, top_p: float = 1, min_p: float = 0, top_k: int = 0, n_rows: int = N_DRAWS) -> Knobs:
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return Knobs.of(n_rows * [options], (), np.zeros(VOCAB, bool))


def drawn_counts(
    logits, temperature: float, top_p: float, top_k: int, min_p: float = 0, each_its_own: bool = False
) -> np.ndarray:
    """How often each token is drawn; `each_its_own`: the rows' knobs hold top-k."""
    keys = jax.random.split(jax.random.key(0), N_DRAWS)
    rows = jnp.broadcast_to(logits, (N_DRAWS, VOCAB))
    of_rows = knobs(temperature, top_p, min_p, top_k)
    return np.bincount(jitted_draw(rows, keys, of_rows, top_k=0 if each_its_own else top_k), minlength=VOCAB)


CASES = [
    (1.0, 1.0, 0, 0),
    (0.5, 1.0, 0, 0),
    (1.0, 0.9, 0, 0),
    (1.0, 0.3, 0, 0),
    (1.0, 1.0, 20, 0),
    (0.7, 0.8, 20, 0),
    (2.0, 0.99, 20, 0),
    (1.0, 0.95, VOCAB - 1, 0),
    (1.0, 0.9, VOCAB, 0),
    (1.0, 1.0, 0, 0.1),
    (1.5, 0.95, 0, 0.2),
    (1.0, 0.8, 0, 0.01),
    (1.0, 1.0, 20, 0.2),
    (2.0, 0.9, 20, 0.3),
]


# A top-k that is each row's own is another program; without one there is no difference.
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p", "each_its_own"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if case[2]],
)
def test_frequencies_are_those_of_the_filtered_softmax(logits, temperature, top_p, top_k, min_p, each_its_own):
    expected = N_DRAWS * distribution(logits, temperature, top_p, top_k, min_p)
    counts = drawn_counts(logits, temperature, top_p, top_k, min_p, each_its_own)
    assert counts[expected == 0].sum() == 0, "drew what the filters leave out"
    common = expected >= 5  # the test's approximation asks for that; the rare ones are counted together
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize(
    ("temperature", "top_p", "min_p"), [(0.0, 1.0, 0), (1.0, 0.0, 0), (1e-30, 1.0, 0), (0.0, 0.0, 0), (1.0, 1.0, 1.0)]
)
def test_the_most_likely_token_is_all_that_is_left(logits, top_k, temperature, top_p, min_p):
    assert drawn_counts(logits, temperature, top_p, top_k, min_p)[logits.argmax()] == N_DRAWS


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize(
    ("temperature", "top_p", "min_p"), [(1.0, 1.0, 0), (1.0, 0.5, 0.5), (0.0, 1.0, 0), (9.0, 0, 1)]
)
def test_where_one_token_is_possible_it_is_drawn(top_k, temperature, top_p, min_p):
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[300] = -7
    assert drawn_counts(logits, temperature, top_p, top_k, min_p)[300] == N_DRAWS


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits, seen = jnp.array([[2.0, 2.0, -2.0, -2.0, -jnp.inf]]), jnp.array([[True, False, True, False, True]])
    np.testing.assert_array_equal(penalize(logits, seen, jnp.full(1, 4.0)), [[0.5, 2.0, -8.0, -2.0, -np.inf]])
    np.testing.assert_array_equal(penalize(logits, seen, jnp.full(1, 1.0)), logits)


@pytest.mark.parametrize("top_k", [0, 20])
def test_greedy_takes_the_first_of_equals(top_k):
    logits = np.zeros(VOCAB, np.float32)
    logits[[9, 200, 300]] = 1
    assert drawn_counts(logits, 0.0, 1.0, top_k)[9] == N_DRAWS


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_no_temperature_overflows(top_k, temperature):
    """Of logits as far apart as float32 has them, the impossible one is never drawn."""
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[5, 250]] = 1e38, -1e38
    counts = drawn_counts(logits, temperature, 1.0, top_k)
    assert counts[5] + counts[250] == N_DRAWS


@pytest.mark.parametrize("top_k", [0, 20])
def test_a_draw_depends_on_its_own_key_and_row_only(logits, top_k):
    """Rows in another order draw the same."""
    keys = jax.random.split(jax.random.key(1), N_DRAWS)
    rows = jnp.stack([jnp.roll(logits, i) for i in range(8)])[jnp.arange(N_DRAWS) % 8]
    order = np.random.default_rng(0).permutation(N_DRAWS)
    drawn = jitted_draw(rows, keys, knobs(1.0, 0.9), top_k=top_k)
    np.testing.assert_array_equal(jitted_draw(rows[order], keys[order], knobs(1.0, 0.9), top_k=top_k), drawn[order])


@pytest.mark.parametrize("top_k", [0, 20])
def test_the_nucleus_is_exact_among_tokens_almost_as_likely_as_each_other(top_k):
    """The likeliest 6 of 20, or 101 of all; their logits are a millionth apart."""
    order = np.random.default_rng(0).permutation(VOCAB)
    logits = np.empty(VOCAB, np.float32)
    logits[order] = -1e-6 * np.arange(VOCAB)
    n_kept, n_all = (6, 20) if top_k else (101, VOCAB)
    counts = drawn_counts(logits, 1.0, (n_kept - 0.5) / n_all, top_k)
    assert set(np.flatnonzero(counts)) == set(order[:n_kept])


@given(seed=st.integers(0, 2**32 - 1), n_peaks=st.integers(0, 20), n_values=st.integers(1, 10))
@pytest.mark.parametrize("k", [1, 5, 50])
def test_top_k_by_blocks_is_top_k(seed, n_peaks, n_values, k):
    """With ties within and between blocks, some of them at -inf; k = 50 is past where blocks pay."""
    rng = np.random.default_rng(seed)
    values = np.append(rng.normal(size=n_values), -np.inf).astype(np.float32)
    rows = rng.choice(values, (2, 20 * BLOCK))
    rows[:, rng.choice(20 * BLOCK, n_peaks)] = rng.choice([10, 11, 12], n_peaks)
    for ours, theirs in zip(jitted_top_k(rows, k=k), jax.lax.top_k(rows, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_nothing_sorts_the_vocabulary_or_the_blocks():
    """XLA turns a top-k into a whole sort if it fails to recognise it, which once took longer than the model."""
    keys = jax.random.split(jax.random.key(0), 16)
    arguments = jax.ShapeDtypeStruct((16, 50304), jnp.float32), keys, knobs(1, n_rows=16)
    for top_k, n_top_k in ((50, 2), (0, 2)):
        program = jitted_draw.lower(*arguments, top_k=top_k).compile().as_text()
        sorted_widths = [int(width) for width in re.findall(r"= \(?\w+\[16,(\d+)\].* sort\(", program)]
        assert max(sorted_widths, default=0) <= 50
        assert program.count('custom_call_target="TopK"') == n_top_k
