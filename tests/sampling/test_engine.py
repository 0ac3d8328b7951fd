"""Continuous batching: the same answers as `generate`, whoever else is served."""

import contextlib
import dataclasses
import operator
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import OTHERS, decoder_of, family, random_model

from tinysft_jax.sampling import decode
from tinysft_jax.sampling import engine as module
from tinysft_jax.sampling.decode import PIECES, Decoder
from tinysft_jax.sampling.engine import Closed, Engine, News, Refused, Request
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.steps import N_RANKED

COMMON = SamplingOptions(stop_ids=(3, 7), forbidden_ids=(11,))
OPTIONS = [
    SamplingOptions(20, 0.0),
    SamplingOptions(25, 1.0, top_k=0, seed=5),
    SamplingOptions(30, 0.8, top_k=0, top_p=0.9, seed=9),
    SamplingOptions(3, 2.0, top_k=0, min_p=0.1, repetition_penalty=1.3, seed=1),
    SamplingOptions(1000, 0.5, top_k=0, seed=2**32 - 1),
]


class Asked:
    """A request, and what came of it."""

    def __init__(self, prompt: Sequence[int], options: SamplingOptions = OPTIONS[0], most: int | None = None, **others):
        self.ids, self.news, self.ended, self._most = [], [], queue.Queue(), most
        self.request = Request(list(prompt), options, self._receive, **others)

    def _receive(self, news: News) -> bool:
        self.ids += news.ids
        self.news.append(news)
        wants_more = self._most is None or len(self.ids) < self._most
        if news.finish or not wants_more:
            self.ended.put(news.finish)
        return wants_more

    def finish(self) -> str | None:
        return self.ended.get(timeout=60)


@contextlib.contextmanager
def running(decoder: Decoder, n_slots: int = 4, queue: int = 30, common: SamplingOptions = COMMON) -> Iterator[Engine]:
    engine = Engine(decoder, common, n_slots, queue)
    engine.start()
    try:
        engine.is_ready.wait(60)
        yield engine
    finally:
        assert engine.close(60.0)
        if engine.failure is not None:
            raise engine.failure


def answers(engine: Engine, asked: Sequence[Asked]) -> list[list[int]]:
    engine.submit([each.request for each in asked])
    for each in asked:
        each.finish()
    return [each.ids for each in asked]


def generated(
    decoder: Decoder, prompts: Sequence[Sequence[int]], options: SamplingOptions = OPTIONS[0]
) -> list[list[int]]:
    common = {name: getattr(COMMON, name) for name in ("stop_ids", "forbidden_ids")}
    return decoder.generate(prompts, dataclasses.replace(options, **common))


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    return decoder_of(model)


@pytest.fixture(scope="module")
def engine(decoder) -> Iterator[Engine]:
    with running(decoder) as running_engine:
        yield running_engine


