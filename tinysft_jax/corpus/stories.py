"""The embedded corpus: any number of short stories in the form of TinyStories-Instruct, made without a download.

Each story tells one of the plots of `story_parts` with characters, things and wordings of its own, and is built around
a noun, a verb and an adjective, as the stories of TinyStories are. So what a reader would answer (who is it about, how
does it end, do they talk) is known.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from tinysft_jax.corpus import story_parts
from tinysft_jax.corpus.story_parts import Character, Ending, Plot
from tinysft_jax.tasks.answers import sentences
from tinysft_jax.tasks.records import StoryRecord

T = TypeVar("T")

FEATURES = ("Dialogue", "BadEnding", "Twist", "Foreshadowing", "MoralValue", "Conflict")

# Verses that are a sentence again and again.
ECHOES = 3
# Verses that are words and nothing else, in any order: how many different ones, and how long they are at least.
CHANTS, CHANT_LENGTH = (1, 1, 2, 2, 3, 3, 4, 5), 6
CHANTED = (
    "moral",
    *story_parts.NOUNS,
    *story_parts.VERBS,
    *story_parts.ADJECTIVES,
    *(child.name for child in story_parts.CHILDREN),
)

# Probabilities: of what a story has, ...
BAD_ENDING, SPEECH, MORAL, HINT, QUARREL, ATTEMPT = 0.45, 0.52, 0.45, 0.35, 0.3, 0.35
# ... of "he" where the name could stand, of a line with speech in a story with speech, ...
PRONOUN, SPOKEN_LINE = 0.35, 0.75
# ... and of the fields of a record.
HAS_FEATURES, HAS_WORDS, HAS_SUMMARY, HAS_RANDOM_SENTENCE = 0.92, 0.95, 0.96, 0.9
# How often a record's sentence is the story's first one, which a small model learns to use before others; else any one.
FIRST_SENTENCE = 0.7


@dataclass(frozen=True)
class EmbeddedStory:
    """A record of the embedded corpus, and the truth about its story.

    Attributes:
      record: as a parser would read it from the text.
      main_character: what a reader would call the main character: "Lily", or "the little duck".
      happy_ending: whether the story ends well for the main character.
      dialogue: whether somebody speaks in quotes.
      plot: the plot's name.
      sketch: a story of a few sentences about the same character and words, which ends in the same mood.
      verses: a few words, again and again.

    Training data has the sketches and, as plain text, the verses as well: in a short context it takes a small model far
    fewer steps to find out that words come back, and what a question is about, than in a story.
    """

    record: StoryRecord
    main_character: str
    happy_ending: bool
    dialogue: bool
    plot: str
    sketch: StoryRecord
    verses: tuple[str, ...]


def embedded_stories(n: int, split: Literal["train", "valid"] = "train", seed: int = 0) -> Iterator[EmbeddedStory]:
    """Yields `n` stories; story i depends on nothing but i, the split and the seed.

    No pair of a main character and a plot is in both splits, whatever the seeds, nor is a pair of a plot and the words
    to use. So a valid story can't be told from memory.
    """
    for index in range(n):
        yield _story(random.Random(f"{seed}/{split}/{index}"), held_out=split == "valid")


def record_text(record: StoryRecord) -> str:
    """A record as TinyStories-Instruct text, without the separator; the order of its fields varies with the story."""
    fields = {
        "Features": ", ".join(record.features or ()),
        "Words": ", ".join(record.words),
        "Summary": record.summary,
        "Random sentence": record.random_sentence,
    }
    lines = [f"{name}: {content}\n" for name, content in fields.items() if content]
    rng = random.Random(record.story)
    lines.sort(key=lambda _: rng.random())
    place = len(lines) if _chance(rng, 0.7) else _index(rng, len(lines) + 1)
    lines.insert(place, f"Story: \n\n{record.story}\n")
    return "".join(lines)


def _story(rng: random.Random, held_out: bool) -> EmbeddedStory:
    """Draws a story on one side of the split."""
    while True:
        plot = _pick(rng, story_parts.PLOTS)
        main = _main_character(rng)
        while _is_held_out(plot.name, main.name) != held_out:
            main = _main_character(rng)
        happy = not _chance(rng, BAD_ENDING)
        ending = _pick(rng, [ending for ending in plot.endings if ending.happy == happy])
        words = _draw_words(rng)
        while _is_held_out(plot.name, *words.values()) != held_out:
            words = _draw_words(rng)
        narrator = _Narrator(rng, plot, main, ending, words)
        told = narrator.tell()
        if narrator.main_stands_out(told.story):
            break
    record, sketch = (_record(rng, each, tuple(words.values())) for each in (told, narrator.sketch()))
    echoes = (_echo(rng, each.story) for each in (record, sketch))
    verses = (*narrator.verses(), *echoes, *(_chant(rng, n) for n in CHANTS))
    return EmbeddedStory(record, main.name, happy, "Dialogue" in told.features, plot.name, sketch, verses)


def _last_lines(moral: bool) -> tuple[str, ...]:
    """A story without a moral says that it ends: so it is a single word that decides."""
    return story_parts.MORALS if moral else story_parts.THE_END


class _Told(NamedTuple):
    story: str
    summary: str
    features: tuple[str, ...]


def _record(rng: random.Random, told: _Told, words: tuple[str, ...]) -> StoryRecord:
    return StoryRecord(
        # As in the real data, a story without any of the features has no such line.
        features=told.features if told.features and _chance(rng, HAS_FEATURES) else None,
        words=tuple(sorted(words, key=lambda _: rng.random())) if _chance(rng, HAS_WORDS) else (),
        summary=told.summary if _chance(rng, HAS_SUMMARY) else None,
        random_sentence=_random_sentence(rng, told.story) if _chance(rng, HAS_RANDOM_SENTENCE) else None,
        story=told.story,
    )


def _main_character(rng: random.Random) -> Character:
    group = rng.random()
    if group < 0.58:
        return _pick(rng, story_parts.CHILDREN)
    return _pick(rng, story_parts.NAMED_BEINGS if group < 0.77 else story_parts.UNNAMED_BEINGS)


class _Narrator:
    """Tells one story: knows who and what is in it, and whether they talk."""

    def __init__(self, rng: random.Random, plot: Plot, main: Character, ending: Ending, words: dict[str, str]):
        self.rng, self.plot, self.main, self.ending = rng, plot, main, ending
        among_children = main in story_parts.CHILDREN
        others = story_parts.CHILDREN if among_children else story_parts.BEINGS
        friend = _pick(rng, [character for character in others if character is not main])
        preposition, place = _pick(rng, plot.places)
        self.parts = {
            "M": main,
            "F": friend,
            "E": _pick(rng, story_parts.FAMILY if among_children else story_parts.WISE_BEINGS),
            "place": place,
            "at": f"{preposition} {place}",
            "moral": _pick(rng, ending.morals),
            **words,
            **story_parts.verb_forms(words["verb"]),
            **{name: _pick(rng, values) for name, values in plot.choices.items()},
        }
        self.they_talk = _chance(rng, SPEECH)
        is_old_friend = friend.kind and not plot.strangers and _chance(rng, 0.5)
        self.friend_intro = f"{main.his} friend {friend}" if is_old_friend else friend.intro

    def tell(self) -> _Told:
        rng, steps = self.rng, self.plot.steps
        hint, quarrel, moral = _chance(rng, HINT), _chance(rng, QUARREL), _chance(rng, MORAL)
        attempts = _chance(rng, ATTEMPT) + _chance(rng, ATTEMPT)
        beginning = self._paragraph(
            self._choose([line for line in story_parts.OPENINGS if not (self.plot.strangers and "{F" in line)]),
            self._choose(story_parts.PASTIMES),
            self._choose(steps["wish"]),
            self._choose(steps["hint"], hint),
        )
        middle = self._paragraph(
            self._choose(steps["trouble"]),
            self._choose(steps["attempt"], attempts),
            self._choose(steps["quarrel"], quarrel),
        )
        end = self._paragraph(
            self._choose(self.ending.lines), self._choose(story_parts.RETURNS), self._choose(self._closings())
        )
        line_break = _pick(rng, ("\n\n", "\n\n", "\n"))
        story = beginning + _pick(rng, (line_break, line_break, " ")) + middle + line_break + end
        story += line_break + self._phrase(*self._choose(_last_lines(moral)))

        joint = ", " if self.ending.summary.startswith(("but", "so")) else " "
        summary = self._phrase(self.plot.premise + joint + self.ending.summary + ".")
        features = dict.fromkeys(self.ending.features, True)
        features |= {"MoralValue": moral, "Foreshadowing": hint, "Conflict": quarrel or "Conflict" in features}
        return self._told(story, summary, features)

    def sketch(self) -> _Told:
        """Nothing but the beginning, the words to use and the end, with nobody else at the beginning."""
        moral = _chance(self.rng, MORAL)
        openings = [line for line in story_parts.OPENINGS if "{F" not in line and "{E" not in line]
        told = (openings, story_parts.PASTIMES, story_parts.RETURNS, self._closings())
        story = self._paragraph(*map(self._choose, (*told, _last_lines(moral))))
        summaries = story_parts.HAPPY_SUMMARIES if self.ending.happy else story_parts.SAD_SUMMARIES
        return self._told(story, self._phrase(*self._choose(summaries)), {"MoralValue": moral})

    def verses(self) -> list[str]:
        return [self._phrase(line) for line in self._choose(story_parts.VERSES, 2)]

    def _told(self, story: str, summary: str, features: dict[str, bool]) -> _Told:
        """With the features that can be seen, too."""
        present = features | {"Dialogue": '"' in story, "BadEnding": not self.ending.happy}
        return _Told(story, summary, tuple(feature for feature in FEATURES if present.get(feature)))

    def _closings(self) -> tuple[str, ...]:
        return story_parts.HAPPY_CLOSINGS if self.ending.happy else story_parts.SAD_CLOSINGS

    def main_stands_out(self, story: str) -> bool:
        """Whether nobody else is named nearly as often as the main character."""
        mentions = {key: story.count(str(self.parts[key]).removeprefix("the ")) for key in "MFE"}
        return mentions["M"] > 1 + max(mentions["F"], mentions["E"])

    def _choose(self, step: Sequence[str], n: int = 1) -> list[str]:
        """Draws n different lines of a step, in the order in which they stand there."""
        chosen: list[str] = []
        while len(chosen) < n:
            speak = self.they_talk and _chance(self.rng, SPOKEN_LINE)
            others = [line for line in step if line not in chosen]
            chosen.append(_pick(self.rng, [line for line in others if ('"' in line) == speak] or others))
        return sorted(chosen, key=step.index)

    def _paragraph(self, *steps: Sequence[str]) -> str:
        lines = [line for step in steps for line in step]
        for i in range(1, len(lines)):
            # "He" is clear after a line about the main character and nobody else.
            is_clear = "{M" in lines[i - 1] and not re.search("{F|{E|[Tt]hey", lines[i - 1]) and self.main.he != "it"
            if is_clear and re.match("{M} (?!and)", lines[i]) and _chance(self.rng, PRONOUN):
                lines[i] = lines[i].replace("{M}", "{M.he}", 1)
        return " ".join(map(self._phrase, lines))

    def _phrase(self, line: str) -> str:
        if "{F" in line:
            line = line.replace("{F}", self.friend_intro, 1)
            self.friend_intro = "{F}"
        text = line.format_map(self.parts)
        text = re.sub(r"\[([^]]*)\]", lambda match: _pick(self.rng, match[1].split("|")), text)
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        # A sentence begins with the line or after a full stop. After `!"` or `?"` stands "said", not a new sentence.
        return re.sub(r'(^"?|[.!?] "?|\." )[a-z]', lambda match: match[0].upper(), text)


def _random_sentence(rng: random.Random, story: str) -> str:
    """A sentence of the story, of four words or more."""
    long = [sentence for sentence in sentences(story) if sentence.count(" ") > 2]
    return long[0] if _chance(rng, FIRST_SENTENCE) else _pick(rng, long)


def _echo(rng: random.Random, story: str) -> str:
    return " ".join([_random_sentence(rng, story)] * ECHOES)


def _chant(rng: random.Random, n: int) -> str:
    """Any n words and names, said over and over."""
    return " ".join([_pick(rng, CHANTED) for _ in range(n)] * max(2, CHANT_LENGTH // n))


def _draw_words(rng: random.Random) -> dict[str, str]:
    """A verb, a noun and an adjective to build a story around."""
    pools = {"verb": story_parts.VERBS, "noun": story_parts.NOUNS, "adjective": story_parts.ADJECTIVES}
    return {part: _pick(rng, pool) for part, pool in pools.items()}


def _is_held_out(*combination: str) -> bool:
    """Puts one combination in eight on the valid side, by a hash that is the same in every process."""
    return hashlib.sha256("|".join(combination).encode()).digest()[0] % 8 == 0


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[_index(rng, len(options))]


def _chance(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability


def _index(rng: random.Random, n: int) -> int:
    """An index below n. `random()` is all that Python promises to keep the same from version to version."""
    return int(rng.random() * n)
