"""Conversations, with a decoder that says what the test wants it to."""

import contextlib
from collections.abc import Iterator

import pytest

from tinysft_jax.errors import UserError
from tinysft_jax.model import GPTConfig
from tinysft_jax.sampling.decode import Decoder, Prompt
from tinysft_jax.sampling.options import SamplingOptions
from tinysft_jax.sampling.session import ChatSession, encode_request, stream_text, text_options
from tinysft_jax.tokenizer import ChatTokenizer

TOKENIZER = ChatTokenizer("control", bpe_ranks=256)  # a token a byte


class Parrot(Decoder):
    """Streams the ids it was given, and keeps the prompts it got."""

    def __init__(self, *answers: bytes, context: int = 120):
        self.config = GPTConfig(vocab_size=300, dim=8, n_layers=1, n_heads=1, max_seq_len=context)
        byte_ids = {bytes([byte]): i for i in range(256) for byte in TOKENIZER.decode_bytes([i])}
        self.answers = [[byte_ids[bytes([byte])] for byte in answer] for answer in answers]
        self.prompts, self.options = [], None

    def stream(self, prompt: Prompt, options: SamplingOptions) -> Iterator[list[int]]:
        self._checked(prompt, "the prompt")
        self.prompts.append(TOKENIZER.decode(prompt))
        self.options = options
        return iter([[id_] for id_ in self.answers.pop(0)])


def converse(session: ChatSession, text: str) -> str:
    return "".join(session.answer(text))


def test_a_conversation_is_remembered_until_it_is_reset():
    parrot = Parrot(b"One.", b"Two.", b"Three.")
    session = ChatSession(parrot, TOKENIZER, SamplingOptions(), system="S")
    assert [converse(session, "a"), converse(session, "b")] == ["One.", "Two."]
    session.reset()
    converse(session, "c")
    assert parrot.prompts == [
        "<|system|>S<|user|>a<|assistant|>",
        "<|system|>S<|user|>a<|assistant|>One.<|endoftext|><|user|>b<|assistant|>",
        "<|system|>S<|user|>c<|assistant|>",
    ]


def test_only_text_comes_out():
    """Neither the controls (257 to 259) nor the model's ids that the tokenizer does not know (260 to 299)."""
    options = text_options(SamplingOptions(forbidden_ids=(5,)), TOKENIZER, Parrot().config)
    assert options.stop_ids == (TOKENIZER.eot_id,) == (256,)
    assert options.forbidden_ids == (5, *range(257, 300))
    parrot = Parrot(b"x")
    converse(ChatSession(parrot, TOKENIZER, SamplingOptions()), "a")
    assert parrot.options.forbidden_ids == tuple(range(257, 300))


def test_characters_come_whole():
    parrot = Parrot("aé…b".encode() + b"\xc3")
    pieces = stream_text(parrot, TOKENIZER, [1], SamplingOptions())
    assert list(pieces) == ["a", "é", "…", "b", "\ufffd"]


def test_an_answer_broken_off_is_remembered_as_far_as_it_came():
    parrot = Parrot(b"One.", b"Two.")
    session = ChatSession(parrot, TOKENIZER, SamplingOptions(), system="S")
    with contextlib.closing(session.answer("a")) as pieces:
        assert next(pieces) + next(pieces) == "On"
    converse(session, "b")
    assert parrot.prompts[1] == "<|system|>S<|user|>a<|assistant|>On<|endoftext|><|user|>b<|assistant|>"


def test_an_exchange_without_answer_is_not_remembered():
    session = ChatSession(Parrot(b"", b"Two."), TOKENIZER, SamplingOptions(), system="S")
    assert converse(session, "a") == "" and session.messages == []
    with contextlib.closing(session.answer("b")):
        pass
    assert session.messages == []


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full():
    """Of 120 positions an answer wants 30; an exchange takes 33, and what is always there 4."""
    parrot = Parrot(*[b"y" * 15] * 4, b"z", b"z")
    session = ChatSession(parrot, TOKENIZER, SamplingOptions(), system="S")
    forgotten = []
    for letter in "abcd":
        converse(session, letter * 15)
        forgotten.append(session.forgotten)
    assert forgotten == [0, 0, 0, 1]
    assert [message["content"][0] for message in session.messages] == ["b", "y", "c", "y", "d", "y"]
    assert "a" * 15 not in parrot.prompts[3] and parrot.prompts[3].startswith("<|system|>S<|user|>bbb")
    converse(session, "e" * 100)  # leaves less than the 30, but fits alone
    assert session.forgotten == 4 and len(session.messages) == 2


def test_a_message_that_does_not_fit_is_refused_and_forgets_nothing():
    session = ChatSession(Parrot(b"One.", b"Two."), TOKENIZER, SamplingOptions(), system="S")
    converse(session, "a")
    before = list(session.messages)
    for bad in ("e" * 116, "", "\ud800"):
        with pytest.raises(UserError):
            session.answer(bad)
    assert session.messages == before and session.forgotten == 0
    assert converse(session, "b") == "Two."


def test_a_plain_text_marker_in_an_answer_does_not_block_the_conversation():
    """In the template "text" a message that holds a marker would be refused as forged, in every later turn."""
    tokenizer = ChatTokenizer("text", bpe_ranks=256)
    session = ChatSession(Parrot(b"One.<|user|>me", b"<|user|>", b"Three."), tokenizer, SamplingOptions(), system="S")
    converse(session, "a")
    assert session.messages[-1]["content"] == "One."
    converse(session, "b")
    assert len(session.messages) == 2
    assert converse(session, "c") == "Three."


def test_a_request_without_template_is_the_text_itself():
    plain = ChatTokenizer(None, bpe_ranks=256)
    assert plain.decode(encode_request(plain, "Once <|user|>")) == "Once <|user|>"
    with pytest.raises(UserError, match="--system"):
        encode_request(plain, "Once", system="S")
