"""Conversations: with a decoder that says what the test wants it to, and with a model that speaks for itself."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
from tiny_model import LETTERS, make_config, make_decoder, make_tokenizer

from tinysft_jax.console import UserError
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sampling import decode
from tinysft_jax.sampling.chat import Session
from tinysft_jax.sampling.decode import Decoder, Prompt, check_prompt
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.kept_cache import KeptCache

TOKENIZER = make_tokenizer("control")


class Parrot(Decoder):
    """Streams the ids it was given, and keeps the prompts it got."""

    def __init__(self, *answers: bytes, context: int = 120):
        self.config = GPTConfig(vocab_size=300, dim=8, n_layers=1, n_heads=1, max_seq_len=context)
        self.trained_length = context
        byte_ids = {bytes([byte]): i for i in range(256) for byte in TOKENIZER.decode_bytes([i])}
        self.answers = [[byte_ids[bytes([byte])] for byte in answer] for answer in answers]
        self.prompts, self.rows = [], []

    def stream(
        self, prompt: Prompt, options: SamplingOptions, kept: KeptCache | None = None, row: int = 0
    ) -> Iterator[list[int]]:
        check_prompt(prompt, "the prompt", self.config)
        self.prompts.append(TOKENIZER.decode(prompt))
        self.rows.append(row)
        return iter([[id_] for id_ in self.answers.pop(0)])


def say(session: Session, text: str) -> str:
    return "".join(session.ask(text))


def test_a_conversation_is_remembered_until_it_is_reset():
    parrot = Parrot(b"One.", b"Two.", b"Three.")
    session = Session(parrot, TOKENIZER, SamplingOptions(), system="S")
    assert [say(session, "a"), say(session, "b")] == ["One.", "Two."]
    session.reset()
    say(session, "c")
    assert parrot.prompts == [
        "<|system|>S<|user|>a<|assistant|>",
        "<|system|>S<|user|>a<|assistant|>One.<|endoftext|><|user|>b<|assistant|>",
        "<|system|>S<|user|>c<|assistant|>",
    ]


def test_only_text_comes_out():
    """Neither the controls (257 to 259) nor the model's ids that the tokenizer does not know (260 to 299)."""
    options = Session(Parrot(), TOKENIZER, SamplingOptions(forbidden_ids=(5,))).options
    assert options.stop_ids == (TOKENIZER.eot_id,) == (256,)
    assert options.forbidden_ids == (5, *range(257, 300))


def test_an_answer_broken_off_is_remembered_as_far_as_it_came():
    parrot = Parrot(b"One.", b"Two.")
    session = Session(parrot, TOKENIZER, SamplingOptions(), system="S")
    with contextlib.closing(session.ask("a")) as pieces:
        assert next(pieces) + next(pieces) == "On"
    say(session, "b")
    assert parrot.prompts[1] == "<|system|>S<|user|>a<|assistant|>On<|endoftext|><|user|>b<|assistant|>"


def test_an_exchange_without_answer_is_not_remembered_but_can_be_retried():
    parrot = Parrot(b"One.", b" \n", b"", b"Two.", b"Three.")
    session = Session(parrot, TOKENIZER, SamplingOptions(), system="S")
    say(session, "a")
    before = list(session.messages)
    assert say(session, "b") == " \n" and session.messages == before, "one that can't be seen is none"
    with contextlib.closing(session.retry()):
        pass
    assert session.messages == before
    assert "".join(session.retry()) == "Two."
    assert parrot.prompts[1] == parrot.prompts[2] == parrot.prompts[3] and parrot.rows == [0, 0, 1, 2]
    assert [message["content"] for message in session.messages] == ["a", "One.", "b", "Two."]


def test_retry_takes_the_place_of_the_answer_and_draws_other_numbers():
    parrot = Parrot(b"One.", b"Two.", b"Three.", b"Four.", b"Five.")
    session = Session(parrot, TOKENIZER, SamplingOptions(), system="S")
    say(session, "a")
    say(session, "b")
    assert "".join(session.retry()) == "Three." and "".join(session.retry()) == "Four."
    assert parrot.prompts[1] == parrot.prompts[2] == parrot.prompts[3]
    assert [message["content"] for message in session.messages] == ["a", "One.", "b", "Four."]
    say(session, "c")
    assert parrot.rows == [0, 0, 1, 2, 0]


