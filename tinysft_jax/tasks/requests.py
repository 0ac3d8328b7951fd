"""What a conversation begins with, and how requests are worded."""

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

_LENGTHS = {
    False: {"a_story": "a story", "a_short_story": "a short story"},
    True: dict.fromkeys(("a_story", "a_short_story"), "a very short story"),
}


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
        length = _LENGTHS[self.brief]
        if self.task != "story":
            content = self.story or ", ".join(self.conditions["words"])
            return choose(PHRASINGS[self.task], self.draw).format(content, **length)
        phrasing = choose(STORY_PHRASINGS, self.draw)
        contents = dict(self.conditions)
        if "features" in contents and phrasing is not STORY_PHRASINGS[0]:
            contents["features"] = [FEATURE_NAMES.get(feature, feature) for feature in contents["features"]]
        opening, *labels = phrasing
        label_of = dict(zip(CONDITIONS, labels, strict=True))
        lines = [
            f"{label_of[name]}: {content if isinstance(content, str) else ', '.join(content)}"
            for name, content in contents.items()
        ]
        return "\n".join([opening.format(**length), *lines])


def choose(phrasings: Sequence[T], draw: float) -> T:
    """One of several phrasings, given a number drawn from [0, 1)."""
    place = 0 if draw < CANONICAL else 1 + int((draw - CANONICAL) / (1 - CANONICAL) * (len(phrasings) - 1))
    return phrasings[place]


def follow_up(task: str, draw: float) -> str:
    """A request about the story that is being talked about, given a number drawn from [0, 1)."""
    return FOLLOW_UPS[task][int(draw * len(FOLLOW_UPS[task]))]


def conditions_of(record: StoryRecord) -> dict[str, Any]:
    """Everything that the record knows of its story, each item on one line; see `Request`."""
    conditions = {
        "features": [_one_line(feature) for feature in record.features or ()],
        "words": [_one_line(word) for word in record.words],
        "summary": _one_line(record.summary or ""),
        "random_sentence": _one_line(record.random_sentence or ""),
    }
    return {name: value for name, value in conditions.items() if value}


def _one_line(text: str) -> str:
    return " ".join(text.split())
