"""Stories in prompts that are too long: cut at the end of a sentence, never in the answer, and counted."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.console import UserError
from tinysft_jax.data.encode import TOO_LONG, Encoder
from tinysft_jax.data.prepare import main
from tinysft_jax.data.sources import Item
from tinysft_jax.tasks.make import MIN_KEPT, RATES, STORIES, TASK_NAMES, TRIMMABLE_TASKS, Conversation
from tinysft_jax.tasks.requests import PHRASINGS, Request, choose
from tinysft_jax.tokenizer import ChatTokenizer

STORY = " ".join(f"Tim walked {i} steps." for i in range(10, 20))
# A record that gives a summary and a request for its words, and hardly any other conversation.
RECORD = f"Words: walk\nSummary: Tim walked.\nStory: {STORY}\n"
# One for each wording of a task.
DRAWS = (0.0, 0.5, 0.7, 0.9)


def turn(question: str, answer: str = "A") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def asked(task: str, story: str = STORY, draw: float = 0.0, more: tuple = ()) -> Conversation:
    request = Request(task, draw, story, {"words": ["walk"]} if task in STORIES else {})
    return Conversation(task, [*turn(request.text()), *more], request)


def prompts(conversation: Conversation) -> list[str]:
    """Those of the shorter versions of a conversation of one turn."""
    whole, *versions = conversation.versions()
    assert whole == conversation.messages
    assert all(messages == turn(messages[0]["content"]) for messages in versions)
    return [messages[0]["content"] for messages in versions]


@pytest.mark.parametrize("task", sorted(TRIMMABLE_TASKS))
def test_each_wording_keeps_its_question(task):
    """Before the story or after it."""
    for draw, wording in zip(DRAWS, PHRASINGS[task], strict=True):
        shorter = [wording.format(STORY[: i * 21 - 1]) for i in range(9, 5, -1)]
        assert prompts(asked(task, draw=draw)) == shorter


@pytest.mark.parametrize("task", ["moral", "happy_ending", "dialogue", "words", "story"])
def test_tasks_that_need_the_end_of_the_story_are_not_shortened(task):
    assert {*TRIMMABLE_TASKS, "moral", "happy_ending", "dialogue", "words", "story"} == set(TASK_NAMES)
    assert all(prompts(asked(task, draw=draw)) == [] for draw in DRAWS)


def test_turns_go_before_sentences():
    first, second = turn("And who?"), turn("Why?")
    (alone, *shorter), versions = ([*asked("summary", more=more).versions()] for more in ((), (*first, *second)))
    assert versions == [alone + first + second, alone + first, alone, *shorter] and len(shorter) == 4
    assert len([*asked("story", more=(*first, *second)).versions()]) == 3


@pytest.mark.parametrize(
    ("story", "ends"),
    [
        ("A b c d. Tim saw Mr. Fox. Bye.", ["A b c d. Tim saw Mr. Fox."]),
        ('Tim ran to her. "Stop!" said Mia. He did.', ['Tim ran to her. "Stop!" said Mia.']),
        ('A long way he ran. "Stop. Look at it," he said. Yes.', ['A long way he ran. "Stop. Look at it," he said.']),
        ("He ran off to me. “Oh. No,” he said. Yes.", ["He ran off to me. “Oh. No,” he said."]),
        ('She ran to him. "Hi!"\nHe left.', ['She ran to him. "Hi!"', "She ran to him."]),
        # A quotation that is never closed is not open for ever.
        ('"Oh no.\nThen he left the house. Bye.', ['"Oh no.\nThen he left the house.']),
        ("No end here", []),
    ],
)
def test_cuts_are_between_sentences(story, ends):
    wording = PHRASINGS["summary"][0]
    assert prompts(asked("summary", story)) == [wording.format(end) for end in ends]


@given(story=st.text(alphabet='aB. !?"“”\n', min_size=1), draw=st.sampled_from(DRAWS))
def test_a_shortened_story_is_a_beginning_of_at_least_half_of_it(story, draw):
    before, after = choose(PHRASINGS["summary"], draw).split("{}")
    lengths = []
    for prompt in prompts(asked("summary", story, draw)):
        kept = prompt.removeprefix(before).removesuffix(after)
        assert story.startswith(kept) and MIN_KEPT * len(story) <= len(kept) < len(story)
        assert kept.rstrip('"“”')[-1] in ".!?"
        lengths.append(len(kept))
    assert lengths == sorted(set(lengths), reverse=True)


def blocks(max_tokens: int, seeds: range):
    """What the record becomes with each seed: the conversations' texts and the ledger."""
    tok = ChatTokenizer("control", 256)
    rates = {**RATES, "summary": 1.0}
    for seed in seeds:
        encoder = Encoder("tinystories-instruct", tok, max_tokens, seed, rates)
        splits, ledger = encoder.encode([Item("valid", "here", RECORD)])
        encoded, texts, start = splits["valid"], [], 0
        for length, task in zip(encoded.lengths, encoded.tasks, strict=True):
            assert length <= max_tokens
            part = slice(start, start := start + length)
            texts.append(
                (
                    TASK_NAMES[task],
                    tok.decode(encoded.tokens[part][encoded.supervised[part]]),
                    tok.decode(encoded.tokens[part]),
                )
            )
        yield texts, ledger


