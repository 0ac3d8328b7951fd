"""Each metric against values that were worked out by hand."""

import importlib.util

import pytest

from tinysft_jax.console import UserError
from tinysft_jax.corpus.stories import embedded_stories
from tinysft_jax.rewards import metrics
from tinysft_jax.rewards.cases import Case
from tinysft_jax.tasks.make import make_tasks

WORDS = Case("words", "?", "", {"words": ["jump", "ice cream", "happy"]})
STORY = Case(
    "story",
    "?",
    "",
    {"words": ["jump", "cat"], "features": ["Dialogue", "MoralValue"], "random_sentence": "The cat, Tom, ran!"},
)
HONOURS_ALL = 'The cat Tom ran, jumping. "Come here," said Mia. Tom learned that it is good to share.'
NOTHING_ASKED = {"words": [], "features": [], "summary": "A cat runs.", "random_sentence": None}


@pytest.mark.parametrize(
    ("answer", "exact", "inflected", "every"),
    [
        ("She can jump. HAPPY about ice-cream!", 1, 1, True),
        ("They jumped, happier than ever, for ice creams.", 0, 1, True),
        ("The jumper had ice and cream, happily.", 0, 0, False),
        ("Jumping for ice cream.", 1 / 3, 2 / 3, False),
        ("", 0, 0, False),
    ],
)
def test_words(answer, exact, inflected, every):
    assert metrics.words_used(WORDS, answer) == pytest.approx(exact)
    assert metrics.words_used_inflected(WORDS, answer) == pytest.approx(inflected)
    assert metrics.all_words_used(WORDS, answer) is every


def test_irregular_forms_count_both_ways():
    case = Case("words", "?", "", {"words": ["ran", "mouse"]})
    assert metrics.words_used_inflected(case, "The mice like to run.") == 1
    assert metrics.words_used(case, "The mice like to run.") == 0


@pytest.mark.parametrize(
    ("metric", "answer", "score"),
    [
        (metrics.words_used, "The cat sat.", 0.5),
        (metrics.dialogue_honoured, '"Come here," said Tom.', True),
        (metrics.dialogue_honoured, "Tom said nothing.", False),
        (metrics.dialogue_honoured, "'Come here,' said Tom.", False),  # single quotes aren't clear
        (metrics.moral_honoured, "Tom learned that it is good to share.", True),
        (metrics.moral_honoured, "Tom learned to swim.", False),
        (metrics.sentence_included, "Once the cat Tom ran. The end.", True),
        (metrics.sentence_included, "The cat Tom then ran.", False),
        (metrics.all_conditions, HONOURS_ALL, True),
        (metrics.all_conditions, HONOURS_ALL.replace("jumping", "up"), False),
        (metrics.all_conditions, HONOURS_ALL.replace("said", "sat by"), False),
        (metrics.all_conditions, HONOURS_ALL.replace("learned", "knew"), False),
        (metrics.all_conditions, HONOURS_ALL.replace("ran", "sat"), False),
        (metrics.all_but_sentence, HONOURS_ALL.replace("ran", "sat"), True),
        (metrics.all_but_sentence, HONOURS_ALL.replace("jumping", "up"), False),
        (metrics.all_but_sentence, HONOURS_ALL.replace("said", "sat by"), False),
        (metrics.all_but_sentence, HONOURS_ALL.replace("learned", "knew"), False),
    ],
)
def test_conditions_of_a_story(metric, answer, score):
    assert metric(STORY, answer) is score or metric(STORY, answer) == score == 0.5
    for conditions in (NOTHING_ASKED, {}):
        assert metric(Case("story", "?", "", conditions), answer) is None


def test_all_conditions_are_those_that_were_asked():
    """Of a story: a list of words alone has a metric of its own."""
    sentence = Case("story", "?", "", {"random_sentence": "The cat ran!", "summary": "A cat.", "features": ["Twist"]})
    assert metrics.all_conditions(sentence, "The cat ran.") is True
    assert metrics.all_conditions(sentence, "The cat sat.") is False
    assert metrics.all_but_sentence(sentence, "The cat ran.") is None
    words = Case("story", "?", "", {"words": ["jump", "cat"]})
    assert metrics.all_conditions(words, "Cats jump.") is metrics.all_but_sentence(words, "Cats jump.") is True
    assert metrics.all_conditions(WORDS, "Jumping for ice cream, happy.") is None


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("The main character is the little duck.", True),
        ("the story is about a little duck", True),
        ("The main character is the duck.", False),
        ("The main character is the little duck and Tom.", False),
        ("", False),
    ],
)
def test_main_character(answer, correct):
    case = Case("main_character", "?", "The main character is the little duck.")
    assert metrics.character_correct(case, answer) is correct


