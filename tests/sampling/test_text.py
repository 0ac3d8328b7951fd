"""Requests as ids, and answers as text in whole characters."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_tokenizer

from tinysft_jax.console import UserError
from tinysft_jax.sampling.text import AnswerStream, encode_request

TOKENIZER = make_tokenizer("control")


def ids_of(data: bytes) -> list[int]:
    byte_ids = {TOKENIZER.decode_bytes([i]): i for i in range(256)}
    return [byte_ids[bytes([byte])] for byte in data]


def test_characters_come_whole():
    stream = AnswerStream(TOKENIZER, iter([[id_] for id_ in ids_of("aé…b".encode() + b"\xc3")]))
    assert list(stream) == ["a", "é", "…", "b", "\ufffd"]
    assert stream.n_tokens == 8


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_whole(text):
    shown = "".join(AnswerStream(TOKENIZER, ([id_] for id_ in TOKENIZER.encode_text(text))))
    assert shown == text


def test_figures_leave_out_the_first_tokens_time():
    def chunks():
        time.sleep(0.2)
        yield [1]
        time.sleep(0.1)
        yield [1] * 10

    stream = AnswerStream(TOKENIZER, chunks())
    assert stream.seconds_to_first is None and stream.tokens_per_second is None
    list(stream)
    assert stream.n_tokens == 11 and stream.seconds_to_first >= 0.2
    assert 10 < stream.tokens_per_second <= 100


def test_a_request_without_template_is_the_text_itself():
    plain = make_tokenizer(None)
    assert plain.decode(encode_request(plain, "Once <|user|>")) == "Once <|user|>"
    with pytest.raises(UserError, match="takes no system message"):
        encode_request(plain, "Once", system="S")
