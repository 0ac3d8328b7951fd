"""Shorter versions of a conversation about a story that is too long, for `prepare`."""

import re
from collections.abc import Iterator

from tinysft_jax.data.tasks import Conversation

# What these ask for is still there when a story lacks its last sentences. A moral and an ending are not, whether
# people talk may be decided by the last line, and a story that is the answer is never cut.
TRIMMABLE_TASKS = frozenset(("summary", "what_happened", "main_character"))
# Half a story and the summary of the whole would teach to make things up.
MIN_KEPT = 0.5

_SENTENCE_END = re.compile(r"""[.!?…]["'”’)]*(?=\s)""")


def shortened(conversation: Conversation, story: str) -> Iterator[list[dict[str, str]]]:
    """Yields the conversation's messages with ever fewer of the sentences at the end of the story in the prompt.

    The question before the story and the answer stay as they are. Nothing comes where the task can't spare the end of
    its story, or once too much of it would be gone.
    """
    question, *rest = conversation.messages
    if conversation.task not in TRIMMABLE_TASKS or not question["content"].endswith(story):
        return
    instruction = question["content"].removesuffix(story)
    for end in reversed([match.end() for match in _SENTENCE_END.finditer(story)]):
        if end < MIN_KEPT * len(story):
            return
        yield [{**question, "content": instruction + story[:end]}, *rest]
