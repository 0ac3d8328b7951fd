"""The embedded corpus: any number of generated stories in the form of TinyStories-Instruct, without a download.

Each story tells one of the plots of `stories.toml` with its own characters and wordings, and is built around a noun, a
verb and an adjective, as the stories of TinyStories are. So the ground truth about it is known: who it is about, how it
ends, whether it has dialogue.
"""

import hashlib
import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from tinysft_jax.tasks.answers import sentences
from tinysft_jax.tasks.records import StoryRecord

T = TypeVar("T")

FEATURES = ("Dialogue", "BadEnding", "Twist", "Foreshadowing", "MoralValue", "Conflict")
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her"), "it": ("it", "it", "its")}


@dataclass(frozen=True)
class Character:
    """Somebody in a story. `stories.toml` refers to the attributes: `{M.his}`."""

    name: str  # "Lily", or "the little duck" where there is no name
    kind: str  # "girl", "mouse"; empty where the name says it
    he: str  # "he", "she" or "it"
    him: str
    his: str

    def __str__(self) -> str:
        return self.name

    @property
    def intro(self) -> str:
        """The first mention; [a|b] is a choice."""
        if not self.kind:
            return self.name.replace("the ", "a ", 1)
        return f"a [little |young |]{self.kind} named {self.name}"


_PARTS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("stories.toml").read_text(encoding="utf-8"))
PLOTS: list[dict[str, Any]] = _PARTS["plots"]
LINES: dict[str, list[str]] = _PARTS["lines"]
WORDS: dict[str, list[str]] = _PARTS["words"]
_GROUPS = {
    group: [Character(name, "".join(kind), *PRONOUNS[pronoun]) for name, pronoun, *kind in characters]
    for group, characters in _PARTS["characters"].items()
}
CHILDREN, FAMILY, WISE_BEINGS = _GROUPS["children"], _GROUPS["family"], _GROUPS["wise_beings"]
NAMED_BEINGS, UNNAMED_BEINGS = _GROUPS["named_beings"], _GROUPS["unnamed_beings"]
BEINGS = NAMED_BEINGS + UNNAMED_BEINGS

# Probabilities: of what a story has, ...
BAD_ENDING, SPEECH, MORAL, HINT, QUARREL, ATTEMPT = 0.45, 0.52, 0.45, 0.35, 0.3, 0.35
# ... of "he" where the name could be, of a line with speech in a story with speech, ...
PRONOUN, SPOKEN_LINE = 0.35, 0.75
# ... and of the fields of a record.
HAS_FEATURES, HAS_WORDS, HAS_SUMMARY, HAS_RANDOM_SENTENCE = 0.92, 0.95, 0.96, 0.9
# How often a record's sentence is the story's first, which a small model learns to use before others.
FIRST_SENTENCE = 0.7

# Verses are a sentence, so many times, or random words in a fixed number, repeated up to a least length.
ECHOES = 3
CHANTS, CHANT_LENGTH = (1, 1, 2, 2, 3, 3, 4, 5), 6
CHANTED = ("moral", *WORDS["noun"], *WORDS["verb"], *WORDS["adjective"], *(child.name for child in CHILDREN))


@dataclass(frozen=True)
class EmbeddedStory:
    """A record of the embedded corpus, and the ground truth about its story.

    Training data has the sketches as well, and as plain text the verses: in a short context, a small model needs far
    fewer steps to learn that words are repeated, and what a question is about.
    """

    record: StoryRecord
    main_character: str  # "Lily", or "the little duck"
    happy_ending: bool  # for the main character
    dialogue: bool  # whether somebody speaks in quotes
    plot: str  # its name
    sketch: StoryRecord  # a story of a few sentences with the same character, words and kind of ending
    verses: tuple[str, ...]  # a few words each, repeated


