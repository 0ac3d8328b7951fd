"""OpenAI's API, asked by OpenAI's client: chats and completions, whole and in streams."""

import json
import re
from collections import Counter
from collections.abc import Iterator

import openai
import pytest
from serving_client import SHORT, TOKENIZER, WHY, chat, complete, make_client, streamed, texts
from serving_model import post, run_server
from tiny_model import LETTERS

N_WHY = 7  # tokens of WHY: a byte each, and three markers
EIGHT = {"n": 8, "seed": 4, "max_tokens": 40}


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


def test_the_model_may_be_left_out(server):
    for path, body in (("chat/completions", {"messages": WHY}), ("completions", {"prompt": "a"})):
        for unnamed in ({}, {"model": None}):
            assert post(server, path, body | unnamed).status == 200


def test_what_just_fits_is_answered(client):
    assert len(texts(complete(client, "a" * 255, seed=1))[0]) <= 1
    assert texts(complete(client, "a" * 256, max_tokens=0, echo=True)) == ["a" * 256]
    assert chat(client, [SHORT, {"role": "user", "content": "a" * 251}]).usage.prompt_tokens == 255


def test_an_answer_ends_where_the_context_does(client):
    answer = chat(client, [SHORT, {"role": "user", "content": "a" * 248}], n=8, seed=1)
    reasons = {len(choice.message.content): choice.finish_reason for choice in answer.choices}
    assert max(reasons) == 4 and all((reason == "length") == (n == 4) for n, reason in reasons.items())


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
