"""Rewards, their weights, and the score, worked out by hand."""

import pytest

from tinysft_jax.console import UserError
from tinysft_jax.rewards.cases import Case
from tinysft_jax.rewards.registry import DEFAULT_REWARDS, REWARDS, Answered, check_reward_model, parse_weights, score

STORY = Case(
    "story",
    "?",
    "",
    {"words": ["jump", "cat"], "features": ["Dialogue", "MoralValue"], "random_sentence": "The cat ran!"},
)
GOOD = 'The cat ran. They jumped. "Come here," said Mia. Tom learned that it is good to share.'


@pytest.mark.parametrize(
    ("name", "case", "answer", "value"),
    [
        ("words", STORY, GOOD, 1),
        ("words", STORY, "Cats.", 0.5),
        ("words", Case("summary", "?", "a"), "Cats.", None),
        ("sentence", STORY, GOOD, 1),
        ("sentence", STORY, "The cat sat.", 0),
        ("dialogue", STORY, GOOD, 1),
        ("dialogue", STORY, "The cat sat.", 0),
        ("moral", STORY, GOOD, 1),
        ("moral", STORY, "The cat sat.", 0),
        ("answer", STORY, GOOD, None),
        ("answer", Case("main_character", "?", "It is about Tom."), "The main character is Tom.", 1),
        ("answer", Case("main_character", "?", "It is about Tom."), "The main character is Ann.", 0),
        ("answer", Case("happy_ending", "?", "No, it is sad."), "No.", 1),
        ("answer", Case("moral", "?", "Tom learned to share."), "tom learned to share", 1),
        ("answer", Case("chat", "?", "Paris"), "It is Paris.", 1),
        ("answer", Case("chat", "?", "Paris is the capital of France."), "It is Paris.", None),
        ("repetition", STORY, "a b a b a b", 2 / 3),
        ("repetition", STORY, "", 1),
    ],
)
def test_a_reward(name, case, answer, value):
    found = REWARDS[name](Answered(case, answer, True))
    assert found is None if value is None else found == pytest.approx(value) and type(found) is float
    assert REWARDS[name](Answered(case, answer, False)) == found, "how the answer ended is for one reward"


def test_an_answer_that_ended_by_itself():
    assert [REWARDS["ends"](Answered(STORY, "", stopped)) for stopped in (True, False)] == [1, 0]


@pytest.mark.parametrize(("words", "value"), [(0, 1 / 6), (3, 0.5), (6, 1), (8, 1), (12, 1), (24, 0.5)])
def test_a_length_is_compared_with_that_of_the_datas_answer(words, value):
    case = Case("story", "?", "one two three four five six seven eight")
    assert REWARDS["length"](Answered(case, "a " * words, True)) == pytest.approx(value)


def test_what_models_say():
    fluencies = [REWARDS["fluency"](Answered(STORY, "", True, fluency, usual=-0.5)) for fluency in (-1.0, -0.5, -0.1)]
    assert fluencies == pytest.approx([0.6065, 1, 1], abs=1e-4)
    leads = [REWARDS["preferred"](Answered(STORY, "", True, lead=lead)) for lead in (0.0, 1.0, -1e4)]
    assert leads == pytest.approx([0.5, 0.7311, 0], abs=1e-4)
    assert REWARDS["fluency"](Answered(STORY, "", True)) is REWARDS["preferred"](Answered(STORY, "", True)) is None


def test_a_reward_model_and_its_reward_need_each_other():
    check_reward_model({"preferred": 1.0}, "model")
    check_reward_model({"words": 1.0}, "")
    for weights, path in (({"preferred": 1.0}, ""), ({"words": 1.0}, "model")):
        with pytest.raises(UserError, match=r"preferred and reward_model=PATH need each other"):
            check_reward_model(weights, path)


def test_weights():
    assert parse_weights("words:1,ends:0.3") == {"words": 1.0, "ends": 0.3}
    assert list(parse_weights(" ends : 1e-3 , words:1")) == ["ends", "words"], "their order stays"
    assert parse_weights(DEFAULT_REWARDS).keys() < REWARDS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"rewards can't be '': give some of words, sentence, .*, each once, .* up to 1,000,000, as in"),
        ("words:1,", "can't be ''"),
        ("word:1", "can't be 'word:1'"),
        ("words:1,words:2", "can't be 'words:2'"),
        ("words", "can't be 'words'"),
        *((f"ends:1,words:{number}", f"'words:{number}'") for number in ("0", "-1", "nan", "inf", "1e7", "x", "1:2")),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_weights(text)
    assert "\n" not in str(error.value)


def test_the_score_is_the_weighted_mean_of_what_applies():
    weights = parse_weights("words:1,answer:5,ends:0.5,dialogue:2.5")
    parts = {"words": 0.5, "ends": 1.0, "dialogue": 0.0}
    assert score(weights, Answered(STORY, "A cat.", True)) == ((0.5 + 0.5) / 4, parts)
    assert score(parse_weights("answer:1,words:2"), Answered(Case("summary", "?", "a"), "A cat.", True)) == (None, {})


def test_full_marks_are_1_and_none_0():
    """For any weights: no round-off leads beyond."""
    weights = parse_weights("words:0.1,sentence:0.2,dialogue:0.3,moral:1e6,ends:0.7,repetition:1e-9")
    assert score(weights, Answered(STORY, GOOD, True))[0] == 1
    del weights["repetition"]
    assert score(weights, Answered(STORY, "", False))[0] == 0
