"""Requests that the API refuses, and says why."""

import openai
import pytest
from serving_client import SHORT, WHY, chat, complete, texts
from serving_model import post


@pytest.mark.parametrize("ask", [chat, complete])
def test_an_unknown_model_is_not_found(client, ask):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'; this server has letters") as error:
        ask(client, model="gpt-5")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("n_tokens", [256, 300, 100_000])
def test_what_does_not_fit_is_refused(client, n_tokens):
    """Of 256 positions an answer needs one, and a chat's markers four."""
    for ask, prompt in ((chat, [SHORT, {"role": "user", "content": "a" * (n_tokens - 4)}]), (complete, "a" * n_tokens)):
        with pytest.raises(openai.BadRequestError, match="tokens, and prompt and answer have room for 256") as error:
            ask(client, prompt)
        assert error.value.code == "context_length_exceeded"


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


def test_a_body_that_is_no_json_object_is_refused(server):
    for body in (b"", b"{", b"[]", b"3", b'"a"', b"null", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"):
        for path in ("chat/completions", "completions"):
            response = post(server, path, body)
            assert response.status == 400 and response.error["type"] == "invalid_request_error"
