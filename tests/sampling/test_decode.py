import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import slow
from tiny_model import OTHERS, decoder_of, family, random_params

from tinysft_jax import accelerator
from tinysft_jax.checkpoints import load_model
from tinysft_jax.console import UserError
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT, cached_hidden
from tinysft_jax.sampling import decode
from tinysft_jax.sampling.decode import Decoder, generate
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.kept_cache import KeptCache
from tinysft_jax.sharding import make_mesh, state_sharding

# With prompts of 1 to 30 tokens this makes caches of 64 positions, whichever prompts are together: few shapes.
N_NEW = 34


@pytest.fixture(scope="session")
def decoder(model) -> Decoder:
    return decoder_of(model)


@pytest.fixture(scope="session")
def full_logits_of(model_of):
    """The whole forward pass, jitted for one length: rows are padded on the right, which causality hides."""
    return functools.cache(lambda name: jax.jit(lambda tokens: model_of(name)(tokens)))


@pytest.fixture(scope="session")
def full_logits(full_logits_of):
    return full_logits_of("default")


def naive_greedy(full_logits, prompt: list[int], n: int, context: int) -> list[int]:
    """Recomputes everything for each token."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + n, context):
        row = np.zeros((1, context), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(full_logits(row)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def compilations():
    """A list with an entry for everything that is compiled from now on."""
    events = []

    def note(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":  # before the cache on disk is asked
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    jax.monitoring.unregister_event_duration_listener(note)


def compiled() -> int:
    # Private: nothing public counts the programs that a function was compiled to.
    return decode.prefill._cache_size() + decode.advance._cache_size()


@pytest.fixture(scope="session")
def programs_of(model_of):
    """Of a family: its decoder, the hidden states of the whole forward pass, and a step of decoding, both jitted."""

    @functools.cache
    def programs(name: str):
        model, decoder = model_of(name), decoder_of(model_of(name))

        def step(tokens, positions, cache):
            hidden, cache = cached_hidden(decoder.params, tokens, positions, cache, decoder.config)
            return hidden[:, 0], cache

        return decoder, jax.jit(lambda tokens: model.hidden(tokens)), jax.jit(step)

    return programs


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 32), min_size=4, max_size=4), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("name", ["default", *slow("everything", *OTHERS)])
def test_cached_hidden_states_equal_those_of_the_full_forward(programs_of, name, lengths, seed):
    """Prefill of ragged rows with garbage behind them, then known tokens one by one."""
    decoder, full_hidden, cached_step = programs_of(name)
    tokens = np.random.default_rng(seed).integers(0, 200, (4, 96)).astype(np.int32)
    expected = np.asarray(full_hidden(tokens))
    prompts, rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)], np.arange(4)
    state = decoder.begin(prompts, [0] * 4, SamplingOptions(N_NEW))
    lengths = np.array(lengths, np.int32)
    # Behind a row's length is what comes later in it, which must not be seen.
    state = decode.prefill(decoder.params, state, tokens[:, :32], lengths, decoder.config)
    hidden, cache = state.hidden, state.cache
    for step in range(8):
        np.testing.assert_allclose(hidden, expected[rows, lengths - 1 + step], atol=1e-4)
        hidden, cache = cached_step(tokens[rows, lengths + step][:, None], (lengths + step)[:, None], cache)


@pytest.mark.parametrize("name", ["default", "everything", *slow(*OTHERS)])
def test_greedy_is_the_argmax_of_the_full_forward(model_of, prompts, full_logits_of, name):
    out = generate(model_of(name), prompts, max_new_tokens=N_NEW, temperature=0)
    assert out == [naive_greedy(full_logits_of(name), prompt, N_NEW, 96) for prompt in prompts]
    assert len({tuple(ids) for ids in out}) == len(prompts), "a model that says the same to everything proves little"


@pytest.mark.parametrize("name", ["pretrained_small", "sft_small"])
def test_greedy_is_what_pytorch_generates(fixtures, name):
    pytest.importorskip("torch")
    golden = np.load(fixtures / f"{name}.golden.npz")["greedy"][0].tolist()
    model = load_model(fixtures / f"{name}.pt")
    assert generate(model, [golden[:8]], max_new_tokens=16, temperature=0) == [golden[8:]]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_does_not_depend_on_its_neighbours(decoder, prompts, temperature):
    """Neither on the others' contents, nor on the bucket they make, nor on how many are decoded at a time."""
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=temperature)
    together = decoder.generate(prompts, options)
    assert decoder.generate(prompts, options, batch_size=4) == together
    others = [list(range(94)), *prompts[1:3]]  # a longer row 0 makes the buckets larger
    assert decoder.generate(others, options)[1:] == together[1:3]
    assert decoder.generate(prompts[:1], options) == together[:1]