def test_undo_takes_back_exchange_after_exchange():
    parrot = Parrot(b"One.", b"Two.", b"", b"Three.")
    session = Session(parrot, TOKENIZER, SamplingOptions(), system="S")
    for text in "abc":
        say(session, text)
    assert [session.undo(), session.undo()] == ["c", "b"]
    say(session, "d")
    assert parrot.prompts[-1] == "<|system|>S<|user|>a<|assistant|>One.<|endoftext|><|user|>d<|assistant|>"
    session.undo(), session.undo()
    for refused in (session.undo, session.retry):
        with pytest.raises(UserError, match="no question yet"):
            refused()


def test_a_new_system_message_holds_for_what_was_said():
    parrot = Parrot(b"One.", b"Two.")
    session = Session(parrot, TOKENIZER, SamplingOptions(), system="S")
    say(session, "a")
    session.set_system("T")
    for bad in ("", "\u200b", "\ud800", "x" * 120):
        with pytest.raises(UserError):
            session.set_system(bad)
    say(session, "b")
    assert parrot.prompts[1] == "<|system|>T<|user|>a<|assistant|>One.<|endoftext|><|user|>b<|assistant|>"
    assert session.transcript[0] == {"role": "system", "content": "T"} and len(session.transcript) == 5


def test_a_resumed_conversation_goes_on_where_it_was():
    parrot = Parrot(b"One.", b"Two.", b"Two.")
    first, second = (Session(parrot, TOKENIZER, SamplingOptions(), system=system) for system in ("S", "T"))
    say(first, "a")
    second.resume(first.transcript)
    assert say(first, "b") == say(second, "b") == "Two."
    assert parrot.prompts[1] == parrot.prompts[2] and second.transcript == first.transcript
    without_system = first.transcript[1:]
    second.resume(without_system)
    assert second.system is None and second.transcript == without_system
    with pytest.raises(UserError, match="ends without an answer"):
        second.resume(without_system[:-1])
    assert second.transcript == without_system
    weighted = [without_system[0], without_system[1] | {"weight": 0}]
    second.resume(weighted)
    assert second.transcript == weighted, "what is not for training can be gone on with"


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full():
    """Of 120 positions an answer wants 30; an exchange takes 33, and what is always there 4."""
    parrot = Parrot(*[b"y" * 15] * 4, b"z", b"z")
    session = Session(parrot, TOKENIZER, SamplingOptions(), system="S")
    forgotten = []
    for letter in "abcd":
        say(session, letter * 15)
        forgotten.append(session.forgotten)
    assert forgotten == [0, 0, 0, 1]
    assert "a" * 15 not in parrot.prompts[3] and parrot.prompts[3].startswith("<|system|>S<|user|>bbb")
    say(session, "e" * 100)  # leaves less than the 30, but fits alone
    assert session.forgotten == 4
    assert len(session.messages) == 10, "the model has forgotten; the transcript has not"
    for _ in range(3):
        session.undo()
    say(session, "f")
    assert session.forgotten == 0 and "a" * 15 in parrot.prompts[5], "what fits again is seen again"


def test_a_message_that_does_not_fit_is_refused_and_forgets_nothing():
    session = Session(Parrot(b"One.", b"Two."), TOKENIZER, SamplingOptions(), system="S")
    say(session, "a")
    before = list(session.messages)
    for bad in ("e" * 116, "", " \u200b", "\ud800"):
        with pytest.raises(UserError):
            session.ask(bad)
    assert session.messages == before and session.forgotten == 0
    assert say(session, "b") == "Two."


def test_a_plain_text_marker_in_an_answer_does_not_block_the_conversation():
    """In the template "text" a message that holds a marker would be refused as forged, in every later turn."""
    tokenizer = make_tokenizer("text")
    session = Session(Parrot(b"One.<|user|>me", b"<|user|>", b"Three."), tokenizer, SamplingOptions(), system="S")
    say(session, "a")
    assert session.messages[-1]["content"] == "One."
    say(session, "b")
    assert len(session.messages) == 2
    assert say(session, "c") == "Three."


