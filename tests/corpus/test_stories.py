"""The embedded corpus: what it claims about each story is true, and it has the proportions that it should have."""

import functools
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from tiers import slow

from tinysft_jax.corpus.stories import (
    BEINGS,
    CHILDREN,
    FAMILY,
    FEATURES,
    LINES,
    PLOTS,
    UNNAMED_BEINGS,
    WISE_BEINGS,
    WORDS,
    EmbeddedStory,
    embedded_stories,
    is_held_out,
    record_text,
    verb_forms,
)
from tinysft_jax.tasks.answers import find_moral
from tinysft_jax.tasks.characters import main_character
from tinysft_jax.tasks.records import parse_records
from tinysft_jax.tokenizer import ChatTokenizer

CHARACTERS = {character.name.lower() for character in (*CHILDREN, *BEINGS, *FAMILY, *WISE_BEINGS)}
NAMED = re.compile(rf"\b(?:{'|'.join(CHARACTERS)})\b", re.IGNORECASE)
GLITCH = re.compile(r"[][{}|]|  |\b[Aa] [aeiou]|[.!?] [a-z]|\.\.|,,|\bthe the\b|^[a-z]|\b[HS]h?e and")
PLOT = {plot["name"]: plot for plot in PLOTS}
ALL_WORDS = [word for words in WORDS.values() for word in words]


@pytest.fixture(scope="module")
def train() -> list[EmbeddedStory]:
    return list(embedded_stories(4000))


@pytest.fixture(scope="module")
def some(train: list[EmbeddedStory]) -> list[EmbeddedStory]:
    return train[:1000]


@pytest.fixture(scope="module")
def valid() -> list[EmbeddedStory]:
    return list(embedded_stories(1000, "valid", seed=1))


def share(conditions: Iterable[bool]) -> float:
    values = list(conditions)
    return sum(values) / len(values)


def is_told(lines: Sequence[str], story: str) -> bool:
    """Whether one of the corpus's lines is in the story, whatever its open parts were filled with."""
    return any(pattern.search(story) for pattern in patterns(tuple(lines)))


@functools.cache
def patterns(lines: tuple[str, ...]) -> list[re.Pattern[str]]:
    fixed = (map(re.escape, re.split(r"\{.*?\}|\[.*?\]", line)) for line in lines)
    return [re.compile(".+?".join(parts), re.IGNORECASE) for parts in fixed]


# --- Which stories there are ------------------------------------------------------------------------------------------


def test_a_story_depends_on_index_split_and_seed_alone():
    first, *_, last = itertools.islice(embedded_stories(1000), 5)
    again = list(embedded_stories(5))
    assert (again[0], again[-1]) == (first, last)
    assert next(embedded_stories(1, seed=1)) != first
    assert next(embedded_stories(1, "valid")) != first


def test_another_process_makes_the_same_stories():
    """Also where strings hash differently, which would show in the order of a set."""
    program = "from tinysft_jax.corpus.stories import *\nfor story in embedded_stories(40, 'valid', 7): print(story)"
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert output.splitlines() == [str(story) for story in embedded_stories(40, "valid", 7)]


@pytest.mark.parametrize("n", slow(6000, 20_000))
def test_as_many_stories_as_the_demos_have_are_distinct(n: int):
    assert len({story.record.story for story in embedded_stories(n)}) == n


@pytest.mark.slow
def test_other_seeds_and_splits_tell_other_stories(train: list[EmbeddedStory], valid: list[EmbeddedStory]):
    others = [story for seed in (1, 2) for story in embedded_stories(1000, seed=seed)]
    stories = [story.record.story for story in (*train, *valid, *others)]
    assert len(set(stories)) == len(stories) == 7000


def test_valid_combinations_are_held_out(train: list[EmbeddedStory], valid: list[EmbeddedStory]):
    def cast(stories: list[EmbeddedStory]) -> set[tuple[str, str]]:
        return {(story.main_character, story.plot) for story in stories}

    def tasks(stories: list[EmbeddedStory]) -> set[tuple[str, frozenset[str]]]:
        return {(story.plot, frozenset(story.record.words)) for story in stories if story.record.words}

    assert len(cast(valid)) > 50 and not cast(valid) & cast(train)
    assert len(tasks(valid)) > 500 and not tasks(valid) & tasks(train)


