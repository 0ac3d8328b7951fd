"""The data set's own task: write a story from words, features, a summary and a sentence, or from some of them.

A request is a line that asks for a story and a line for each condition. It can be read back, so that whoever judges a
story knows what was asked for.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tinysft_jax.data.phrasings import choose, very_short, words_in
from tinysft_jax.data.records import StoryRecord

CONDITIONS = ("features", "words", "summary", "random_sentence")

# What the features that the data set knows are called by people.
FEATURE_NAMES = {
    "Dialogue": "dialogue",
    "BadEnding": "a bad ending",
    "Twist": "a twist",
    "Foreshadowing": "foreshadowing",
    "MoralValue": "a moral",
    "Conflict": "a conflict",
}
_FEATURE_OF = {name: feature for feature, name in FEATURE_NAMES.items()}


class _Style(NamedTuple):
    """A wording of the request: its first line, and what each condition's line begins with."""

    opening: str
    labels: dict[str, str]
    plain: bool  # whether features have the names that people use


def _style(opening: str, features: str, words: str, summary: str, random_sentence: str, plain: bool = True) -> _Style:
    labels = dict(zip(CONDITIONS, (features, words, summary, random_sentence), strict=True))
    return _Style(opening, {condition: f"{label}: " for condition, label in labels.items()}, plain)


# The first is the canonical one, with the data set's own headers.
_STYLES = (
    _style("Write a short story.", "Features", "Words", "Summary", "Random sentence", plain=False),
    _style(
        "Please write a story for me.",
        "It should have",
        "It should use all of these words",
        "It should tell this",
        "It should contain this sentence",
    ),
    _style("Tell me a story.", "Put these in", "Use these words", "What happens", "Say this at some point"),
    _style("Make up a short story as follows.", "With", "Words to use", "In short", "Sentence to include"),
)


class StoryRequest(NamedTuple):
    """What a story is to be written from; a field that is empty or None is not asked for.

    Attributes:
      words: words that the story is to use.
      features: of those of a `StoryRecord`.
      summary: what is to happen, on one line.
      random_sentence: a sentence that is to occur, on one line.
    """

    words: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    summary: str | None = None
    random_sentence: str | None = None

    def prompt(self, draw: float, order: Mapping[str, float]) -> str:
        """The request as text.

        Args:
          draw: from [0, 1); decides the wording.
          order: a number for each condition; the lines come by rising numbers.
        """
        style = _STYLES[choose(len(_STYLES), draw)]
        features = [FEATURE_NAMES.get(feature, feature) for feature in self.features] if style.plain else self.features
        contents = {
            "features": ", ".join(features),
            "words": ", ".join(self.words),
            "summary": self.summary,
            "random_sentence": self.random_sentence,
        }
        lines = [
            style.labels[name] + content for name in sorted(order, key=order.__getitem__) if (content := contents[name])
        ]
        return "\n".join([style.opening, *lines])


def conditions_of(record: StoryRecord) -> StoryRequest:
    """Everything that the record knows of its story."""
    return StoryRequest(
        tuple(map(_one_line, record.words)),
        tuple(map(_one_line, record.features or ())),
        None if record.summary is None else _one_line(record.summary),
        None if record.random_sentence is None else _one_line(record.random_sentence),
    )


def parse_request(prompt: str) -> StoryRequest:
    """What a prompt of the tasks "words" and "story" asks for, in any of their wordings.

    Prompts of other tasks ask for nothing.
    """
    opening, *lines = prompt.split("\n")
    style = next((style for style in _STYLES if opening in (style.opening, very_short(style.opening))), None)
    if style is None:
        return StoryRequest(words_in(prompt))
    found: dict[str, str] = {}
    for line in lines:
        for name, label in style.labels.items():
            if line.startswith(label):
                found[name] = line.removeprefix(label)
    features = _items(found.get("features"))
    if style.plain:
        features = tuple(_FEATURE_OF.get(feature, feature) for feature in features)
    return StoryRequest(_items(found.get("words")), features, found.get("summary"), found.get("random_sentence"))


def requested_words(prompt: str) -> tuple[str, ...]:
    """The words that a prompt of the tasks "words" and "story" asks for, in any of their wordings; or none."""
    return parse_request(prompt).words


def _items(line: str | None) -> tuple[str, ...]:
    return tuple(line.split(", ")) if line else ()


def _one_line(text: str) -> str:
    return " ".join(text.split())