def test_random_numbers_follow_seed_and_row(decoder, prompts):
    def sample(seed, prompts):
        return decoder.generate(prompts, SamplingOptions(max_new_tokens=N_NEW, temperature=1.0, seed=seed))

    same = [prompts[0]] * 4
    first = sample(2**32 - 1, same)
    assert sample(2**32 - 1, same) == first
    assert len({tuple(ids) for ids in [*first, *sample(0, same)]}) == 8


def test_a_row_of_a_larger_task_draws_as_in_the_whole(decoder, prompts):
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=1.0)
    whole = decoder.generate(prompts, options)
    assert decoder.generate(prompts[3:], options, batch_size=2, first_row=3) == whole[3:]
    assert [id_ for ids in decoder.stream(prompts[3], options, row=3) for id_ in ids] == whole[3]


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_the_penalty_is_for_what_stands_in_prompt_and_answer(decoder, full_logits, prompts, penalty):
    def naive(prompt: list[int], stop_id: int) -> list[int]:
        ids = list(prompt)
        while len(ids) < len(prompt) + N_NEW:
            row = np.zeros((1, 96), np.int32)
            row[0, : len(ids)] = ids
            logits = np.array(full_logits(row)[0, len(ids) - 1])
            for id_ in set(ids) - {stop_id}:
                logits[id_] = logits[id_] / penalty if logits[id_] > 0 else logits[id_] * penalty
            ids.append(int(logits.argmax()))
            if ids[-1] == stop_id:
                return ids[len(prompt) : -1]
        return ids[len(prompt) :]

    stop_id = prompts[2][4]
    options = SamplingOptions(N_NEW, temperature=0, repetition_penalty=penalty, stop_ids=(stop_id,))
    out = decoder.generate(prompts, options)
    assert out == [naive(prompt, stop_id) for prompt in prompts]
    assert out != decoder.generate(prompts, dataclasses.replace(options, repetition_penalty=1))


def test_a_stop_id_ends_its_row_only_and_is_not_returned(decoder, prompts):
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=0)
    free = decoder.generate(prompts, options)
    stop_ids = (free[0][5], free[3][0])
    ends = [next((i for i, id_ in enumerate(ids) if id_ in stop_ids), len(ids)) for ids in free]
    assert max(ends) == N_NEW and ends[3] == 0 and 0 < ends[0] <= 5
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=0, stop_ids=stop_ids)
    stopped = decoder.generate(prompts, options)
    assert stopped == [ids[:end] for ids, end in zip(free, ends, strict=True)]
    assert list(decoder.stream(prompts[3], options)) == []


def test_a_row_ends_with_the_context(decoder, full_logits):
    """Of 96 positions; the last row takes more steps than one call to the device makes."""
    prompts = [list(range(100, 194)), list(range(60)), [3]]
    out = decoder.generate(prompts, SamplingOptions(max_new_tokens=100, temperature=0))
    assert [len(ids) for ids in out] == [2, 36, 95]
    assert out == [naive_greedy(full_logits, prompt, 100, 96) for prompt in prompts]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_at_most_max_new_tokens(decoder, n):
    out = decoder.generate([list(range(94)), [1], [2]], SamplingOptions(max_new_tokens=n))
    assert [len(ids) for ids in out] == [n, n, n]


def test_no_prompts_no_answers(decoder):
    assert decoder.generate([], SamplingOptions()) == []


def test_stream_yields_what_generate_returns(decoder, prompts):
    for temperature in (0, 1.0):
        options = SamplingOptions(max_new_tokens=N_NEW, temperature=temperature, seed=3)
        chunks = list(decoder.stream(np.array(prompts[2]), options))
        assert [id_ for ids in chunks for id_ in ids] == decoder.generate([prompts[2]], options)[0]
        assert [len(ids) for ids in chunks] == [1, 8, 8, 8, 8, 1]


