"""The first request of a conversation, structured until it is worded, and the wordings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tinysft_jax.tasks.records import StoryRecord

T = TypeVar("T")

# The share of prompts in the canonical wording, the first of its task; the others come equally often.
CANONICAL = 0.4

# `{}` is the story, or the words to use. Some wordings ask before the story and some after it.
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
        "Write {a_short_story} that uses all of these words: {}",
        "Write {a_story} using these words: {}",
        "Here are some words: {}\n\nTell me {a_short_story} in which each of them occurs.",
        "Use the words {} in {a_short_story}.",
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

# Wordings of requests about the story that a conversation is about already.
FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "summary": ("Please summarize it.", "What is it about, in short?", "Can you say that in one sentence?"),
    "moral": ("What is its moral?", "What does it teach us?", "And what can we learn from it?"),
    "main_character": ("Who is the main character?", "Who is it about?", "And what is the main character called?"),
    "what_happened": ("What happened?", "What happens in it?", "And what are its main events?"),
    "happy_ending": ("Does it have a happy ending?", "Does it end well?", "And is the ending a happy one?"),
    "dialogue": ("Is there any dialogue in it?", "Does anybody speak in it?", "And do its characters talk?"),
    "beginning": ("How does it begin?", "What is its first sentence?", "And how does it start?"),
}

# The task "story": a first line, and what the line of each condition begins with. The first has the data set's headers.
CONDITIONS = ("features", "words", "summary", "random_sentence")
STORY_PHRASINGS: tuple[tuple[str, ...], ...] = (
    ("Write {a_short_story}.", "Features", "Words", "Summary", "Random sentence"),
    (
        "Please write {a_story} for me.",
        "It should have",
        "It should use all of these words",
        "It should tell this",
        "It should contain this sentence",
    ),
    ("Tell me {a_story}.", "Put these in", "Use these words", "What happens", "Say this at some point"),
    ("Make up {a_short_story} as follows.", "With", "Words to use", "In short", "Sentence to include"),
)
# Features as the data set calls them (in its own wording), and as people do (in the others).
FEATURE_NAMES = {
    "Dialogue": "dialogue",
    "BadEnding": "a bad ending",
    "Twist": "a twist",
    "Foreshadowing": "foreshadowing",
    "MoralValue": "a moral",
    "Conflict": "a conflict",
}

_USUAL = {"a_story": "a story", "a_short_story": "a short story"}
_BRIEF = dict.fromkeys(_USUAL, "a very short story")


@dataclass(frozen=True)
class Request:
    """What the first message of a conversation asks."""

    task: str  # of PHRASINGS, or "story"
    draw: float  # from [0, 1); decides the wording
    story: str = ""  # what is asked about; empty where a story is asked for
    # What that story should have, as JSON, in this order: "features" and "words" (lists), "summary", "random_sentence".
    conditions: dict[str, Any] = field(default_factory=dict)
    brief: bool = False  # whether "a very short story" is asked for

    def text(self) -> str:
        """The request in words."""
        length = _BRIEF if self.brief else _USUAL
        if self.task != "story":
            content = self.story or ", ".join(self.conditions["words"])
            return choose(PHRASINGS[self.task], self.draw).format(content, **length)
        opening, *labels = phrasing = choose(STORY_PHRASINGS, self.draw)
        label_of = dict(zip(CONDITIONS, labels, strict=True))
        lines = [opening.format(**length)]
        for name, content in self.conditions.items():
            if name == "features" and phrasing is not STORY_PHRASINGS[0]:
                content = [FEATURE_NAMES.get(feature, feature) for feature in content]
            lines.append(f"{label_of[name]}: {content if isinstance(content, str) else ', '.join(content)}")
        return "\n".join(lines)


def choose(phrasings: Sequence[T], draw: float) -> T:
    """One of several phrasings, given a number drawn from [0, 1)."""
    place = 0 if draw < CANONICAL else 1 + int((draw - CANONICAL) / (1 - CANONICAL) * (len(phrasings) - 1))
    return phrasings[place]


def follow_up(task: str, draw: float) -> str:
    """A follow-up request, given a number drawn from [0, 1)."""
    return FOLLOW_UPS[task][int(draw * len(FOLLOW_UPS[task]))]


def conditions_of(record: StoryRecord) -> dict[str, Any]:
    """All conditions that the record's story meets, each item on one line; see `Request`."""

    def one_line(text: str | None) -> str:
        return " ".join((text or "").split())

    conditions = {
        "features": [*map(one_line, record.features or ())],
        "words": [*map(one_line, record.words)],
        "summary": one_line(record.summary),
        "random_sentence": one_line(record.random_sentence),
    }
    return {name: value for name, value in conditions.items() if value}
