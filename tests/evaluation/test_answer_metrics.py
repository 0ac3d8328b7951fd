"""Each metric against values that were worked out by hand."""

import importlib

import pytest

from tinysft_jax.console import UserError
from tinysft_jax.corpus.stories import embedded_stories
from tinysft_jax.evaluation import metrics
from tinysft_jax.evaluation.cases import Case
from tinysft_jax.tasks.make import make_tasks
from tinysft_jax.tasks.records import StoryRecord

WORDS = Case("words", "Write a short story that uses all of these words: jump, ice cream, happy", "", 1)
STORY = Case(
    "story",
    "Write a short story.\nFeatures: Dialogue, MoralValue\nWords: jump, cat\nRandom sentence: The cat, Tom, ran!",
    "",
    1,
)


@pytest.mark.parametrize(
    ("answer", "exact", "inflected", "every"),
    [
        ("She can jump. HAPPY about ice-cream!", 1, 1, 1),
        ("They jumped, happier than ever, for ice creams.", 0, 1, 1),
        ("The jumper had ice and cream, happily.", 0, 0, 0),
        ("Jumping for ice cream.", 1 / 3, 2 / 3, 0),
        ("", 0, 0, 0),
    ],
)
def test_words(answer, exact, inflected, every):
    assert metrics.words_used(WORDS, answer) == pytest.approx(exact)
    assert metrics.words_used_inflected(WORDS, answer) == pytest.approx(inflected)
    assert metrics.all_words_used(WORDS, answer) == every


def test_irregular_forms_count_both_ways():
    case = Case("words", "Use the words ran, mouse in a short story.", "", 1)
    assert metrics.words_used_inflected(case, "The mice like to run.") == 1
    assert metrics.words_used(case, "The mice like to run.") == 0


@pytest.mark.parametrize(
    ("metric", "answer", "score"),
    [
        (metrics.words_used, "The cat sat.", 0.5),
        (metrics.dialogue_honoured, '"Come here," said Tom.', 1),
        (metrics.dialogue_honoured, "Tom said nothing.", 0),
        (metrics.dialogue_honoured, "'Come here,' said Tom.", 0),  # single quotes aren't clear
        (metrics.moral_honoured, "Tom learned that it is good to share.", 1),
        (metrics.moral_honoured, "Tom learned to swim.", 0),
        (metrics.sentence_included, "Once the cat Tom ran. The end.", 1),
        (metrics.sentence_included, "The cat Tom then ran.", 0),
    ],
)
def test_conditions_of_a_story(metric, answer, score):
    assert metric(STORY, answer) == score
    assert metric(Case("story", "Write a short story.\nSummary: A cat runs.", "", 1), answer) is None


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The main character is the little duck.", 1),
        ("the story is about a little duck", 1),
        ("The main character is the duck.", 0),
        ("The main character is the little duck and Tom.", 0),
        ("", 0),
    ],
)
def test_main_character(answer, score):
    case = Case(
        "main_character", "Who is this story about? A little duck swam.", "The main character is the little duck.", 1
    )
    assert metrics.character_correct(case, answer) == score


@pytest.mark.parametrize("task", ["happy_ending", "dialogue"])
@pytest.mark.parametrize(
    ("answer", "score"), [("No.", 1), ("no, nobody speaks", 1), ("Yes, no.", 0), ("Nobody.", 0), ("", 0)]
)
def test_yes_and_no(task, answer, score):
    assert metrics.yes_no_correct(Case(task, "", "No, there is no dialogue in this story.", 1), answer) == score


def test_moral():
    case = Case("moral", "", "Tom learned that it's good to share.", 1)
    assert metrics.moral_correct(case, "tom learned that it’s good to share") == 1
    assert metrics.moral_correct(case, "Tom learned that it's good.") == 0


def test_rouge_l():
    """Longest common subsequence of the stems "the cat ran away": 3 of 4 words each way."""
    case = Case("summary", "", "The cat ran away.", 1)
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


APPLIES = {
    "summary": {"rouge_l"},
    "what_happened": {"rouge_l"},
    "chat": {"rouge_l"},
    "moral": {"moral_correct", "rouge_l"},
    "main_character": {"character_correct"},
    "happy_ending": {"yes_no_correct"},
    "dialogue": {"yes_no_correct"},
    "words": {"words_used", "words_used_inflected", "all_words_used"},
}


@pytest.mark.parametrize("task", APPLIES)
def test_metrics_apply_to_their_tasks(task):
    """Also where the story in the prompt reads like a request."""
    case = Case(task, WORDS.question, "A gold answer.", 1)
    assert {name for name, metric in metrics.CORRECTNESS.items() if metric(case, "Yes.") is not None} == APPLIES[task]


def test_gold_answers_score_full_marks_where_the_data_is_right():
    """Every conversation of some embedded stories, in all wordings: what is asked for is read back from the prompt."""
    scores: dict[str, list[float]] = {}
    for seed, story in enumerate(embedded_stories(150)):
        assert isinstance(story.record, StoryRecord)
        for conversation in make_tasks(story.record, seed):
            question, answer = (message["content"] for message in conversation.messages)
            case = Case(conversation.task, question, answer, 1)
            for name, metric in metrics.CORRECTNESS.items():
                if (score := metric(case, answer)) is not None:
                    scores.setdefault(name, []).append(score)
    assert scores.keys() == metrics.CORRECTNESS.keys()
    means = {name: sum(each) / len(each) for name, each in scores.items()}
    for name in ("character_correct", "yes_no_correct", "moral_correct", "rouge_l", "sentence_included"):
        assert means[name] == 1, name
    assert means["words_used"] == means["words_used_inflected"] == 1
    assert min(means["dialogue_honoured"], means["moral_honoured"]) > 0.9


def test_a_missing_library_is_one_line(monkeypatch):
    def missing(name):
        raise ImportError(name)

    metrics._rouge.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"needs rouge_score; pip install 'tinysft-jax\[eval\]'"):
        metrics.rouge_l(Case("summary", "", "a", 1), "a")