def test_a_plot_with_three_words_is_on_one_side(train: list[EmbeddedStory], valid: list[EmbeddedStory]):
    """So many combinations are possible that none of a sample comes twice: each is looked at by itself."""
    for stories, held_out in ((train, False), (valid, True)):
        for story in stories:
            words = sorted(
                story.record.words, key=lambda word: (word not in WORDS["verb"], word not in WORDS["noun"])
            )  # as drawn
            assert not words or is_held_out(story.plot, *words) == held_out


def test_every_name_plot_and_word_is_in_train(train: list[EmbeddedStory], valid: list[EmbeddedStory]):
    assert {story.main_character for story in train} == {character.name for character in (*CHILDREN, *BEINGS)}
    assert {story.plot for story in valid} == {story.plot for story in train} == set(PLOT)
    assert len(PLOT) == len(PLOTS) >= 14
    words, valid_words = ({word for story in stories for word in story.record.words} for stories in (train, valid))
    assert words == set(ALL_WORDS) and valid_words <= words


# --- What they are like -----------------------------------------------------------------------------------------------


def test_stories_are_as_long_as_the_real_ones_in_few_words(some: list[EmbeddedStory]):
    encode = ChatTokenizer().encode_text
    assert 150 < sum(len(encode(story.record.story)) for story in some) / len(some) < 240
    assert 1000 < len({word for story in some for word in re.findall("[a-z]+", story.record.story.lower())}) < 1500


def test_shares(train: list[EmbeddedStory]):
    assert 0.45 < share(story.dialogue for story in train) < 0.55
    assert 0.40 < share(not story.happy_ending for story in train) < 0.50
    unnamed = {character.name for character in UNNAMED_BEINGS}
    assert 0.20 < share(story.main_character in unnamed for story in train) < 0.25
    labelled = [story.record.features for story in train if story.record.features is not None]
    assert len(labelled) / len(train) > 0.8
    counts = Counter(feature for features in labelled for feature in features)
    assert all(0.2 < counts[feature] / len(labelled) < 0.6 for feature in FEATURES)


def test_fields_are_missing_now_and_then(some: list[EmbeddedStory]):
    assert 0.9 < share(story.record.summary is not None for story in some) < 1
    assert 0.9 < share(story.record.words != () for story in some) < 1
    assert 0.85 < share(story.record.random_sentence is not None for story in some) < 0.95


def test_the_first_capitalised_word_rarely_gives_the_main_character_away(some: list[EmbeddedStory]):
    first = (re.search(r"[A-Z]\w*", story.record.story)[0] for story in some)
    assert share(word in story.main_character.title().split() for word, story in zip(first, some, strict=True)) < 0.55


def test_the_text_is_clean(train: list[EmbeddedStory]):
    for story in train:
        text = story.record.story
        assert 2 <= len(re.findall(r"[^\n]+", text)) <= 4
        for part in (text, story.record.summary or ""):
            assert not GLITCH.search(part), part
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n"))


def test_characters_are_introduced_once_and_outside_speech(train: list[EmbeddedStory]):
    kinds = "|".join({character.kind for character in (*CHILDREN, *BEINGS) if character.kind})
    introduction = re.compile(rf"\b(?:{kinds}) named (\w+)\b")
    for story in train:
        introduced = introduction.findall(story.record.story)
        assert len(set(introduced)) == len(introduced) <= 2, story.record.story
        assert not re.search(f"{introduction.pattern}'s", story.record.story)
        assert not any(introduction.search(quote) for quote in re.findall('"[^"]*"', story.record.story))


# --- What they are said to be -----------------------------------------------------------------------------------------


def test_dialogue_is_quoted_speech(train: list[EmbeddedStory]):
    for story in train:
        assert story.dialogue == ('"' in story.record.story)
        assert story.record.features is None or ("Dialogue" in story.record.features) == story.dialogue