def test_without_template_each_text_is_continued_by_itself():
    parrot = Parrot(b" one", b" two", b" three")
    session = Session(parrot, make_tokenizer(None), SamplingOptions())
    say(session, "Once <|user|>")
    say(session, "b")
    assert "".join(session.retry()) == "b three"
    assert parrot.prompts == ["Once <|user|>", "b", "b"] and parrot.rows == [0, 0, 1]
    for refused in (lambda: session.set_system("S"), lambda: session.resume(session.transcript)):
        with pytest.raises(UserError, match="no chat template"):
            refused()


@pytest.fixture(scope="module")
def speaker() -> Decoder:
    return make_decoder()


@pytest.mark.parametrize("template", ["control", "text", None])
@pytest.mark.parametrize(("temperature", "only_letters"), [(0, True), (1.0, True), (0, False)])
def test_an_answer_in_a_kept_session_is_that_of_a_fresh_one(speaker, template, temperature, only_letters):
    """After answers that end by themselves, at `max_new_tokens` or broken off, /retry, /undo, and a full context.

    Where any byte can come out, half characters become U+FFFD in the conversation: what it says is not what is held.
    """
    tokenizer, kinds, n_forgotten = make_tokenizer(template), set(), 0
    options = SamplingOptions(25, temperature=temperature)
    if not only_letters:
        options = dataclasses.replace(options, forbidden_ids=(tokenizer.eot_id, *tokenizer.encode_text(LETTERS)))
    kept = Session(speaker, tokenizer, options, system="s" if template else None)

    def check(pieces: Iterator[str], text: str, history: list[dict[str, str]], retries: int = 0) -> None:
        nonlocal n_forgotten
        answer = "".join(pieces)
        fresh = Session(speaker, tokenizer, options)
        if history and template:
            fresh.resume(history)
        elif template:
            fresh.set_system(kept.system)
        expected = say(fresh, text)
        for _ in range(retries):
            expected = "".join(fresh.retry())
        assert answer == expected and kept.last.n_tokens == fresh.last.n_tokens and kept.forgotten == fresh.forgotten
        kinds.add("cut" if kept.last.n_tokens == 25 else "ended" if answer else "nothing")
        n_forgotten = max(n_forgotten, kept.forgotten)

    def ask(text: str) -> None:
        history = kept.transcript if kept.messages else []
        check(kept.ask(text), text, history)

    for text in ("abc", "why", "cat", "dog"):
        ask(text)
    with contextlib.closing(kept.ask("tell me")) as pieces:
        next(pieces, None)
    ask("and then")
    history = kept.transcript[:-2] if kept.messages[-2:-1] == [{"role": "user", "content": "and then"}] else []
    assert history or not template
    check(kept.retry(), "and then", history, retries=1)
    kept.undo()
    ask("or")
    for i in range(4):
        ask(f"{i} " * 25)
    if template:
        kept.set_system("q")
        ask("what")
        kept.reset()
        ask("abc")
        assert n_forgotten > 0
    if temperature:
        assert kinds >= {"cut", "ended"}


def test_a_turn_computes_only_what_is_new(speaker, monkeypatch):
    prefill, fed = decode.prefill, []

    def spy(params, state, tokens, lengths, config):
        fed.append((int(state.positions[0]), int(lengths[0])))
        return prefill(params, state, tokens, lengths, config)

    monkeypatch.setattr(decode, "prefill", spy)
    session = Session(speaker, TOKENIZER, SamplingOptions(12, temperature=0), system="s")
    say(session, "cat")
    n_prompt, n_answer = 7, session.last.n_tokens
    assert n_answer > 1
    say(session, "what")
    assert fed == [(0, n_prompt), (n_prompt + n_answer, 1 + 1 + 4 + 1)], "end-of-text, marker, what, marker"
    "".join(session.retry())
    assert fed[2:] == [(n_prompt + n_answer + 1 + 1 + 4, 1)], "all but the last token is held"


def test_the_speaker_is_what_these_tests_need():
    assert make_config().vocab_size == TOKENIZER.vocab_size == 260