def embedded_stories(n: int, split: Literal["train", "valid"] = "train", seed: int = 0) -> Iterator[EmbeddedStory]:
    """Yields `n` stories; story i depends on nothing but i, the split and the seed.

    Whatever the seeds, no pair of a main character and a plot is in both splits, nor is a plot with the same words. So
    a validation story can't be told from memory.
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


def verb_forms(verb: str) -> dict[str, str]:
    """Past tense and present participle of a regular verb: hopped, hopping; baked, baking; hurried, hurrying."""
    stem = verb + verb[-1] if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", verb) else verb.removesuffix("e")
    return {"verbed": re.sub("([^aeiou])y$", r"\1i", stem) + "ed", "verbing": stem + "ing"}


def _story(rng: random.Random, held_out: bool) -> EmbeddedStory:
    """Draws a story of the validation split (`held_out`) or the other one."""
    while True:
        plot = _pick(rng, PLOTS)
        main = _main_character(rng)
        while is_held_out(plot["name"], main.name) != held_out:
            main = _main_character(rng)
        happy = not _chance(rng, BAD_ENDING)
        ending = _pick(rng, [ending for ending in plot["endings"] if ending["happy"] == happy])
        words = _draw_words(rng)
        while is_held_out(plot["name"], *words.values()) != held_out:
            words = _draw_words(rng)
        narrator = _Narrator(rng, plot, main, ending, words)
        told = narrator.tell()
        if narrator.main_stands_out(told.story):
            break
    record, sketch = (_record(rng, each, tuple(words.values())) for each in (told, narrator.sketch()))
    echoes = (" ".join([_random_sentence(rng, each.story)] * ECHOES) for each in (record, sketch))
    verses = (*narrator.verses(), *echoes, *(_chant(rng, n) for n in CHANTS))
    return EmbeddedStory(record, main.name, happy, "Dialogue" in told.features, plot["name"], sketch, verses)


def _main_character(rng: random.Random) -> Character:
    group = rng.random()
    return _pick(rng, CHILDREN if group < 0.58 else NAMED_BEINGS if group < 0.77 else UNNAMED_BEINGS)


def _draw_words(rng: random.Random) -> dict[str, str]:
    """A verb, a noun and an adjective to build a story around."""
    return {part: _pick(rng, WORDS[part]) for part in ("verb", "noun", "adjective")}


def is_held_out(*combination: str) -> bool:
    """Holds out one combination in eight, by a hash that is the same in every process."""
    return hashlib.sha256("|".join(combination).encode()).digest()[0] % 8 == 0


class _Told(NamedTuple):
    story: str
    summary: str
    features: tuple[str, ...]


class _Narrator:
    """Tells one story: knows who and what is in it, and whether there is dialogue."""

    def __init__(self, rng: random.Random, plot: dict, main: Character, ending: dict, words: dict[str, str]):
        self.rng, self.plot, self.main, self.ending = rng, plot, main, ending
        self.strangers = plot.get("strangers", False)
        among_children = main in CHILDREN
        others = CHILDREN if among_children else BEINGS
        friend = _pick(rng, [character for character in others if character is not main])
        preposition, place = _pick(rng, _PARTS["places"][plot["places"]])
        self.parts = {
            "M": main,
            "F": friend,
            "E": _pick(rng, FAMILY if among_children else WISE_BEINGS),
            "place": place,
            "at": f"{preposition} {place}",
            "moral": _pick(rng, ending["morals"]),
            **words,
            **verb_forms(words["verb"]),
            "look": _pick(rng, _PARTS["looks"]),
            **{name: _pick(rng, values) for name, values in plot.get("choices", {}).items()},
        }
        self.they_talk = _chance(rng, SPEECH)
        is_old_friend = friend.kind and not self.strangers and _chance(rng, 0.5)
        self.friend_intro = f"{main.his} friend {friend}" if is_old_friend else friend.intro

    def tell(self) -> _Told:
        rng, steps = self.rng, self.plot["steps"]
        hint, quarrel, moral = _chance(rng, HINT), _chance(rng, QUARREL), _chance(rng, MORAL)
        attempts = _chance(rng, ATTEMPT) + _chance(rng, ATTEMPT)
        beginning = self._paragraph(
            self._choose([line for line in LINES["openings"] if not (self.strangers and "{F" in line)]),
            self._choose(LINES["pastimes"]),
            self._choose(steps["wish"]),
            self._choose(steps["hint"], hint),
        )
        middle = self._paragraph(
            self._choose(steps["trouble"]),
            self._choose(steps["attempt"], attempts),
            self._choose(steps["quarrel"], quarrel),
        )
        end = self._paragraph(
            self._choose(self.ending["lines"]),
            self._choose(LINES["returns"]),
            self._choose(self._by_ending("closings")),
        )
        line_break = _pick(rng, ("\n\n", "\n\n", "\n"))
        story = beginning + _pick(rng, (line_break, line_break, " ")) + middle + line_break + end
        story += line_break + self._phrase(*self._choose(LINES["morals" if moral else "the_end"]))

        joint = ", " if self.ending["summary"].startswith(("but", "so")) else " "
        summary = self._phrase(self.plot["premise"] + joint + self.ending["summary"] + ".")
        features = {"MoralValue": moral, "Foreshadowing": hint, "Conflict": quarrel}
        return self._told(story, summary, features | dict.fromkeys(self.ending.get("features", ()), True))

    def sketch(self) -> _Told:
        """Only the beginning, without other characters, the words to use and the end."""
        moral = _chance(self.rng, MORAL)
        openings = [line for line in LINES["openings"] if "{F" not in line and "{E" not in line]
        last = LINES["morals" if moral else "the_end"]
        steps = (openings, LINES["pastimes"], LINES["returns"], self._by_ending("closings"), last)
        story = self._paragraph(*map(self._choose, steps))
        return self._told(story, self._phrase(*self._choose(self._by_ending("summaries"))), {"MoralValue": moral})

    def verses(self) -> list[str]:
        return [self._phrase(line) for line in self._choose(LINES["verses"], 2)]

    def main_stands_out(self, story: str) -> bool:
        """Whether nobody else is named nearly as often as the main character."""
        mentions = {key: story.count(str(self.parts[key]).removeprefix("the ")) for key in "MFE"}
        return mentions["M"] > 1 + max(mentions["F"], mentions["E"])

    def _told(self, story: str, summary: str, features: dict[str, bool]) -> _Told:
        """Adds the features that the story and its ending show."""
        present = features | {"Dialogue": '"' in story, "BadEnding": not self.ending["happy"]}
        return _Told(story, summary, tuple(feature for feature in FEATURES if present.get(feature)))

    def _by_ending(self, lines: str) -> list[str]:
        return LINES[f"{'happy' if self.ending['happy'] else 'sad'}_{lines}"]

    def _choose(self, step: Sequence[str], n: int = 1) -> list[str]:
        """Draws n different lines of a step, in their order."""
        chosen: list[str] = []
        while len(chosen) < n:
            speak = self.they_talk and _chance(self.rng, SPOKEN_LINE)
            others = [line for line in step if line not in chosen]
            chosen.append(_pick(self.rng, [line for line in others if ('"' in line) == speak] or others))
        return sorted(chosen, key=step.index)

    def _paragraph(self, *steps: Sequence[str]) -> str:
        lines = [line for step in steps for line in step]
        for i in range(1, len(lines)):
            # "He" is clear after a line about the main character alone.
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
        # A sentence begins with the line or after a full stop. After `!"` or `?"` there is "said", not a new sentence.
        return re.sub(r'(^"?|[.!?] "?|\." )[a-z]', lambda match: match[0].upper(), text)


def _record(rng: random.Random, told: _Told, words: tuple[str, ...]) -> StoryRecord:
    return StoryRecord(
        # As in the real data, a story without any of the features has no such line.
        features=told.features if told.features and _chance(rng, HAS_FEATURES) else None,
        words=tuple(sorted(words, key=lambda _: rng.random())) if _chance(rng, HAS_WORDS) else (),
        summary=told.summary if _chance(rng, HAS_SUMMARY) else None,
        random_sentence=_random_sentence(rng, told.story) if _chance(rng, HAS_RANDOM_SENTENCE) else None,
        story=told.story,
    )


def _random_sentence(rng: random.Random, story: str) -> str:
    """A sentence of the story, of four words or more."""
    long = [sentence for sentence in sentences(story) if sentence.count(" ") > 2]
    return long[0] if _chance(rng, FIRST_SENTENCE) else _pick(rng, long)


def _chant(rng: random.Random, n: int) -> str:
    """Any n words and names, repeated."""
    return " ".join([_pick(rng, CHANTED) for _ in range(n)] * max(2, CHANT_LENGTH // n))


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[_index(rng, len(options))]


def _chance(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability


def _index(rng: random.Random, n: int) -> int:
    """An index below n. `random()` is all that Python promises to keep the same from version to version."""
    return int(rng.random() * n)
