"""The wordings of requests: that they fit, that all are used, and that they can be read back."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinysft_jax.tasks.requests import CANONICAL, PHRASINGS, choose, phrase, words_in

DRAWS = st.floats(0, 1, exclude_max=True)
WORDS = st.lists(st.text(min_size=1).filter(lambda word: "," not in word and word == word.strip()), min_size=1)


def test_each_task_has_a_canonical_wording_and_three_others():
    assert {task: wordings[0] for task, wordings in PHRASINGS.items()} == {
        "summary": "Please provide a brief summary of the following story: {}",
        "moral": "What is the moral lesson of this story? {}",
        "words": "Write a short story that uses all of these words: {}",
        "main_character": "Based on this story, who is the main character? {}",
        "what_happened": "What happened in this story? {}",
        "happy_ending": "Does this story have a happy ending? {}",
        "dialogue": "Is there any dialogue in this story? {}",
    }
    for wordings in PHRASINGS.values():
        assert len(set(wordings)) == len(wordings) >= 4
        assert all(wording.count("{}") == 1 for wording in wordings)


def test_some_wordings_ask_before_the_story_and_some_after_it():
    for task in PHRASINGS.keys() - {"words"}:
        assert {wording.endswith("{}") for wording in PHRASINGS[task]} == {True, False}


def test_the_canonical_wording_comes_most_often_and_the_others_equally():
    n = 10_000
    counts = Counter(choose(4, i / n) for i in range(n))
    assert counts[0] == CANONICAL * n
    assert all(abs(counts[i] - (1 - CANONICAL) * n / 3) <= 1 for i in (1, 2, 3))


@pytest.mark.parametrize("n", [2, 4, 7])
def test_every_draw_chooses_a_wording(n):
    assert (choose(n, 0.0), choose(n, 1 - 2**-53)) == (0, n - 1)


@given(task=st.sampled_from(sorted(PHRASINGS)), content=st.text(), draw=DRAWS)
def test_what_it_is_about_stands_in_the_prompt_word_for_word(task, content, draw):
    """Also where it holds braces."""
    before, after = PHRASINGS[task][choose(len(PHRASINGS[task]), draw)].split("{}")
    assert phrase(task, content, draw) == before + content + after


@example(words=["big\ncat", "tree."], draw=0.99)
@given(words=WORDS, draw=DRAWS)
def test_the_words_can_be_read_back(words, draw):
    assert words_in(phrase("words", ", ".join(words), draw)) == tuple(words)


@given(task=st.sampled_from(sorted(PHRASINGS.keys() - {"words"})), story=st.text(), draw=DRAWS)
def test_other_prompts_ask_for_no_words(task, story, draw):
    assert words_in(phrase(task, story, draw)) == ()


def test_prompts_that_are_only_like_the_wordings_ask_for_no_words():
    assert words_in("Use the words cat, tree in a short story!") == ()
    assert words_in("Please use the words cat, tree in a short story.") == ()
