"""What a kept cache hands over, and that a stream from it says the same as one from nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import slow
from tiny_model import decoder_of

from tinysft_jax.sampling import decode
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.kept_cache import KeptCache

# With these, caches have 64 or 96 slots: few shapes.
OPTIONS = SamplingOptions(34, temperature=0)


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    return decoder_of(model)


@pytest.fixture
def fed(monkeypatch) -> list[tuple[int, int]]:
    """Position and number of the tokens of each piece of a prompt that is computed from here on."""
    pieces, prefill = [], decode.prefill

    def spy(params, state, tokens, lengths, config):
        pieces.append((int(state.positions[0]), int(lengths[0])))
        return prefill(params, state, tokens, lengths, config)

    monkeypatch.setattr(decode, "prefill", spy)
    return pieces


def stream(decoder: Decoder, ids: list[int], kept: KeptCache | None = None) -> list[int]:
    return [id_ for new in decoder.stream(ids, OPTIONS, kept) for id_ in new]


def test_the_common_beginning_is_handed_over_once():
    kept = KeptCache([1, 2, 3, 4], [(jnp.ones((1, 2, 8, 4)), jnp.ones((1, 2, 8, 4)))])
    n_held, [(keys, values)] = kept.take([1, 2, 9, 4], 16)
    assert n_held == 2 and keys.shape == values.shape == (1, 2, 16, 4)
    np.testing.assert_array_equal(keys, np.repeat([1, 0], 8)[None, None, :, None] * np.ones((1, 2, 16, 4)))
    assert kept.ids == [] and kept.take([1, 2], 8) == (0, [])


def test_the_last_token_of_a_prompt_is_always_computed():
    assert KeptCache([1, 2, 3]).take([1, 2, 3], 8)[0] == 2
    assert KeptCache([1, 2, 3]).take([1, 2], 8)[0] == 1


def test_only_what_is_new_is_computed(decoder, fed):
    kept, prompt = KeptCache(), list(range(20))
    answer = stream(decoder, prompt, kept)
    assert fed == [(0, 20)] and kept.ids == prompt + answer
    longer = [*prompt, *answer, 1, 2, 3]
    again = stream(decoder, longer, kept)
    assert fed[1:] == [(54, 3)]
    assert again == stream(decoder, longer)


def test_near_the_end_of_the_cache_a_piece_begins_earlier(decoder, fed):
    """Its padding would reach beyond the cache: tokens that are held are fed again in its place."""
    kept, prompt = KeptCache(), list(range(40))
    longer = [*prompt, *stream(decoder, prompt, kept), 1, 2, 3]
    again = stream(decoder, longer, kept)
    assert fed == [(0, 32), (32, 8), (45, 32)]
    assert again == stream(decoder, longer)


def test_a_prompt_of_long_and_short_pieces(decoder, fed, monkeypatch):
    prompt = np.random.default_rng(0).integers(0, 200, 45).tolist()
    expected = stream(decoder, prompt)
    monkeypatch.setattr(decode, "PIECES", (16, 8))
    assert stream(decoder, prompt) == expected
    assert fed == [(0, 32), (32, 13), (0, 16), (16, 16), (32, 8), (40, 5)]


@pytest.fixture(scope="module")
def decoder_of_family(model_of):
    return functools.cache(lambda name: decoder_of(model_of(name)))


@settings(max_examples=15)
@given(turns=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(0, 3)), min_size=2, max_size=5))
@pytest.mark.parametrize("name", ["default", *slow("everything")])
def test_whatever_was_held_before_changes_nothing(decoder_of_family, name, turns):
    """Each turn keeps a beginning of what is held and adds to it; the context is 96, so caches grow on the way."""
    kept, decoder = KeptCache(), decoder_of_family(name)
    for n_kept, n_added, seed in turns:
        added = np.random.default_rng(seed).integers(0, 200, n_added).tolist()
        prompt = [*kept.ids[:n_kept], *added]
        assert stream(decoder, prompt, kept) == stream(decoder, prompt)


def test_a_stream_that_is_left_keeps_what_it_said(decoder):
    kept = KeptCache()
    chunks = decoder.stream([5, 6], OPTIONS, kept)
    said = [*next(chunks), *next(chunks)]
    chunks.close()
    assert kept.ids == [5, 6, *said]
    longer = [5, 6, *said, 7]
    assert stream(decoder, longer, kept) == stream(decoder, longer)


@pytest.mark.parametrize("n_chunks", [0, 2])
def test_a_cache_whose_computation_was_interrupted_is_not_used(decoder, monkeypatch, n_chunks):
    kept, get, calls = KeptCache(), jax.device_get, []

    def interrupted(arrays):
        calls.append(1)
        if len(calls) > n_chunks:
            raise KeyboardInterrupt
        return get(arrays)

    stream(decoder, [1, 2, 3], kept)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream(decoder, [1, 2, 3, 4], kept)
    assert kept.ids == []
    assert stream(decoder, [1, 2, 3, 4], kept) == stream(decoder, [1, 2, 3, 4])
