"""How requests about stories are worded, and read back."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from tinysft_jax.tasks.records import StoryRecord

# The share of prompts in the canonical wording; the others of a task come equally often.
CANONICAL = 0.4

# `{}` is where the story stands, or the words to use. Some wordings ask before the story and some after it.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "summary": (
        "Please provide a brief summary of the following story: {}",
        "Summarize this story briefly: {}",
        "Tell me in a few words what this story is about.\n\n{}",
        "{}\n\nWrite a short summary of the story above.",
    ),
    "moral": (
        "What is the moral lesson of this story? {}",
        "What can we learn from this story? {}",
        "Find the sentence that says what this story teaches.\n\n{}",
        "{}\n\nWhat is the moral of the story above?",
    ),
    "words": (
        "Write a short story that uses all of these words: {}",
        "Write a story using these words: {}",
        "Here are some words: {}\n\nTell me a short story in which each of them occurs.",
        "Use the words {} in a short story.",
    ),
    "main_character": (
        "Based on this story, who is the main character? {}",
        "Who is this story about? {}",
        "Read this story and name its main character.\n\n{}",
        "{}\n\nWho is the main character of the story above?",
    ),
    "what_happened": (
        "What happened in this story? {}",
        "Tell me what happens in this story: {}",
        "What are the main events of this story?\n\n{}",
        "{}\n\nWhat happened in the story above?",
    ),
    "happy_ending": (
        "Does this story have a happy ending? {}",
        "Does this story end well? {}",
        "Read this story and tell me whether it ends happily.\n\n{}",
        "{}\n\nIs the ending of the story above a happy one?",
    ),
    "dialogue": (
        "Is there any dialogue in this story? {}",
        "Does anybody speak in this story? {}",
        "Read this story and tell me whether its characters talk.\n\n{}",
        "{}\n\nIs there dialogue in the story above?",
    ),
}

# When the story has been talked about already.
FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "summary": ("Please summarize it.", "What is it about, in short?", "Can you say that in one sentence?"),
    "moral": ("What is its moral?", "What does it teach us?", "And what can we learn from it?"),
    "main_character": ("Who is the main character?", "Who is it about?", "And what is the main character called?"),
    "what_happened": ("What happened?", "What happens in it?", "And what are its main events?"),
    "happy_ending": ("Does it have a happy ending?", "Does it end well?", "And is the ending a happy one?"),
    "dialogue": ("Is there any dialogue in it?", "Does anybody speak in it?", "And do its characters talk?"),
    "beginning": ("How does it begin?", "What is its first sentence?", "And how does it start?"),
}


def very_short(wording: str) -> str:
    """A request for a story, as one for a very short story."""
    return re.sub(r"\ba (?:short )?story\b", "a very short story", wording, count=1)


_WORDS_REQUESTS = [
    re.compile("(.*)".join(map(re.escape, phrasing.split("{}"))), re.DOTALL)
    for wording in PHRASINGS["words"]
    for phrasing in (wording, very_short(wording))
]


def choose(n: int, draw: float) -> int:
    """Which of n wordings to use, given a number drawn from [0, 1)."""
    return 0 if draw < CANONICAL else 1 + int((draw - CANONICAL) / (1 - CANONICAL) * (n - 1))


def phrase(task: str, content: str, draw: float) -> str:
    """A prompt of the task about a story, or with words to use.

    Args:
      task: a key of `PHRASINGS`.
      content: the story or the words.
      draw: from [0, 1); decides the wording.
    """
    phrasing = PHRASINGS[task][choose(len(PHRASINGS[task]), draw)]
    return phrasing.replace("{}", content)


def follow_up(task: str, draw: float) -> str:
    """A request of the task about the story that is being talked about.

    Args:
      task: a key of `FOLLOW_UPS`.
      draw: from [0, 1); decides the wording.
    """
    return FOLLOW_UPS[task][int(draw * len(FOLLOW_UPS[task]))]


def words_in(prompt: str) -> tuple[str, ...]:
    """The words of a prompt of the task "words", in any wording; empty if it is another prompt."""
    for request in _WORDS_REQUESTS:
        if match := request.fullmatch(prompt):
            return tuple(match[1].split(", "))
    return ()


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