@pytest.mark.parametrize("part", [slice(100), *slow(slice(100, None))])
def test_the_ending_and_the_features_are_those_of_the_events(some: list[EmbeddedStory], part: slice):
    for story in some[part]:
        plot, text = PLOT[story.plot], story.record.story
        ending = next(ending for ending in plot["endings"] if is_told(ending["lines"], text))
        assert ending["happy"] == story.happy_ending, text
        if story.record.features is not None:
            features, of_ending = set(story.record.features), ending.get("features", ())
            assert ("BadEnding" in features) == (not story.happy_ending)
            assert ("Twist" in features) == ("Twist" in of_ending), text
            assert ("Foreshadowing" in features) == is_told(plot["steps"]["hint"], text), text
            assert ("Conflict" in features) == ("Conflict" in of_ending or is_told(plot["steps"]["quarrel"], text))


def test_a_moral_is_the_last_sentence(some: list[EmbeddedStory]):
    """Or else the story ends with two words that begin like it."""
    moral = re.compile(r"^The moral of the story is: [^.]+\.$|^The moral is that [^.]+\.$")
    told = []
    for story in some:
        *before, last = re.split(r"(?<=[.!?])\s+", story.record.story)
        told.append(moral.search(last) is not None)
        assert told[-1] or last == "The end."
        assert not any(moral.search(sentence) or sentence == "The end." for sentence in before)
        if story.record.features is not None:
            assert ("MoralValue" in story.record.features) == told[-1], last
    assert 0.4 < share(told) < 0.5


def test_the_main_character_is_named_most(train: list[EmbeddedStory]):
    for story in train:
        (name, most), *others = Counter(map(str.lower, NAMED.findall(story.record.story))).most_common(2)
        assert name == story.main_character.lower(), story.record.story
        assert all(most > count for _, count in others), story.record.story


def test_the_summary_is_about_the_story(train: list[EmbeddedStory]):
    for story in train:
        if story.record.summary is not None:
            named = set(map(str.lower, NAMED.findall(story.record.summary)))
            assert story.main_character.lower() in named
            # "the brown puppy" may be "a brown puppy" there.
            assert all(name.removeprefix("the ") in story.record.story.lower() for name in named), story


def test_the_words_are_in_the_story(some: list[EmbeddedStory]):
    for record in (record for story in some for record in (story.record, story.sketch)):
        assert len(set(record.words)) in (0, 3)
        told = Counter(re.findall("[a-z]+", record.story.lower()))
        # The verb may be told in the past the first time.
        assert all(told[word] >= (1 if word in WORDS["verb"] else 2) for word in record.words), record


@pytest.mark.parametrize("part", [slice(50), *slow(slice(50, None))])
def test_a_sketch_is_a_short_story_with_the_same_character_words_and_mood(some: list[EmbeddedStory], part: slice):
    closings = {True: LINES["happy_closings"], False: LINES["sad_closings"]}
    for story in some[part]:
        sketch = story.sketch
        assert len(sketch.story.split()) < 90 and len(sketch.story) < len(story.record.story)
        assert not GLITCH.search(sketch.story) and "\n" not in sketch.story, sketch.story
        assert not (story.record.words and sketch.words) or set(sketch.words) == set(story.record.words)
        assert main_character(sketch.story) in (story.main_character, None)
        opening, *_ = re.split(r"(?<=[.!?]) ", sketch.story)
        assert set(map(str.lower, NAMED.findall(opening))) <= {story.main_character.lower()}, sketch.story
        assert is_told(closings[story.happy_ending], sketch.story)
        assert not is_told(closings[not story.happy_ending], sketch.story)
        if sketch.features is not None:
            assert ("BadEnding" in sketch.features) == (not story.happy_ending)
            assert ("Dialogue" in sketch.features) == ('"' in sketch.story)
            assert ("MoralValue" in sketch.features) == (find_moral(sketch.story) is not None)
            assert ("MoralValue" in sketch.features) != sketch.story.endswith(" The end.")
            assert set(sketch.features) <= {"BadEnding", "Dialogue", "MoralValue"}
        if sketch.summary is not None:
            assert main_name(story) in sketch.summary and not GLITCH.search(sketch.summary)
            assert all(word in sketch.summary for word in sketch.words)