@pytest.mark.parametrize("task", ["happy_ending", "dialogue"])
@pytest.mark.parametrize(
    ("answer", "correct"),
    [("No.", True), ("no, nobody speaks", True), ("Yes, no.", False), ("Nobody.", False), ("", False)],
)
def test_yes_and_no(task, answer, correct):
    assert metrics.yes_no_correct(Case(task, "?", "No, there is no dialogue in this story."), answer) is correct


def test_moral():
    case = Case("moral", "?", "Tom learned that it's good to share.")
    assert metrics.moral_correct(case, "tom learned that it’s good to share") is True
    assert metrics.moral_correct(case, "Tom learned that it's good.") is False


def test_a_fact():
    """A ground truth of a few words is a fact that any right answer contains; a longer one can be said otherwise."""
    case = Case("chat", "?", "Carbon dioxide.")
    assert metrics.answer_included(case, "It is carbon-dioxide, a gas.") is True
    assert metrics.answer_included(case, "It is carbon monoxide and dioxide.") is False
    assert metrics.answer_included(Case("chat", "?", "Plants take in carbon dioxide."), "Carbon dioxide.") is None
    assert metrics.answer_included(Case("chat", "?", "…"), "…") is None


def test_rouge_l():
    """Longest common subsequence of the stems "the cat ran away": 3 of 4 words each way."""
    case = Case("summary", "?", "The cat ran away.")
    assert metrics.rouge_l(case, "The cats run away!") == pytest.approx(3 / 4)
    assert metrics.rouge_l(case, "The cat") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert metrics.rouge_l(case, "") == 0


def test_distinct_2():
    """Of ab ba ab and ab bc, three are different: 3/5 in all, the mean weighted by the numbers of pairs."""
    found = metrics.distinct_2(["a b a b", "A b. C!", "c", ""])
    assert found == [pytest.approx(5 / 9), pytest.approx(2 / 3), None, None]
    assert (3 * found[0] + 2 * found[1]) / 5 == pytest.approx(3 / 5)


def test_repetition():
    assert metrics.repetition("a b a b a b") == pytest.approx(1 / 3)  # abab baba abab
    assert metrics.repetition("a b c") == 0


def test_length():
    assert metrics.length("The cat's ball.\nIt ran!") == 6 and metrics.length(" …") == 0


@pytest.mark.parametrize(
    ("answer", "listed"),
    [
        ("jump, ice cream, happy.", True),
        ("Jumped ice creams happy. Jumped ice creams happy.", True),
        ("The words are jump, ice cream and happy.", True),
        ("She had a jump. She had an ice cream. She had a happy.", True),
        ("happy", True),  # one of three
        ("one two three jumps", True),
        ("one two three four jumps", False),
        ("Mia was so happy that she began to jump up and down when she saw the ice cream van.", False),
        ("Once there was a tree.", False),
        ("", False),
    ],
)
def test_a_list_of_the_requested_words(answer, listed):
    assert metrics.word_list(WORDS, answer) is listed
    assert metrics.word_list(Case("story", "?", "", WORDS.conditions), answer) is listed
    assert metrics.word_list(Case("story", "?", "", NOTHING_ASKED), answer) is None


def test_no_story_is_a_list_of_its_words_and_each_list_is_one():
    found = set()
    for conversation in (each for story in embedded_stories(200) for each in make_tasks(story.record)):
        if words := conversation.request.conditions.get("words"):
            case = Case(conversation.task, "?", conversation.messages[1]["content"], {"words": words})
            listings = (f"{', '.join(words)}.", f"{' '.join(words)}. " * 3, f"A story about {' and '.join(words)}.")
            found.add(
                (metrics.word_list(case, case.ground_truth), *(metrics.word_list(case, each) for each in listings))
            )
    assert found == {(False, True, True, True)}


APPLIES = {
    "summary": {"rouge_l"},
    "what_happened": {"rouge_l"},
    "chat": {"answer_included", "rouge_l"},
    "moral": {"moral_correct", "rouge_l"},
    "main_character": {"character_correct"},
    "happy_ending": {"yes_no_correct"},
    "dialogue": {"yes_no_correct"},
    "words": {"words_used", "words_used_inflected", "all_words_used"},
}


@pytest.mark.parametrize("task", APPLIES)
def test_metrics_apply_to_their_tasks(task):
    case = Case(task, "?", "A ground truth.", WORDS.conditions if task == "words" else {})
    assert {name for name, metric in metrics.CORRECTNESS.items() if metric(case, "Yes.") is not None} == APPLIES[task]


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs simplemma; pip install -e '.\[eval\]'"):
        metrics.require_libraries()
