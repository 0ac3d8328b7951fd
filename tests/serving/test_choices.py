"""Answers' text while it is generated: whole characters, up to the first stop string, nothing too early or too late."""

import codecs
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer

from tinysft_jax.sampling.engine import News
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.steps import N_RANKED, Ranked
from tinysft_jax.sampling.text import AnswerText
from tinysft_jax.serving.calls import Call
from tinysft_jax.serving.choices import Choice, Piece
from tinysft_jax.tokenizer import ChatTokenizer

BYTES = make_tokenizer("control")
WORDS = ChatTokenizer(None, bpe_ranks=1000)  # with tokens of several characters


def ids_of(data: bytes) -> list[int]:
    """A token a byte."""
    byte_ids = {BYTES.decode_bytes([i]): i for i in range(256)}
    return [byte_ids[bytes([byte])] for byte in data]


def pieces(text: str | bytes, stops: Sequence[str] = (), size: int = 1) -> list[str]:
    """What is released of a text, `size` tokens at a time; "" when nothing is. Ends where a stop has come."""
    ids, answer, found = ids_of(text.encode() if isinstance(text, str) else text), AnswerText(BYTES, stops), []
    for start in range(0, len(ids), size):
        if not answer.is_stopped:
            found.append(answer.add(ids[start : start + size], is_last=start + size >= len(ids)))
    return found


def test_text_without_stops_comes_at_once():
    assert pieces("abc") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("axb", ["x"], ["a", ""]),
        ("abcd", ["bc"], ["a", "", ""]),
        ("abd", ["bc"], ["a", "", "bd"]),
        ("aaab", ["aab"], ["", "", "a", ""]),  # all may begin the stop, until there are too many
        ("aaac", ["aab"], ["", "", "a", "aac"]),
        ("ababac", ["abac"], ["", "", "", "ab", "", ""]),  # the second beginning lies in the first
        ("abcx", ["abcd", "bcx"], ["", "", "", "a"]),  # a stop in what was held back for a longer one
        ("abcd", ["abcdef", "cd"], ["", "", "", "ab"]),
        ("xyab", ["ab", "b"], ["x", "y", "", ""]),  # both end here; the longer begins earlier
        ("xyab", ["b", "ab"], ["x", "y", "", ""]),
        ("abcd", ["cd", "abx"], ["", "", "ab", ""]),
        ("ab", ["abc"], ["", "ab"]),  # what might have been a stop is shown once the answer has ended
        ("éa", ["é"], ["", ""]),
        ("aéb", ["éb"], ["a", "", "", ""]),
    ],
)
def test_only_what_may_begin_a_stop_is_held_back(text, stops, wanted):
    assert pieces(text, stops) == wanted


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_stop_that_is_complete_first_ends_the_answer(size):
    """Though another one, which begins earlier, would follow: it does not depend on how the tokens come."""
    assert "".join(pieces("abcd", ["abcd", "bc"], size)) == "a"
    assert "".join(pieces("abcdbc", ["bc", "abcd"], size)) == "a"


def test_nothing_after_a_stop_is_looked_at():
    answer = AnswerText(BYTES, ["b"])
    assert answer.add(ids_of(b"abcd"), is_last=False) == "a"
    assert answer.is_stopped and len(answer.starts) == 2 and answer.n_released == 1


def test_characters_come_whole():
    assert pieces("aé…b".encode() + b"\xc3") == ["a", "", "é", "", "", "…", "b", "\ufffd"]
    assert pieces(b"\xff\xc3a") == ["\ufffd", "", "\ufffda"]


def test_a_token_begins_where_its_character_does():
    answer = AnswerText(BYTES)
    answer.add(ids_of("aé…b".encode()), is_last=True)
    assert answer.starts == [0, 1, 1, 2, 2, 2, 3]


def test_a_character_that_broke_off_can_be_a_stop():
    """As it is if another one follows."""
    assert "".join(pieces(b"a\xc3b", ["\ufffd"])) == "a"
    assert "".join(pieces(b"a\xc3", ["\ufffd"])) == "a"


def text_after(tokenizer: ChatTokenizer, ids: Sequence[int], is_last: bool = False) -> str:
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return utf8.decode(tokenizer.decode_bytes(ids), final=is_last)


def cut_at_the_first_stop(tokenizer: ChatTokenizer, ids: Sequence[int], stops: Sequence[str]) -> str:
    """By searching all of the text after each token."""
    for n in range(1, len(ids) + 1):
        text = text_after(tokenizer, ids[:n])
        if places := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(places)]
    return text_after(tokenizer, ids, is_last=True)


