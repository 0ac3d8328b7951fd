"""Shorter versions of a conversation about a story that is too long, for `prepare`."""

from collections.abc import Iterator

from tinysft_jax.data.sentences import sentence_ends
from tinysft_jax.data.tasks import Conversation

# What these ask for is still there when a story lacks its last sentences. A moral and an ending are not, whether
# people talk may be decided by the last line, and a story that is the answer is never cut.
TRIMMABLE_TASKS = frozenset(("summary", "what_happened", "main_character"))
# Half a story and the summary of the whole would teach to make things up.
MIN_KEPT = 0.5


def shortened(conversation: Conversation, story: str) -> Iterator[list[dict[str, str]]]:
    """Yields the conversation's messages with ever fewer of the last turns, then of the last sentences of the story.

    The question, before the story or after it, and the answer stay as they are. No sentence goes where the task can't
    spare the end of its story, nor once too much of it would be gone.
    """
    for end in range(len(conversation.messages) - 2, 0, -2):
        yield conversation.messages[:end]
    question, answer, *_ = conversation.messages
    before, found, after = question["content"].partition(story)
    if conversation.task not in TRIMMABLE_TASKS or not found:
        return
    for end in reversed([*sentence_ends(story)]):
        if end < MIN_KEPT * len(story):
            return
        yield [{**question, "content": before + story[:end] + after}, answer]
