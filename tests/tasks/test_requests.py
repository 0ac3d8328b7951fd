"""The wordings of requests: that they fit, that all are used, and that they say what is asked for."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.tasks.records import StoryRecord
from tinysft_jax.tasks.requests import (
    CANONICAL,
    CONDITIONS,
    FEATURE_NAMES,
    PHRASINGS,
    STORY_PHRASINGS,
    Request,
    choose,
    conditions_of,
)

DRAWS = st.floats(0, 1, exclude_max=True)
LINES = st.text(min_size=1).map(lambda text: " ".join(text.split())).filter(bool)
ITEMS = st.lists(LINES, min_size=1, max_size=4)
ALL = {
    "features": ["BadEnding", "Twist"],
    "words": ["cat", "tree"],
    "summary": "A cat climbs.",
    "random_sentence": "It was high.",
}


def test_each_task_has_a_canonical_wording_and_three_others():
    canonical = {
        "summary": "Please provide a brief summary of the following story: S",
        "moral": "What is the moral lesson of this story? S",
        "words": "Write a short story that uses all of these words: S",
        "main_character": "Based on this story, who is the main character? S",
        "what_happened": "What happened in this story? S",
        "happy_ending": "Does this story have a happy ending? S",
        "dialogue": "Is there any dialogue in this story? S",
    }
    assert {task: Request(task, 0.0, "S").text() for task in PHRASINGS} == canonical
    for wordings in PHRASINGS.values():
        assert len(set(wordings)) == len(wordings) == 4
        assert all(wording.count("{}") == 1 for wording in wordings)


def test_some_wordings_ask_before_the_story_and_some_after_it():
    for task in PHRASINGS.keys() - {"words"}:
        assert {wording.endswith("{}") for wording in PHRASINGS[task]} == {True, False}


def test_the_canonical_wording_comes_most_often_and_the_others_equally():
    n = 10_000
    counts = Counter(choose(range(4), i / n) for i in range(n))
    assert counts[0] == CANONICAL * n
    assert all(abs(counts[i] - (1 - CANONICAL) * n / 3) <= 1 for i in (1, 2, 3))


@pytest.mark.parametrize("n", [2, 4, 7])
def test_every_draw_chooses_a_wording(n):
    assert (choose(range(n), 0.0), choose(range(n), 1 - 2**-53)) == (0, n - 1)


@given(task=st.sampled_from(sorted(PHRASINGS.keys() - {"words"})), story=st.text(min_size=1), draw=DRAWS)
def test_the_story_is_in_the_prompt_word_for_word(task, story, draw):
    """Also where it holds braces."""
    before, after = choose(PHRASINGS[task], draw).split("{}")
    assert Request(task, draw, story).text() == before + story + after


@given(words=ITEMS, draw=DRAWS)
def test_the_words_are_in_the_prompt(words, draw):
    assert ", ".join(words) in Request("words", draw, conditions={"words": words}).text()


def test_the_canonical_request_for_a_story_has_the_data_sets_headers():
    assert Request("story", 0.0, conditions=ALL).text() == (
        "Write a short story.\nFeatures: BadEnding, Twist\nWords: cat, tree\nSummary: A cat climbs.\n"
        "Random sentence: It was high."
    )
    assert Request("story", 0.0, conditions={"words": ["cat"]}).text() == "Write a short story.\nWords: cat"


def test_other_wordings_name_features_as_people_do():
    prompt = Request("story", 0.5, conditions={"features": ["BadEnding", "MoralValue"]}).text()
    assert prompt.endswith(": a bad ending, a moral")


@given(words=ITEMS, sentence=LINES, draw=DRAWS, order=st.permutations(CONDITIONS))
def test_each_condition_has_a_line_in_the_order_of_the_request(words, sentence, draw, order):
    """Also where a condition looks like another one's line."""
    known = {
        "features": [*FEATURE_NAMES, "Rhyme"],
        "words": words,
        "summary": "Words: two",
        "random_sentence": sentence,
    }
    lines = Request("story", draw, conditions={name: known[name] for name in order}).text().split("\n")[1:]
    labels = dict(zip(CONDITIONS, choose(STORY_PHRASINGS, draw)[1:], strict=True))
    assert [line.startswith(f"{labels[name]}: ") for name, line in zip(order, lines, strict=True)] == [True] * 4
    contents = {name: line.removeprefix(f"{labels[name]}: ") for name, line in zip(order, lines, strict=True)}
    assert contents["words"] == ", ".join(words) and contents["features"].endswith(", Rhyme")
    assert (contents["summary"], contents["random_sentence"]) == ("Words: two", sentence)


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.7, 0.9])
def test_a_brief_request_asks_for_a_very_short_story(draw):
    for task in ("words", "story"):
        usual, brief = (Request(task, draw, conditions=ALL, brief=brief).text() for brief in (False, True))
        assert brief in (usual.replace(length, "a very short story") for length in ("a story", "a short story"))
        assert brief != usual


def test_conditions_of_a_record_are_on_one_line_each():
    record = StoryRecord(("Twist",), ("big\ncat",), "It was\nsad. ", None, "Tim ran.")
    assert conditions_of(record) == {"features": ["Twist"], "words": ["big cat"], "summary": "It was sad."}
    assert conditions_of(StoryRecord(None, (), None, None, "Tim ran.")) == {}
