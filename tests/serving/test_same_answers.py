"""What a request is answered does not depend on who else is served, and is what `sample.py` says."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving_model import Running, post
from tiny_model import make_config, make_decoder, make_tokenizer

from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import encode_request, text_options

TOKENIZER = make_tokenizer("control")
PROMPTS = [
    "why",
    "a cat",
    "o" * 20,
    "dog",
    "the dog ran",
    "x y z",
    "tell a story",
    "é…",
    "why not",
    "1 + 1",
    "no",
    "?!",
]


def body_of(number: int) -> dict[str, Any]:
    """One of sixteen requests, no two alike; the even ones are chats."""
    prompt = PROMPTS[number % len(PROMPTS)]
    options = [{}, {"top_p": 0.9}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 9}, {"min_p": 0.01}]
    options.append({"repetition_penalty": 1.3})
    body = {"seed": number, "max_tokens": 30} | options[number % len(options)]
    if number % 2:
        return body | {"prompt": prompt}
    return body | {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}]}


def ask(server: Running, body: dict[str, Any], streams: bool = False) -> str:
    path = "chat/completions" if "messages" in body else "completions"
    response = post(server, path, body | {"stream": streams})
    assert response.status == 200, response.body
    if not streams:
        (choice,) = json.loads(response.body)["choices"]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    events = [event.removeprefix("data: ") for event in response.body.decode().split("\n\n")[:-2]]
    choices = [json.loads(event)["choices"][0] for event in events]
    return "".join(each["text"] if "text" in each else each["delta"].get("content", "") for each in choices)


@pytest.fixture(scope="module")
def alone(server) -> list[str]:
    """The answers to sixteen requests, one after another."""
    found = [ask(server, body_of(number)) for number in range(16)]
    assert len(set(found)) > 12 and max(map(len, found)) == 30
    return found


@pytest.mark.parametrize("streams", ["none", "all", "every third"])
def test_an_answer_is_the_same_alone_and_among_others(server, alone, streams):
    """Sixteen at a time, for four slots, in another order."""
    order = np.random.default_rng(len(streams)).permutation(16).tolist()
    chosen = {"none": (), "all": order, "every third": order[::3]}[streams]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda number: ask(server, body_of(number), number in chosen), order)
    assert dict(zip(order, found, strict=True)) == dict(enumerate(alone))


def test_a_stream_alone_says_the_same(server, alone):
    assert [ask(server, body_of(number), streams=True) for number in range(16)] == alone


def chat_about(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}], "max_tokens": 30}


@pytest.fixture(scope="module")
def generate() -> Callable[..., list[str]]:
    """The answers that `sample.py` gives to twelve prompts: of one number and length, so that it compiles once."""
    decoder = make_decoder()

    def generate(prompts: list[str], **options) -> list[str]:
        options = text_options(SamplingOptions(30, top_k=0, **options), TOKENIZER, make_config())
        ids = [encode_request(TOKENIZER, prompt, "s") for prompt in prompts]
        return [TOKENIZER.decode(answer) for answer in decoder.generate(ids, options)]

    return generate


def test_at_temperature_0_answers_are_those_of_generate(server, generate):
    wanted = generate(PROMPTS, temperature=0)
    assert len(set(wanted)) > 1
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = pool.map(lambda prompt: ask(server, chat_about(prompt) | {"temperature": 0}), PROMPTS)
    assert list(found) == wanted


def test_a_seed_draws_what_it_draws_in_sample_py(server, generate):
    for options in ({"seed": 7}, {"seed": 2**32 - 1, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2}):
        wanted = generate(12 * ["why"], **{"temperature": 1.0} | options)
        response = post(server, "chat/completions", chat_about("why") | {"n": 12} | options)
        assert [choice["message"]["content"] for choice in json.loads(response.body)["choices"]] == wanted
        assert len(set(wanted)) > 8


def test_a_conversation_that_goes_on_is_answered_as_if_it_were_new(server):
    """While its beginning is still in a slot, and once other requests have taken all slots."""
    messages, answers = [{"role": "system", "content": "s"}], []

    def answer(n_messages: int) -> str:
        return ask(server, {"messages": messages[:n_messages], "seed": 3, "max_tokens": 20})

    for prompt in PROMPTS[:4]:
        messages.append({"role": "user", "content": prompt})
        answers.append(answer(len(messages)))
        messages.append({"role": "assistant", "content": answers[-1] or "none"})
    for turn in range(4):
        for number in range(4):
            ask(server, {"prompt": (150 * PROMPTS[number])[:150], "max_tokens": 1})
        assert answer(2 * turn + 2) == answers[turn]
