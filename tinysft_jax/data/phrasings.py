"""How the requests about stories are worded: a few ways each, and how to read them back.

The first wording of each is the canonical one: it comes most often, and examples use it.
"""

import re

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