@st.composite
def answers(draw: st.DrawFn) -> tuple[ChatTokenizer, list[list[int]], list[str]]:
    """Chunks of ids, and stops of which parts are likely to come: of few letters, or from the text itself."""
    if draw(st.booleans()):
        tokenizer, text = BYTES, draw(st.text("ab", max_size=12) | st.text("aé…\U0001f431", max_size=6))
        ids = ids_of(text.encode())
        ids = ids[: len(ids) - draw(st.integers(0, 1))]
    else:
        tokenizer = WORDS
        ids = draw(st.lists(st.integers(0, 255) | st.integers(256, 999), max_size=8))
    text = text_after(tokenizer, ids)
    stops = st.text("abé…", min_size=1, max_size=5)
    if text:
        part = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 5)).map(lambda cut: text[cut[0] : sum(cut)])
        stops = stops | part | st.builds("{}{}".format, part, st.sampled_from("a\0"))
    # What breaks off at the end is a case of its own, above.
    stops = draw(st.lists(stops.filter(lambda stop: "\ufffd" not in stop), max_size=4))
    ends = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    return tokenizer, [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)], stops


@settings(max_examples=200)
@given(answers())
def test_any_answer_in_any_chunks(given_answer):
    tokenizer, chunks, stops = given_answer
    ids = [id_ for chunk in chunks for id_ in chunk]
    answer, shown, n_added = AnswerText(tokenizer, stops), "", 0
    for number, chunk in enumerate(chunks):
        is_last = number == len(chunks) - 1
        shown += answer.add(chunk, is_last)
        n_added += len(chunk)
        if answer.is_stopped:
            break
        if not is_last:
            text = text_after(tokenizer, ids[:n_added])
            may_begin = [n for n in range(len(text)) if any(stop.startswith(text[n:]) for stop in stops)]
            assert shown == text[: min(may_begin, default=len(text))]
    assert shown == cut_at_the_first_stop(tokenizer, ids, stops) and answer.n_released == len(shown)
    assert answer.is_stopped or shown == text_after(tokenizer, ids, is_last=True)


PROMPT = ids_of(b"Hi")


def ranked(n: int) -> Ranked:
    return Ranked(-np.arange(n, dtype=np.float32), np.zeros((n, N_RANKED), np.int32), np.zeros((n, N_RANKED)))


def choice(posted: list[Piece], streams: bool = True, stops: Sequence[str] = (), texts: Sequence[str] = ()) -> Choice:
    """One that asks for log-probabilities."""
    call = Call(False, [PROMPT], list(texts), SamplingOptions(), 1, tuple(stops), 1, streams, False)
    return Choice(call, BYTES, 0, posted.append)


def tell(made: Choice, text: bytes, finish: str | None = None) -> bool:
    return made.request.receive(News(ids_of(text), ranked(len(text)), finish))


def told(posted: list[Piece]) -> list[tuple[str, str, str | None]]:
    return [(piece.text, b"".join(token.spelled for token in piece.tokens).decode(), piece.finish) for piece in posted]


def test_pieces_are_posted_with_their_tokens():
    made = choice(posted := [], stops=["cd"])
    for text in (b"a", b"bc", b"\xc3", b"\xa9"):
        assert tell(made, text)
    assert not tell(made, b"c", "length")
    assert told(posted) == [("a", "a", None), ("b", "b", None), ("cé", "cé", None), ("c", "c", "length")]
    assert [piece.n_generated for piece in posted] == [1, 3, 5, 6]
    assert len({piece.seconds for piece in posted}) == 1


def test_without_a_stream_there_is_one_piece():
    made = choice(posted := [], streams=False, stops=["cd"])
    for text in (b"a", b"bc"):
        assert tell(made, text)
    assert not tell(made, b"de"), "no more is wanted"
    assert told(posted) == [("ab", "ab", "stop")] and posted[0].n_generated == 4


def test_an_answer_may_be_empty():
    made = choice(posted := [])
    assert not tell(made, b"", "stop")
    assert told(posted) == [("", "", "stop")]


def test_an_echo_comes_first_and_once():
    made = choice(posted := [], texts=["Hi"])
    made.request.prompt_ranked.append(ranked(1))
    tell(made, b"a")
    tell(made, b"b", "stop")
    assert told(posted) == [("Hia", "Hia", None), ("b", "b", "stop")]
    tokens = [token for piece in posted for token in piece.tokens]
    assert [token.start for token in tokens] == [0, 1, 2, 3] and tokens[0].log_prob is None


@pytest.mark.parametrize("n_ranked", [0, 1])
def test_a_request_can_end_before_its_prompt_was_read(n_ranked):
    """Its client has gone while it waited, or the server is stopped: an error here would end the engine."""
    made = choice(posted := [], texts=["Hi!"])
    made.request.prompt = ids_of(b"Hi!")
    made.request.prompt_ranked += [ranked(n) for n in range(n_ranked)]
    assert not made.request.receive(News([], None, "cancelled"))
    assert [piece.finish for piece in posted] == ["cancelled"]