@pytest.mark.parametrize(
    "name", ["default", "everything", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_answers_are_those_of_generate(model_of, prompts, name):
    """More requests than slots, each with its own options; a row is the one of several answers to a prompt."""
    decoder = decoder_of(model_of(name))
    asked = [Asked(prompt, options, row=row) for options in OPTIONS for row, prompt in enumerate(prompts)]
    with running(decoder, queue=100) as engine:
        found = answers(engine, asked)
    assert found == [ids for options in OPTIONS for ids in generated(decoder, prompts, options)]
    assert {each.news[-1].finish for each in asked} == {"stop", "length"}


def test_an_answer_does_not_depend_on_the_others(engine, prompts):
    options = [*OPTIONS, SamplingOptions(25, 1.0, top_k=3, seed=2)]

    def ask(i: int) -> Asked:
        return Asked(prompts[i % 7], options[i % 6])

    alone = [answers(engine, [ask(i)])[0] for i in range(16)]
    order = np.random.default_rng(0).permutation(16)
    assert answers(engine, [ask(i) for i in order]) == [alone[i] for i in order]


def test_no_options_compile_anything(engine, prompts):
    n_programs = decode.advance._cache_size(), module.feed._cache_size()
    answers(engine, [Asked(prompt, options, ranks=True) for prompt in prompts for options in OPTIONS[:4]])
    assert (decode.advance._cache_size(), module.feed._cache_size()) == n_programs


def test_a_conversation_is_continued_where_its_slot_ends(decoder, engine, monkeypatch):
    """What the slot holds is not fed again; nor after other requests, while there are other slots."""
    fed = spy_on_feed(monkeypatch)
    prompt = list(range(20, 60))
    (answer,) = answers(engine, [Asked(prompt)])
    answers(engine, [Asked(range(100, 110)), Asked(range(120, 130)), Asked(range(140, 150))])
    fed.clear()
    following = [*prompt, *answer, 60, 61]
    assert answers(engine, [Asked(following)]) == generated(decoder, [following])
    assert fed == [2]
    fed.clear()
    assert answers(engine, [Asked(prompt)]) == [answer]  # once more: its last token predicts the first
    assert answers(engine, [Asked(prompt[:9])]) == generated(decoder, [prompt[:9]])
    assert fed == [1, 1]


def test_a_text_is_not_given_up_for_a_beginning_that_all_share(decoder, monkeypatch):
    shared = [1, 2, 4, 5]
    with running(decoder, n_slots=2) as engine:
        long = [*shared, *range(20, 60)]
        (answer,) = answers(engine, [Asked(long)])
        answers(engine, [Asked([*shared, *range(100, 110)])])
        fed = spy_on_feed(monkeypatch)
        answers(engine, [Asked([*long, *answer, 60])])
    assert fed == [1]


def spy_on_feed(monkeypatch) -> list[int]:
    fed, feed = [], module.feed

    def spy(params, state, row, start, length, *others):
        fed.append(int(length))
        return feed(params, state, row, start, length, *others)

    monkeypatch.setattr(module, "feed", spy)
    return fed


def test_a_long_prompt_lets_the_others_go_on_after_each_piece(monkeypatch):
    """And its own answer is right, also of one that fills the context."""
    decoder = decoder_of(random_model(family("default", max_seq_len=1100), 0.3))
    calls, advance, feed = [], decode.advance, module.feed

    def spy(name, function):
        def call(params, state, *others):
            calls.append((name, len(others[3]) if name == "feed" else 0))
            return function(params, state, *others)

        return call

    monkeypatch.setattr(decode, "advance", spy("advance", advance))
    monkeypatch.setattr(module, "feed", spy("feed", feed))
    long = np.random.default_rng(0).integers(20, 200, 1099).tolist()
    long, options = [long[:1000], long[::-1]], SamplingOptions(5, 0.0)
    wanted = decoder.generate(long, options)
    with running(decoder, common=SamplingOptions()) as engine:
        for prompt, answer in zip(long, wanted, strict=True):
            short = Asked([1, 2], SamplingOptions(1000, 0.0))
            engine.submit([short.request])
            while not short.ids:
                time.sleep(0.01)
            calls.clear()
            assert answers(engine, [Asked(prompt, options)]) == [answer]
            assert short.ended.empty(), "ended before the other: nothing was shown"
            engine.cancel(short.request)
            short.finish()
            runs = "".join("|" if name == "advance" else "." * size for name, size in calls).split("|")
            assert max(map(len, runs)) <= PIECES[0] and sum(run != "" for run in runs) >= len(prompt) // PIECES[0]


def test_pieces_end_with_the_cache():
    """What continues a long text begins where no long piece fits, or in the last place of all."""
    decoder = decoder_of(random_model(family("default", max_seq_len=1100), 0.3))
    text, options = np.random.default_rng(0).integers(20, 200, 1099).tolist(), SamplingOptions(5, 0.0)
    with running(decoder, n_slots=1) as engine:
        answers(engine, [Asked(text[:930], SamplingOptions(0))])
        first, again = [Asked(text, options, ranks=True) for _ in range(2)]
        answers(engine, [first])
        answers(engine, [again])
    (wanted,) = [Asked(text, options, ranks=True)]
    with running(decoder, n_slots=1) as engine:
        answers(engine, [wanted])
    for found in (first, again):
        assert found.ids == wanted.ids
        np.testing.assert_allclose(found.news[0].ranked.log_prob, wanted.news[0].ranked.log_prob, atol=1e-5)


def test_the_first_token_comes_alone(engine, prompts):
    """Its reader need not wait for a whole run."""
    asked = [Asked(prompt, SamplingOptions(20, 1.0, top_k=0, seed=1)) for prompt in prompts]
    for each in asked:
        answers(engine, [each])
    assert all(len(each.news[0].ids) <= 1 for each in asked)
    assert max(len(news.ids) for each in asked for news in each.news) > 1


def test_a_cancelled_request_frees_its_slot(decoder, prompts, monkeypatch):
    """And its place in the queue, whether or not it has begun."""
    gate, advance = threading.Event(), decode.advance

    def wait(*arguments):
        assert gate.wait(60)
        return advance(*arguments)

    with running(decoder, n_slots=2, queue=2, common=SamplingOptions()) as engine:
        monkeypatch.setattr(decode, "advance", wait)
        asked = [Asked(prompts[0], SamplingOptions(1000, 0.0)) for _ in range(4)]
        engine.submit([each.request for each in asked])
        while engine.n_active < 2:
            time.sleep(0.01)
        for each in asked:
            engine.cancel(each.request)
        gate.set()
        assert [each.finish() for each in asked] == 4 * ["cancelled"]
        assert answers(engine, [Asked(prompts[1]) for _ in range(4)]) == 4 * decoder.generate(prompts[1:2], OPTIONS[0])
        assert (engine.n_active, engine.n_waiting) == (0, 0)


def test_who_wants_no_more_gets_no_more(engine, prompts):
    asked = Asked(prompts[0], SamplingOptions(1000, 1.0, top_k=0, seed=3), most=1)
    answers(engine, [asked])
    assert len(asked.news) == 1


def test_too_many_requests_are_refused_all_or_none(decoder, prompts, monkeypatch):
    with running(decoder, n_slots=1, queue=2) as engine:
        assert engine.is_ready.wait(60)
        with pytest.raises(Refused, match="too many"):
            engine.submit([Asked(prompts[0]).request for _ in range(4)])
        gate, advance = threading.Event(), decode.advance
        monkeypatch.setattr(decode, "advance", lambda *arguments: gate.wait(60) and advance(*arguments))
        two = [Asked(prompts[0]), Asked(prompts[0])]
        engine.submit([each.request for each in two])
        with pytest.raises(Refused, match="too many"):
            engine.submit([Asked(prompts[0]).request for _ in range(2)])
        gate.set()
        assert {each.finish() for each in two} <= {"stop", "length"}
        assert engine.n_waiting == 0
        assert len(answers(engine, [Asked(prompts[0]) for _ in range(3)])) == 3


def test_answers_that_take_too_long_at_the_end_are_cut_off(decoder, prompts):
    with running(decoder, n_slots=2) as engine:
        asked = [Asked(prompts[0], SamplingOptions(1000, 0.0)) for _ in range(5)]
        engine.submit([each.request for each in asked])
        engine.finish_within(0.0)
        assert {each.finish() for each in asked} <= {"length", "stop"}
        with pytest.raises(Closed, match="shutting down"):
            engine.submit([Asked(prompts[0]).request])


def test_an_engine_that_fails_ends_all_requests(decoder, prompts, monkeypatch):
    engine, ended = Engine(decoder, COMMON, 4, 30), queue.Queue()
    engine.start(on_end=lambda: ended.put(True))
    assert engine.is_ready.wait(60)

    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(decode, "advance", fail)
    asked = [Asked(prompt) for prompt in prompts]
    engine.submit([each.request for each in asked])
    assert {each.finish() for each in asked} == {"cancelled"}
    assert ended.get(timeout=60) and str(engine.failure) == "the device is gone"
    with pytest.raises(Closed):
        engine.submit([Asked(prompts[0]).request])


@pytest.mark.parametrize("length", [1, 5, 70])
def test_log_probabilities_are_those_of_the_model(model, engine, length):
    """Of all ids at temperature 1, whatever the options; of the prompt, too."""
    prompt = np.random.default_rng(length).integers(0, 200, length).tolist()
    asked = Asked(prompt, SamplingOptions(9, 0.5, top_k=5, seed=1), ranks=True, ranks_prompt=True)
    (answer,) = answers(engine, [asked])
    text = np.array([[*prompt, *answer]], np.int32)
    wanted = jax.nn.log_softmax(model(jnp.array(text))[0, :-1])
    of_answer = (jax.tree.map(operator.itemgetter(slice(len(news.ids))), news.ranked) for news in asked.news)
    parts = [*asked.request.prompt_ranked, *of_answer]
    found = jax.tree.map(lambda *each: np.concatenate(each), *parts)
    np.testing.assert_allclose(found.log_prob, wanted[np.arange(len(wanted)), text[0, 1:]], atol=1e-4)
    values, ids = jax.lax.top_k(wanted, N_RANKED)
    np.testing.assert_allclose(found.top_log_probs, values, atol=1e-4)
    assert (found.top_ids == ids).mean() > 0.99  # but for ties


def test_a_prompt_alone_can_be_asked_for(engine, prompts):
    asked = Asked(prompts[2], SamplingOptions(0), ranks_prompt=True)
    answers(engine, [Asked(prompts[2])])  # what a slot holds is read again for it
    assert answers(engine, [asked]) == [[]] and asked.news[-1].finish == "length"
    assert sum(len(each.log_prob) for each in asked.request.prompt_ranked) == len(prompts[2]) - 1