def test_only_shapes_and_top_k_compile(decoder, prompts, compilations):
    options = SamplingOptions(max_new_tokens=N_NEW, stop_ids=(1,))
    decoder.generate(prompts[:3], options)
    list(decoder.stream(prompts[0], options))
    compilations.clear()
    for changes in (
        {"temperature": 0},
        {"temperature": 1.5, "top_p": 0.3, "seed": 9, "max_new_tokens": 30},
        {"top_p": 0, "min_p": 0.2, "forbidden_ids": (3, 4), "stop_ids": (7,)},
        {"repetition_penalty": 1.3},
    ):
        changed = dataclasses.replace(options, **changes)
        decoder.generate(prompts[3:7], changed)  # four rows, as three are rounded up to, of other lengths
        decoder.generate(prompts[:3], changed)
        list(decoder.stream(prompts[6], changed))
    assert compilations == []
    decoder.generate(prompts[:3], dataclasses.replace(options, top_k=7))
    assert len(compilations) == 1, "top_k is a shape: if this counts nothing, neither does the test above"


def test_decoders_of_one_shape_share_what_is_compiled(model, decoder, prompts):
    options = SamplingOptions(max_new_tokens=N_NEW)
    decoder.generate(prompts[:3], options)
    before = compiled()
    params = jax.tree.map(lambda leaf: leaf * 1.1, nnx.to_pure_dict(nnx.state(model)))
    other = Decoder(model.config, params, model.dtype)
    assert other.generate(prompts[:3], options) != decoder.generate(prompts[:3], options)
    assert compiled() == before


@pytest.mark.parametrize("top_k", [0, 50])
def test_forbidden_and_padding_ids_never_come_out(decoder, prompts, top_k):
    """At such a temperature all ids are equally likely; the table has 56 rows of padding behind the 200 ids."""
    allowed = set(range(150, 200))
    options = SamplingOptions(N_NEW, temperature=1e9, top_k=top_k, forbidden_ids=(*range(150), 5000, -1))
    drawn = {id_ for ids in decoder.generate(prompts * 4, options, batch_size=7) for id_ in ids}
    assert drawn == allowed


def test_top_k_over_the_vocabulary_is_off(decoder, prompts):
    whole = decoder.generate(prompts, SamplingOptions(max_new_tokens=N_NEW, temperature=1.0, top_k=0))
    for top_k in (200, 256, 2**31 - 1):
        assert decoder.generate(prompts, SamplingOptions(N_NEW, 1.0, top_k)) == whole


@pytest.mark.slow
def test_half_precision_generates(model, decoder, prompts):
    """Weights are cast once, norms are not; the loop's state keeps its types."""
    half = decoder_of(model, jnp.bfloat16)
    dtypes = {(leaf.ndim, leaf.dtype.name) for leaf in jax.tree.leaves(half.params)}
    assert dtypes == {(1, "float32"), (2, "bfloat16")}
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=0)
    state = half._feed(half.begin(prompts, list(range(len(prompts))), options), prompts, 32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.cache, state.hidden))} == {"bfloat16"}
    out, exact = half.generate(prompts, options), decoder.generate(prompts, options)
    assert np.mean([a == b for x, y in zip(out, exact, strict=True) for a, b in zip(x, y, strict=True)]) > 0.5


def test_a_model_on_several_devices_generates_the_same(model, decoder, prompts):
    params = nnx.to_pure_dict(nnx.state(model))
    params = jax.device_put(
        params, state_sharding(make_mesh(data=2, fsdp=2, tensor=2), params, model.config.n_kv_heads)
    )
    assert not params["tok_emb"]["embedding"].is_fully_replicated
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=0)
    divided = Decoder(model.config, params, model.dtype)
    assert divided.generate(prompts, options) == decoder.generate(prompts, options)