def test_no_answer_is_ever_cut_and_everything_is_counted():
    """At limits from too short for anything to long enough for everything."""
    answers = {
        "summary": "Tim walked.",
        "what_happened": "Tim walked.",
        "words": STORY,
        "story": STORY,
        "main_character": "The main character is Tim.",
        "dialogue": "No, there is no dialogue in this story.",
    }
    trimmed = left_out = 0
    for max_tokens in range(200, 440, 12):
        for texts, ledger in blocks(max_tokens, range(3)):
            whole = 0
            for task, said, text in texts:
                assert said == f"{answers[task]}<|endoftext|>"
                whole += STORY in text
                assert STORY[:104] in text
            made = len(texts) + ledger.left_out.total()
            assert made >= 4 and ledger.kept == len(texts)
            assert ledger.trimmed.total() == len(texts) - whole
            assert {reason for _, _, reason in ledger.left_out} <= {TOO_LONG}
            trimmed, left_out = trimmed + ledger.trimmed.total(), left_out + ledger.left_out.total()
    assert trimmed > 20 and left_out > 20


def test_a_long_story_is_trimmed_in_the_prompt_and_the_ledger_says_so(tmp_path: Path):
    path = tmp_path / "stories.txt"
    path.write_text(RECORD)
    flags = ["--valid_fraction", "0", "--bpe_ranks", "256", "--workers", "1", "--seed", "2", "--max_tokens", "330"]
    main(["--input", str(path), "--output", str(tmp_path / "data"), *flags])
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())["splits"]["train"]["tasks"]
    counts = {task: {name: n for name, n in of.items() if name != "tokens"} for task, of in ledger.items()}
    assert counts["summary"] == {"made": 1, "kept": 1, "trimmed": 1, "left_out": {}}
    assert counts["words"] == {"made": 1, "kept": 0, "trimmed": 0, "left_out": {"longer than max_tokens": 1}}
    with pytest.raises(UserError, match=r"nothing is left to learn from: left out .* longer than max_tokens"):
        main(["--input", str(path), "--output", str(tmp_path / "less"), *flags[:-1], "200"])


def test_rates_reach_the_encoder():
    """Which tasks are made is up to the encoder's rates."""
    none = {name: {"yes": 0.0, "no": 0.0} if isinstance(rate, dict) else 0.0 for name, rate in RATES.items()}
    encoder = Encoder("tinystories-instruct", ChatTokenizer("control", 256), 600, 0, {**none, "summary": 1.0})
    _, ledger = encoder.encode([Item("train", "here", RECORD)])
    assert [key[:2] for key in ledger.lengths.elements()] == [("train", "summary")]
