"""OpenAI's API, asked by OpenAI's client: answers, streams, log-probabilities, and what is refused."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy_gpt
import openai
import pytest
from serving_model import Running, post, run_server
from tiny_model import LETTERS, make_config, make_params, make_tokenizer

from tinysft_jax.sampling import engine

TOKENIZER = make_tokenizer("control")
SHORT = {"role": "system", "content": "s"}  # the default system message has 66 tokens
WHY = [SHORT, {"role": "user", "content": "why"}]
N_WHY = 7  # its tokens: a byte each, and three markers
EIGHT = {"n": 8, "seed": 4, "max_tokens": 40}


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return make_client(server)


def make_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def token_by_token(monkeypatch):
    """Each token comes by itself, where several would come at a time."""
    monkeypatch.setattr(engine, "SECONDS_OF_RUN", 0)


def chat(client: openai.OpenAI, messages: Any = WHY, **options):
    return client.chat.completions.create(messages=messages, **{"model": "letters"} | options)


def complete(client: openai.OpenAI, prompt: Any = "once upon", **options):
    return client.completions.create(prompt=prompt, **{"model": "letters"} | options)


def texts(answer: Any) -> list[str]:
    """Of a chat or a completion."""
    return [choice.message.content if hasattr(choice, "message") else choice.text for choice in answer.choices]


def streamed(chunks: Any) -> list[str]:
    """The texts of a stream's choices."""
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            new = (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
            joined[choice.index] = joined.get(choice.index, "") + new
    return [joined[index] for index in sorted(joined)]


def cut(text: str, *stops: str) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def test_a_chat_is_answered(client):
    answer = chat(client, seed=1)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.model == "letters" and answer.id.startswith("chatcmpl-")
    assert choice.index == 0 and choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert set(choice.message.content) <= set(LETTERS) and choice.logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (N_WHY, len(choice.message.content))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_text_is_continued(client):
    answer = complete(client, seed=1, max_tokens=5)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert len(answer.choices[0].text) == 5 and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 5)


def test_the_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("letters", "model")
    assert (model.context_length, model.chat) == (256, True)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_has_no_more_tokens_than_wanted(client, name):
    whole = texts(chat(client, n=8, seed=4))
    answer = chat(client, n=8, seed=4, **{name: 3})
    assert texts(answer) == [text[:3] for text in whole]
    assert answer.usage.completion_tokens == sum(map(len, texts(answer)))
    reasons = ["length" if len(text) >= 3 else "stop" for text in whole]
    assert [choice.finish_reason for choice in answer.choices] == reasons and len(set(reasons)) == 2


def test_a_completion_has_16_tokens_by_default(client):
    answer = complete(client, seed=1, n=4)
    assert max(map(len, texts(answer))) == 16 < max(map(len, texts(complete(client, seed=1, n=4, max_tokens=100))))


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_has_the_same_text(client, ask):
    chunks = list(ask(client, seed=1, max_tokens=40, stream=True))
    whole = ask(client, seed=1, max_tokens=40)
    assert streamed(chunks) == texts(whole)
    assert len({chunk.id for chunk in chunks}) == 1 < len(chunks)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]