def test_rows_divided_over_a_mesh_are_the_same(model, decoder, prompts):
    divided = decoder_of(model, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=1.0)
    assert divided.generate(prompts, options) == decoder.generate(prompts, options)
    assert list(divided.stream(prompts[0], options)) == list(decoder.stream(prompts[0], options))
    state = divided.begin([*prompts, prompts[0]], list(range(8)), options)
    assert {len(shard.data) for shard in state.cache[0][0].addressable_shards} == {2}, "eight rows over four"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        (list(range(96)), "96 tokens"),
        ([0, 200], "id 200"),
        ([-1], "id -1"),
        (np.array([0.5]), "whole numbers"),
        (np.array([[1, 2], [3, 4]]), "list of token ids"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(decoder, prompt, message):
    before = compiled()
    for call in (
        lambda: decoder.generate([[1], prompt], SamplingOptions()),
        lambda: decoder.stream(prompt, SamplingOptions()),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert compiled() == before


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 101},
        {"max_new_tokens": -1},
        {"seed": -1},
        {"seed": 2**32},
        {"forbidden_ids": tuple(range(200))},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(model, bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        generate(model, [[1, 2, 3]], **bad)


def test_an_accelerators_loop_gives_the_same_answers(decoder, prompts, monkeypatch):
    """It makes all steps of a call, also after the rows' ends, and where an answer fills its cache to the last slot."""
    stop = decoder.generate(prompts, SamplingOptions(N_NEW, temperature=0))[0][5]

    def streamed(prompt: list[int], options: SamplingOptions) -> tuple[list[int], KeptCache]:
        kept = KeptCache()
        return [id_ for new in decoder.stream(prompt, options, kept) for id_ in new], kept

    for options in (
        SamplingOptions(N_NEW, temperature=0, stop_ids=(stop,)),
        SamplingOptions(N_NEW + 30, max_length=64),
    ):
        together, alone = decoder.generate(prompts, options), [streamed(prompt, options) for prompt in prompts]
        with monkeypatch.context() as patch:
            patch.setattr(accelerator, "is_present", lambda: True)
            assert decoder.generate(prompts, options) == together
            for prompt, (answer, kept) in zip(prompts, alone, strict=True):
                same, held = streamed(prompt, options)
                assert same == answer and held.ids == kept.ids
                for slots, expected in zip(*map(jax.tree.leaves, (held.layers, kept.layers)), strict=True):
                    n = len(kept.ids)
                    np.testing.assert_allclose(slots[:, :, :n], expected[:, :, :n], atol=1e-5)


def test_a_long_prompt_needs_no_square_of_scores():
    """All scores of 2 prompts of 1024 tokens over 1024 slots, 8 heads, would take 67 MB, and as much for weights."""
    config = GPTConfig(vocab_size=128, dim=64, n_layers=1, n_heads=8, max_seq_len=1024)
    decoder = decoder_of(GPT(config, rngs=nnx.Rngs(0)))
    prompts = [np.zeros(1000, np.int32)] * 2
    state = decoder.begin(prompts, [0, 1], SamplingOptions(4))
    tokens, lengths = np.zeros((2, 1024), np.int32), np.array([1000, 1000], np.int32)
    program = decode.prefill.lower(decoder.params, state, tokens, lengths, config).compile()
    assert program.memory_analysis().temp_size_in_bytes < 50e6


def test_rows_that_have_ended_leave_the_batch_and_its_cache_grows(monkeypatch):
    """Which changes no answer."""
    config = family("default", max_seq_len=256)
    decoder, draws = Decoder(config, random_params(config), np.dtype("float32")), np.random.default_rng(0)
    options = SamplingOptions(150, 1.0, top_k=0, seed=1, stop_ids=(1, 2))
    prompts, shapes = [draws.integers(4, 250, n) for n in draws.integers(3, 30, 20)], []

    def spy(params, state, *arguments):
        shapes.append((len(state.positions), state.cache[0][0].shape[2]))
        return advance(params, state, *arguments)

    advance = decode.advance
    monkeypatch.setattr(decode, "advance", spy)
    together = decoder.generate(prompts, options)
    assert len({len(ids) for ids in together}) > 10 and shapes[0] == (32, 128)
    assert shapes[-1][0] < 32 and shapes[-1][1] > 128, shapes
    alone = [decoder.generate([prompt], options, first_row=row)[0] for row, prompt in enumerate(prompts)]
    assert together == alone