def test_sketches_are_about_somebody_and_told_in_many_ways(some: list[EmbeddedStory]):
    sketches = [story.sketch.story for story in some]
    assert share(main_character(sketch) is not None for sketch in sketches) > 0.6
    for line in (*LINES["pastimes"], *LINES["returns"]):
        assert any(is_told((line,), sketch) for sketch in sketches), line


def main_name(story: EmbeddedStory) -> str:
    """As it stands at the beginning of a sentence."""
    return story.main_character[0].upper() + story.main_character[1:]


def test_verses_say_their_words_again(some: list[EmbeddedStory]):
    for story in some:
        about_its_words, of_its_stories, chants = story.verses[:2], story.verses[2:4], story.verses[4:]
        assert all(word in verse for verse in about_its_words for word in story.record.words)
        assert all(not GLITCH.search(verse[0].upper() + verse[1:]) for verse in story.verses)
        for verse, told in zip(of_its_stories, (story.record, story.sketch), strict=True):
            sentence = verse[: len(verse) // 3]
            assert verse == f"{sentence} {sentence} {sentence}" and sentence in told.story
        for verse in chants:
            words = verse.split()
            n = next(n for n in range(1, len(words)) if words[n:] == words[:-n])
            assert len(words) >= 2 * n and len(words) >= 6
    assert {word for story in some for verse in story.verses[4:] for word in verse.split()} > {
        *WORDS["noun"],
        *WORDS["verb"],
        "moral",
    }


def test_the_words_are_single_tokens_where_vocabularies_are_small():
    encode = ChatTokenizer("control", 8192).encode_text
    assert [word for word in ALL_WORDS if len(encode(f" {word}")) > 1] == []
    assert len(set(ALL_WORDS)) == len(ALL_WORDS)


@pytest.mark.parametrize(
    ("verb", "past", "ing"),
    [
        ("hop", "hopped", "hopping"),
        ("race", "raced", "racing"),
        ("study", "studied", "studying"),
        ("play", "played", "playing"),
        ("row", "rowed", "rowing"),
        ("travel", "traveled", "traveling"),
    ],
)
def test_forms_of_verbs(verb: str, past: str, ing: str):
    assert verb_forms(verb) == {"verbed": past, "verbing": ing}


def test_the_random_sentence_is_often_the_first(some: list[EmbeddedStory]):
    found = [(story.record.story, sentence) for story in some if (sentence := story.record.random_sentence) is not None]
    assert 0.7 < share(story.startswith(sentence) for story, sentence in found) < 0.85


def test_the_random_sentence_is_one_of_the_story(some: list[EmbeddedStory]):
    for story in some:
        sentence = story.record.random_sentence
        if sentence is not None:
            around = re.search(rf"(^|[.!?]\"?\s+){re.escape(sentence)}(\s+[A-Z\"]|$)", story.record.story)
            assert around and sentence.count('"') % 2 == 0 and sentence.count(" ") > 2, sentence
            assert re.fullmatch(r'["A-Z].*[.!?]"?', sentence), sentence


# --- As text ----------------------------------------------------------------------------------------------------------


def test_records_survive_as_text(some: list[EmbeddedStory]):
    lines = [line for story in some for line in f"{record_text(story.record)}<|endoftext|>\n".splitlines(keepends=True)]
    assert list(parse_records(lines)) == [story.record for story in some]


def test_fields_stand_in_any_order(some: list[EmbeddedStory]):
    orders = Counter(tuple(re.findall(r"^[\w ]+(?=:)", record_text(story.record), re.MULTILINE)) for story in some)
    assert 0.6 < sum(count for order, count in orders.items() if order[-1] == "Story") / len(some) < 0.9
    assert {order[0] for order in orders} == {"Features", "Words", "Summary", "Random sentence", "Story"}


# --- What they are made of --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot["name"])
def test_a_plot_can_be_told_with_and_without_speech(plot: dict):
    steps = [*plot["steps"].values(), *(ending["lines"] for ending in plot["endings"])]
    assert all(any('"' not in line for line in step) for step in steps)
    assert sum(any('"' in line for line in step) for step in steps) > len(steps) / 2
    assert {ending["happy"] for ending in plot["endings"]} == {True, False}
    assert all("{F}" not in quote for step in steps for line in step for quote in re.findall('"[^"]*"', line))