def test_the_first_piece_of_each_choice_says_the_role(client):
    chunks = list(chat(client, stream=True, **EIGHT))
    first = {chunk.choices[0].index: chunk for chunk in reversed(chunks)}
    assert len(first) == 8 and all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    for chunk in chunks:
        is_first = chunk is first[chunk.choices[0].index]
        assert chunk.choices[0].delta.role == ("assistant" if is_first else None)


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_ends_with_the_usage_where_that_is_wanted(client, ask):
    *chunks, last = ask(client, seed=4, n=2, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == ask(client, seed=4, n=2).usage
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert all(chunk.usage is None and chunk.choices for chunk in ask(client, seed=4, n=2, stream=True))


def test_a_streams_last_event_is_done(server):
    response = post(server, "chat/completions", {"messages": WHY, "seed": 1, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last, end = response.body.decode().split("\n\n")
    assert last == "data: [DONE]" and end == "" and events
    assert not any("usage" in json.loads(event.removeprefix("data: ")) for event in events), "where it is not wanted"


@pytest.mark.parametrize("ask", [chat, complete])
def test_several_answers_differ_and_a_seed_repeats_them(client, ask):
    three = texts(ask(client, n=3, seed=1))
    assert len(set(three)) == 3
    assert texts(ask(client, n=3, seed=1)) == three != texts(ask(client, n=3, seed=2))
    assert texts(ask(client, n=2, seed=1)) == three[:2] and texts(ask(client, seed=1)) == three[:1]
    assert streamed(ask(client, n=3, seed=1, stream=True)) == three


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, -(2**63)])
def test_any_whole_number_is_a_seed(client, seed):
    assert texts(chat(client, n=3, seed=seed)) == texts(chat(client, n=3, seed=seed))


def test_without_a_seed_answers_differ(client):
    assert texts(chat(client, n=8)) != texts(chat(client, n=8))


def test_at_temperature_0_all_answers_are_the_same(client):
    assert len(set(texts(complete(client, n=3, temperature=0)))) == 1
    assert texts(complete(client, n=3, temperature=5e-324)) == texts(complete(client, n=3, temperature=0))


@pytest.mark.parametrize("narrow", [{"top_p": 0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}])
def test_filters_can_leave_the_most_likely_token_alone(client, narrow):
    assert texts(complete(client, n=3, seed=1, **narrow)) == texts(complete(client, n=3, temperature=0))


def test_a_penalty_makes_repetition_rare(client):
    most = [
        max(Counter(text).values())
        for penalty in (1, 100)
        for text in texts(complete(client, temperature=0, max_tokens=20, extra_body={"repetition_penalty": penalty}))
    ]
    assert most[0] > most[1] == 1


def test_an_answer_ends_before_a_stop_string(client):
    """Each token is a letter, so the parts of a stop come one by one."""
    whole = texts(chat(client, **EIGHT))
    for length in (1, 2, 5):
        stop = max(whole, key=len)[4 : 4 + length]
        answer = chat(client, stop=stop, **EIGHT)
        assert texts(answer) == [cut(text, stop) for text in whole]
        n_tokens = sum(len(cut(text, stop)) + length * (stop in text) for text in whole)
        assert answer.usage.completion_tokens == n_tokens, "with those of the stop"


def test_the_first_of_several_stops_ends_an_answer(client):
    whole = texts(chat(client, **EIGHT))
    longest = max(whole, key=len)
    stops = [longest[9:11], longest[5:7], "QQ"]
    answer = chat(client, stop=stops, **EIGHT)
    assert texts(answer) == [cut(text, *stops) for text in whole]
    assert answer.choices[whole.index(longest)].finish_reason == "stop"


@pytest.mark.usefixtures("token_by_token")
def test_no_part_of_a_stop_is_ever_shown(client):
    """What a stream has shown can't be taken back, so it has the very text. Nothing is lost if a stop does not come."""
    whole = texts(chat(client, **EIGHT))
    longest = max(whole, key=len)
    for stops in ([longest[9:14]], [longest[7:9], longest[6:8]], [longest[5:9] + "Q", longest[6:8] + "Q"]):
        shown = streamed(chat(client, stream=True, stop=stops, **EIGHT))
        assert shown == [cut(text, *stops) for text in whole]


@pytest.mark.usefixtures("token_by_token")
def test_a_stop_whose_beginning_is_doubled(client):
    """As "ab" in "aab": the first "a" is no part of it."""
    whole = texts(chat(client, n=16, seed=4, max_tokens=40))
    stop = next(match[1] + match[2] for text in whole if (match := re.search(r"(.)\1(?!\1)(.)", text)))
    wanted = [cut(text, stop) for text in whole]
    assert any(text.endswith(stop[0]) for text in wanted)
    assert streamed(chat(client, n=16, seed=4, max_tokens=40, stop=stop, stream=True)) == wanted


def test_a_stop_in_the_prompt_ends_nothing(client):
    assert texts(complete(client, "xyQQ", seed=1, stop="QQ", echo=True))[0].startswith("xyQQ")
    assert texts(complete(client, "xyQQ", seed=1, stop="QQ")) == texts(complete(client, "xyQQ", seed=1))


@pytest.mark.parametrize("stop", [None, []])
def test_no_stop_is_fine(client, stop):
    assert texts(chat(client, seed=1, stop=stop)) == texts(chat(client, seed=1))


def test_a_chats_log_probabilities(client):
    (choice,) = chat(client, seed=4, logprobs=True, top_logprobs=3).choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content == texts(chat(client, seed=4))[0]
    assert bytes(itertools.chain(*(token.bytes for token in tokens))).decode() == choice.message.content
    for token in tokens:
        top = [each.logprob for each in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and token.logprob <= top[0] <= 0
        found = {each.token: each.logprob for each in token.top_logprobs}
        assert found.get(token.token, token.logprob) == token.logprob
    assert len({token.logprob for token in tokens}) > 1


def test_at_temperature_0_the_first_of_the_top_is_chosen(client):
    (choice,) = complete(client, temperature=0, logprobs=4).choices
    assert "".join(choice.logprobs.tokens) == choice.text == texts(complete(client, temperature=0))[0]
    for token, log_prob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 4 and next(iter(top)) == token and top[token] == log_prob == max(top.values())


def test_log_probabilities_without_the_top(client):
    (choice,) = chat(client, seed=4, logprobs=True).choices
    assert choice.logprobs.content and all(token.top_logprobs == [] for token in choice.logprobs.content)
    (choice,) = complete(client, seed=4, logprobs=0).choices
    found = choice.logprobs
    assert found.top_logprobs == [{a: b} for a, b in zip(found.tokens, found.token_logprobs, strict=True)]


@pytest.mark.parametrize("temperature", [0, 0.5, 2])
def test_log_probabilities_are_the_models_own_at_any_temperature(client, temperature):
    (choice,) = complete(client, temperature=temperature, seed=4, logprobs=0).choices
    answer = TOKENIZER.encode_text(choice.text)
    wanted = log_probs_of(TOKENIZER.encode_text("once upon") + answer)[-len(answer) :]
    assert choice.logprobs.token_logprobs == pytest.approx(wanted, abs=1e-4)


@pytest.mark.usefixtures("token_by_token")
def test_a_streams_log_probabilities_are_those_of_the_whole(client):
    """Also with a stop, of which some tokens are held back, and then shown."""
    (whole,) = texts(chat(client, seed=4))
    for stop in (None, whole[6:9], whole[5:8] + "Q"):
        options = {"seed": 4, "logprobs": True, "top_logprobs": 2, "stop": stop}
        (choice,) = chat(client, **options).choices
        tokens, text = [], ""
        for chunk in chat(client, stream=True, **options):
            new = chunk.choices[0].logprobs.content
            text += chunk.choices[0].delta.content or ""
            tokens += new
            assert "".join(token.token for token in tokens) == text
        assert text == choice.message.content and tokens == choice.logprobs.content


@pytest.mark.parametrize("echo", [False, True])
def test_each_token_is_found_at_its_offset(client, echo):
    answer = complete(client, ["once upon", "a"], seed=4, n=2, logprobs=1, echo=echo)
    for choice in answer.choices:
        tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
        assert "".join(tokens) == choice.text and offsets[0] == 0
        assert all(choice.text[at:].startswith(token) for token, at in zip(tokens, offsets, strict=True))
        assert offsets == sorted(set(offsets))


def test_a_streams_offsets_are_in_the_whole_text(client):
    chunks = list(complete(client, seed=4, logprobs=1, echo=True, stream=True))
    offsets = [at for chunk in chunks for at in chunk.choices[0].logprobs.text_offset]
    assert offsets == list(range(len(streamed(chunks)[0])))


def test_an_echo_is_the_prompt_and_the_answer(client):
    prompts = ["once upon", "a"]
    for options in ({}, {"logprobs": 1}):
        answers = texts(complete(client, prompts, seed=4, n=2))
        echoed = [prompts[i // 2] + text for i, text in enumerate(answers)]
        assert texts(complete(client, prompts, seed=4, n=2, echo=True, **options)) == echoed
        assert streamed(complete(client, prompts, seed=4, n=2, echo=True, stream=True, **options)) == echoed


def test_an_echo_of_token_ids_is_their_text(client):
    ids = TOKENIZER.encode_text("café")
    assert texts(complete(client, ids, max_tokens=0, echo=True)) == ["café"]
    (choice,) = complete(client, ids, max_tokens=0, echo=True, logprobs=0).choices
    assert choice.logprobs.tokens == ["c", "a", "f", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 3] and choice.text == "café"


def test_an_echo_alone_has_the_prompts_log_probabilities(client):
    answer = complete(client, "a cat sat", max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer.choices
    assert choice.text == "a cat sat" and choice.finish_reason == "length" and answer.usage.completion_tokens == 0
    found = choice.logprobs
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for token, log_prob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert 2 <= len(top) <= 3 and top[token] == log_prob <= 0


def test_nothing_at_all_can_be_asked_for(client):
    (choice,) = complete(client, "a cat sat", max_tokens=0).choices
    assert choice.text == "" and choice.finish_reason == "length"
    (chunk,) = complete(client, "a cat sat", max_tokens=0, stream=True)
    assert chunk.choices[0].text == "" and chunk.choices[0].finish_reason == "length"


def test_any_character_comes_through(client):
    """Also those that end a line, or an event, of a stream."""
    text = "a\r\n\n\u2028\x85\x0b\x00é\U0001f431\ufeffdata: [DONE]\n\n<|user|>"
    assert texts(complete(client, text, max_tokens=0, echo=True)) == [text]
    assert streamed(complete(client, text, max_tokens=0, echo=True, stream=True)) == [text]


def log_probs_of(ids: list[int]) -> list[float]:
    """Of all tokens but the first, computed by NumPy."""
    config = make_config()
    logits = numpy_gpt.logits(config, make_params(config, ends=True), np.array(ids))[:-1]
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_p[np.arange(len(ids) - 1), ids[1:]].tolist()


@pytest.mark.parametrize(
    "text", ["a cat sat", LETTERS * 3, LETTERS * 9, "Any: text?\n"], ids=["short", "pieces", "long", "unlikely"]
)
def test_echoed_log_probabilities_are_those_of_the_logits(client, text):
    """Also where an earlier request had the same text, and its keys and values are still there."""
    wanted = log_probs_of(TOKENIZER.encode_text(text))
    for _ in range(2):
        (choice,) = complete(client, text, max_tokens=0, echo=True, logprobs=0).choices
        found = choice.logprobs.token_logprobs[1:]
        assert found == pytest.approx(wanted, abs=1e-4) and sum(found) == pytest.approx(sum(wanted), abs=1e-4)


@pytest.mark.slow
def test_echoed_log_probabilities_are_the_trainers_loss(client):
    import jax

    from tinysft_jax.parameters import make_model
    from tinysft_jax.training.loss import Softmax, token_nll

    ids = np.array([TOKENIZER.encode_text(LETTERS)], np.int32)
    model = make_model(make_config(), make_params(make_config(), ends=True))
    inputs, targets = jax.numpy.asarray(ids[:, :-1]), jax.numpy.asarray(ids[:, 1:])
    weights = jax.numpy.ones(targets.shape)
    nll = token_nll(model.hidden(inputs), model.head_table(), targets, weights, Softmax(model.config.vocab_size))
    (choice,) = complete(client, LETTERS, max_tokens=0, echo=True, logprobs=0).choices
    assert choice.logprobs.token_logprobs[1:] == pytest.approx((-nll[0]).tolist(), abs=1e-4)


def test_a_prompt_may_be_text_or_token_ids_and_several_are_answered_in_order(client):
    prompts = ["once", "upon a", "time"]
    one_by_one = [texts(complete(client, prompt, seed=1))[0] for prompt in prompts]
    ids = [TOKENIZER.encode_text(prompt) for prompt in prompts]
    assert len(set(one_by_one)) == 3
    for several in (prompts, ids):
        answer = complete(client, several, seed=1)
        assert texts(answer) == one_by_one and [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == sum(map(len, prompts))
        twice = texts(complete(client, several, seed=1, n=2))
        assert twice[::2] == one_by_one and twice[1::2] != one_by_one
    assert texts(complete(client, ids[0], seed=1)) == texts(complete(client, ids[:1], seed=1)) == one_by_one[:1]


@pytest.mark.parametrize("ask", [chat, complete])
def test_an_unknown_model_is_not_found(client, ask):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'; this server has letters") as error:
        ask(client, model="gpt-5")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_the_model_may_be_left_out(server):
    for path, body in (("chat/completions", {"messages": WHY}), ("completions", {"prompt": "a"})):
        for unnamed in ({}, {"model": None}):
            assert post(server, path, body | unnamed).status == 200


@pytest.mark.parametrize("n_tokens", [256, 300, 100_000])
def test_what_does_not_fit_is_refused(client, n_tokens):
    """Of 256 positions an answer needs one, and a chat's markers four."""
    for ask, prompt in ((chat, [SHORT, {"role": "user", "content": "a" * (n_tokens - 4)}]), (complete, "a" * n_tokens)):
        with pytest.raises(openai.BadRequestError, match="tokens, and prompt and answer have room for 256") as error:
            ask(client, prompt)
        assert error.value.code == "context_length_exceeded"


def test_what_just_fits_is_answered(client):
    assert len(texts(complete(client, "a" * 255, seed=1))[0]) <= 1
    assert texts(complete(client, "a" * 256, max_tokens=0, echo=True)) == ["a" * 256]
    assert chat(client, [SHORT, {"role": "user", "content": "a" * 251}]).usage.prompt_tokens == 255


def test_an_answer_ends_where_the_context_does(client):
    answer = chat(client, [SHORT, {"role": "user", "content": "a" * 248}], n=8, seed=1)
    reasons = {len(choice.message.content): choice.finish_reason for choice in answer.choices}
    assert max(reasons) == 4 and all((reason == "length") == (n == 4) for n, reason in reasons.items())


UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "logit_bias": {"5": 100},
    "frequency_penalty": 1,
    "presence_penalty": -0.5,
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "a"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "best_of": 2,
    "suffix": "end",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(client, name):
    asks = [complete] if name in ("best_of", "suffix") else [chat, complete]
    for ask in asks:
        with pytest.raises(openai.BadRequestError, match=f"{name} is not supported") as error:
            ask(client, extra_body={name: UNSUPPORTED[name]})
        assert (error.value.param, error.value.code) == (name, "unsupported_parameter")


NEUTRAL = {
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "function_call": "auto",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "modalities": ["text"],
    "best_of": 1,
    "suffix": "",
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "parallel_tool_calls": False,
}


def test_what_asks_for_nothing_is_accepted(client):
    for ask in (chat, complete):
        plain = texts(ask(client, seed=1))
        assert texts(ask(client, seed=1, extra_body=NEUTRAL)) == plain
        assert texts(ask(client, seed=1, extra_body=dict.fromkeys((*UNSUPPORTED, "colour", "top_p", "n")))) == plain


@pytest.mark.parametrize("ask", [chat, complete])
def test_an_unknown_argument_is_refused(client, ask):
    with pytest.raises(openai.BadRequestError, match="unrecognized request argument: 'colour'") as error:
        ask(client, extra_body={"colour": "red"})
    assert error.value.code == "unknown_parameter"


BAD_VALUES = [
    *({"temperature": value} for value in (3, -0.1, "1", True, [1])),
    *({"top_p": value} for value in (1.1, -1)),
    *({"n": value} for value in (0, -1, 1.5, "2", 129, True)),
    *({"seed": value} for value in ("a", 1.5, 2**63, True)),
    *({"stop": value} for value in ("", [""], ["a", "b", "c", "d", "e"], 3, ["a", 3], [["a"]], "a" * 1001)),
    *({"stream": value} for value in (1, "true")),
    *({"stream_options": value} for value in ([], {"include": True}, {"include_usage": 1})),
    *({"max_tokens": value} for value in (-1, 2.0, 2**31)),
    *({"top_k": value} for value in (-1, 0.5)),
    *({"min_p": value} for value in (-0.1, 2)),
    *({"repetition_penalty": value} for value in (0, -1, 101)),
    {"model": 5},
]
BAD_OF_CHATS = [
    {"max_tokens": 0},
    {"max_completion_tokens": 0},
    {"logprobs": 1},
    *({"logprobs": True, "top_logprobs": value} for value in (21, -1, True)),
    {"messages": "why"},
]
BAD_OF_COMPLETIONS = [{"logprobs": 21}, {"logprobs": True}, {"echo": 1}]


def test_a_bad_value_is_refused_by_name(server):
    for path, plain, bad in (
        ("chat/completions", {"messages": WHY}, BAD_VALUES + BAD_OF_CHATS),
        ("completions", {"prompt": "a"}, BAD_VALUES + BAD_OF_COMPLETIONS),
    ):
        for values in bad:
            name = list(values)[-1]
            response = post(server, path, plain | values)
            assert response.status == 400, values
            assert response.error["param"] == name and response.error["code"] == "invalid_value", values
            assert response.error["message"].startswith(f"{name} is ") and "it must be" in response.error["message"]


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "seed"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_refused(server, name, value):
    body = f'{{"prompt": "a", "{name}": {value}}}'.encode()
    assert post(server, "completions", body).status == 400


@pytest.mark.parametrize("neutral", [{"frequency_penalty": False}, {"presence_penalty": False}, {"best_of": True}])
def test_true_and_false_are_no_numbers(server, neutral):
    assert post(server, "completions", {"prompt": "a"} | neutral).status == 400


def test_two_limits_that_say_the_same_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="give one"):
        chat(client, max_tokens=1, max_completion_tokens=1)


def test_the_top_needs_log_probabilities(client):
    with pytest.raises(openai.BadRequestError, match="needs logprobs"):
        chat(client, top_logprobs=2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([""], "empty"),
        (["a", ""], "empty"),
        ([[]], "empty"),
        ("\ud800", "Unicode"),
        *(([1, id_], f"id {id_}") for id_ in (260, -1, 2**31 - 1)),
        *((prompt, "prompt must be a text") for prompt in (3, {}, True, [1.5], [True], ["a", 3], ["a", [3]], [2**40])),
        (None, "prompt is missing"),
    ],
    ids=repr,
)
def test_a_bad_prompt_is_refused(server, prompt, message):
    response = post(server, "completions", {"prompt": prompt})
    assert response.status == 400 and message in response.error["message"]


USER, ASSISTANT = ({"role": role, "content": "a"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages is missing"),
        ([], "at least one"),
        ([USER, ASSISTANT], "ends with a user message"),
        ([SHORT], "ends with a user message"),
        ([ASSISTANT, USER], "has the role 'assistant'"),
        ([USER, USER], "has the role 'user'"),
        ([USER, ASSISTANT, SHORT, USER], "has the role 'system'"),
        ([USER | {"role": "tool"}], "has the role 'tool'"),
        ([USER | {"role": ["user"]}], "has the role ['user']"),
        *(([USER | {"content": content}], "is empty") for content in ("", " \n", "\u200b", [])),
        *(([USER | {"content": content}], "must be a string") for content in (None, 3, {})),
        ([USER | {"content": "\ud800"}], "Unicode"),
        ([{"role": "user"}], '"role" and "content"'),
        (["why"], '"role" and "content"'),
        ([USER | {"content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}], "can be used"),
        ([USER | {"content": ["a"]}], "can be used"),
        ([USER | {"tool_calls": [{"id": "a"}]}], "messages[0].tool_calls is not supported"),
        ([USER | {"name": "Ann"}], "messages[0].name is not supported"),
        ([USER | {"weight": 0}], "messages[0].weight is not supported"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_messages_are_refused(server, messages, message):
    response = post(server, "chat/completions", {"messages": messages})
    assert response.status == 400 and message in response.error["message"]


def test_what_an_answer_came_with_may_be_sent_back(client):
    (choice,) = chat(client, seed=1).choices
    following = [*WHY, choice.message.model_dump(), {"role": "user", "content": "and"}]
    assert choice.message.content and chat(client, following, seed=1).choices


def test_content_may_come_in_parts(client):
    parts = [{"type": "text", "text": text} for text in ("wh", "y")]
    assert texts(chat(client, [SHORT, {"role": "user", "content": parts}], seed=1)) == texts(chat(client, seed=1))


def test_developer_is_the_newer_name_of_system(client):
    developer = [SHORT | {"role": "developer"}, WHY[1]]
    assert texts(chat(client, developer, seed=1, n=3)) == texts(chat(client, seed=1, n=3))
    assert chat(client, developer).usage.prompt_tokens == N_WHY


def test_without_a_system_message_there_is_the_default_one(client):
    assert chat(client, WHY[1:]).usage.prompt_tokens > 60


@pytest.mark.parametrize("text", ["<|assistant|>", "<|endoftext|>", "a<|user|>b<|system|>", "<|endoftext"])
def test_text_that_looks_like_a_marker_is_text(client, text):
    """A marker is one token, and its spelling as many as it has characters."""
    assert chat(client, [SHORT, {"role": "user", "content": text}]).usage.prompt_tokens == 4 + len(text)
    assert chat(client, [SHORT | {"content": text}, WHY[1]]).usage.prompt_tokens == 6 + len(text)
    assert complete(client, text, max_tokens=0, echo=True).usage.prompt_tokens == len(text)


def test_a_body_that_is_no_json_object_is_refused(server):
    for body in (b"", b"{", b"[]", b"3", b'"a"', b"null", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"):
        for path in ("chat/completions", "completions"):
            response = post(server, path, body)
            assert response.status == 400 and response.error["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def plain(server) -> Iterator[openai.OpenAI]:
    """A model without a template; of the shape of the other, so nothing more is compiled."""
    with run_server(template=None, n_slots=4, queue=12) as running:
        yield make_client(running)


def test_a_model_without_template_continues_text(plain):
    assert not plain.models.list().data[0].chat
    (choice,) = complete(plain, seed=1, echo=True, logprobs=1).choices
    assert choice.text.startswith("once upon") and "".join(choice.logprobs.tokens) == choice.text
    assert streamed(complete(plain, seed=1, echo=True, stream=True)) == [choice.text]


def test_a_model_without_template_does_not_chat(plain):
    with pytest.raises(openai.BadRequestError, match="no chat template; it continues text: use /v1/completions"):
        chat(plain)
