"""Hostile bodies are read or refused in order: nothing else is ever raised, and nothing breaks."""

import copy
import http.client
import json
import math
import os
import time
from collections import Counter
from random import Random
from typing import Any

import hostile_chats
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_model import Running, post
from tiny_model import make_config, make_decoder, make_tokenizer

from tinysft_jax.console import UserError
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.text import text_options
from tinysft_jax.serving.calls import ApiError, Call, Reader
from tinysft_jax.tokenizer import ChatTokenizer

MOST = 16  # answers at a time, as in the fixture `server`
N_INPUTS = int(os.environ.get("FUZZ_INPUTS", "10000"))
LONGEST_SECONDS = 10.0

OPTIONS = {
    **{"model": "letters", "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x", "yz"], "stream": True},
    **{"stream_options": {"include_usage": True}, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1},
    **{"max_tokens": 3, "frequency_penalty": 0, "tools": [], "logit_bias": {}, "user": "me"},
}
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " é"}]},
    {"role": "assistant", "content": "Ho", "refusal": None},
    {"role": "user", "content": "why"},
]
BODIES = [
    ("chat", OPTIONS | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3}),
    ("chat", {"messages": MESSAGES[-1:], "max_completion_tokens": 2}),
    *(
        ("text", OPTIONS | {"prompt": prompt, "logprobs": 3, "echo": True})
        for prompt in ("why", ["why", "not"], [1, 2], [[1, 2], [3]])
    ),
    ("text", {"prompt": "why", "max_tokens": 0}),
]
VALUES = [value for value in hostile_chats.VALUES if not isinstance(value, bytes)]
VALUES += [
    -1,
    256,
    259,
    260,
    2**31,
    -(2**63),
    2**64,
    10**400,
    1e308,
    5e-324,
    -0.0,
    math.inf,
    -math.inf,
    [1],
    [[1]],
    [-1],
]
VALUES += ["\ud800\udc00", "\udfff", "x" * 5_000, "é" * 200, "<|endoftext|>", [""], ["a"] * 5, 300 * [1], 20 * ["a"]]
KEYS = [*OPTIONS, "messages", "prompt", "role", "content", "tool_calls", "echo", "", "\ud800", "\x1b[2J", "x" * 3_000]
BYTES = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\n",
]
BYTES += [b"NaN", b"-Infinity", b"1e400", b"-0", b"9" * 5_000, b"[" * 2_000, b'{"a":' * 2_000, b" " * 1_000, b"\\"]


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """All boxes in a value, each with each of its keys or indices."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in [(value, key), *places_of(value[key])]]


def altered(draw: Random, body: dict[str, Any]) -> bytes:
    """A body in which up to three things, at any depth, were lost, renamed, doubled or replaced; or some bytes were."""
    body = copy.deepcopy(body)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        if not (places := places_of(body)):
            break
        (box, key), edit = draw.choice(places), draw.randrange(6)
        if edit == 0:
            del box[key]
        elif edit == 1 and isinstance(box, dict):
            box[draw.choice(KEYS)] = box.pop(key)
        elif edit == 1:
            box.insert(key, copy.deepcopy(box[key]))
        elif edit == 2:
            box[key] = [box[key]] * draw.randint(0, 3)
        else:
            box[key] = copy.deepcopy(draw.choice(VALUES))
    content = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.2:
        for _ in range(draw.randint(1, 3)):
            at, n = draw.randrange(len(content) + 1), draw.choice([0, 0, 1, 5])
            content = content[:at] + draw.choice(BYTES) + content[at + n :]
    return content if draw.random() < 0.95 else draw.choice([b"", content[: draw.randrange(len(content))], *BYTES])


@st.composite
def hostile_bodies(draw: st.DrawFn) -> tuple[bool, bytes]:
    """Whether it is for chats, and the body."""
    kind, body = draw(st.sampled_from(BODIES))
    return (kind == "chat") ^ (draw(st.integers(0, 19)) == 0), altered(Random(draw(st.integers(0, 2**63))), body)


def make_reader(template: str | None) -> Reader:
    tokenizer = make_tokenizer(template)
    options = text_options(SamplingOptions(), tokenizer, make_config())
    return Reader(make_decoder(), tokenizer, options, "letters", MOST)


@pytest.fixture(scope="module")
def readers() -> list[Reader]:
    """The first is of the model that the server of these tests has."""
    return [make_reader(template) for template in ("control", "text", None)]


def outcome(reader: Reader, content: bytes, is_chat: bool) -> str:
    """ "answered", or the status with which a body is refused."""
    start = time.monotonic()
    try:
        call = reader.read(content, is_chat)
    except ApiError as error:
        assert error.status in (400, 404, 413)
        refused = json.loads(error.response().body)["error"]
    except UserError as error:
        refused = json.loads(ApiError(400, str(error)).response().body)["error"]
    else:
        check(call, reader)
        return "answered"
    assert 0 < len(refused["message"]) < 2_000 and "\n" not in refused["message"]
    assert time.monotonic() - start < LONGEST_SECONDS
    return "refused"


def check(call: Call, reader: Reader) -> None:
    """What the engine relies on."""
    assert 1 <= call.n * len(call.prompts) <= MOST and len(call.texts) in (0, len(call.prompts))
    for prompt in call.prompts:
        assert len(prompt) + min(call.options.max_new_tokens, 1) <= reader.length
        assert prompt and all(type(id_) is int and 0 <= id_ < make_config().vocab_size for id_ in prompt)
    assert len(call.stops) <= 4 and all(isinstance(stop, str) and stop for stop in call.stops)
    assert call.n_ranked is None or 0 <= call.n_ranked <= 20
    assert isinstance(call.streams, bool) and isinstance(call.counts, bool)
    "".join(call.texts).encode()


@pytest.mark.parametrize(("kind", "body"), BODIES, ids=range(len(BODIES)))
def test_the_bodies_that_are_altered_are_sound(readers, kind, body):
    assert outcome(readers[0], json.dumps(body).encode(), kind == "chat") == "answered"


@pytest.mark.parametrize(
    ("is_chat", "body"),
    [
        (False, {"prompt": "a" * 40_000}),
        (False, {"prompt": ["a", "a" * 40_000]}),
        (True, {"messages": [{"role": "user", "content": "a" * 40_000}]}),
        (True, {"messages": 1_001 * MESSAGES[-1:]}),
        (False, {"prompt": 100_000 * ["a"]}),
    ],
    ids=["text", "texts", "chat", "messages", "prompts"],
)
def test_what_is_far_too_much_is_not_encoded_first(readers, monkeypatch, is_chat, body):
    encoded = []
    monkeypatch.setattr(ChatTokenizer, "encode_text", lambda *_: encoded.append(1) or [1])
    monkeypatch.setattr(ChatTokenizer, "encode_prompt", lambda *_: encoded.append(1) or np.ones(1, np.int32))
    assert outcome(readers[0], json.dumps(body).encode(), is_chat) == "refused"
    assert not encoded


@settings(max_examples=300)
@given(given_body=hostile_bodies(), number=st.sampled_from([0, 0, 0, 1, 2]))
def test_any_body_is_read_or_refused(readers, given_body, number):
    is_chat, content = given_body
    outcome(readers[number], content, is_chat)


@pytest.mark.soak
def test_any_body_is_answered_or_refused_over_http(server: Running):
    """One after another on one connection, and the server still answers right."""
    draw, statuses = Random(0), Counter()
    sound = {"messages": MESSAGES[-1:], "seed": 1, "max_tokens": 5}
    before = json.loads(post(server, "chat/completions", sound).body)["choices"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for number in range(N_INPUTS):
        kind, body = draw.choice(BODIES)
        path = {"chat": "chat/completions", "text": "completions"}[kind]
        start = time.monotonic()
        connection.request("POST", f"/v1/{path}", altered(draw, body), {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        assert response.status in (200, 400, 404, 413), (number, response.status, content)
        assert b'"error"' not in content or response.status != 200, content
        assert time.monotonic() - start < LONGEST_SECONDS
        statuses[response.status] += 1
        if number % 1_000 == 0:
            assert json.loads(post(server, "chat/completions", sound).body)["choices"] == before
    connection.close()
    print(f"\nFIGURES {json.dumps({'test': 'bodies over HTTP', **statuses})}")
    assert json.loads(post(server, "chat/completions", sound).body)["choices"] == before
    assert statuses[200] > N_INPUTS / 20 and statuses[400] > N_INPUTS / 5
