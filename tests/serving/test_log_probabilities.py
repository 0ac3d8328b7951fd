"""What the API tells of tokens' log-probabilities, of answers and of prompts, which it can echo."""

import itertools

import numpy as np
import numpy_gpt
import pytest
from serving_client import TOKENIZER, chat, complete, streamed, texts
from tiny_model import LETTERS, make_config, make_params


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
