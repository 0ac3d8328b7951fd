"""Shorter versions of a conversation about a story that is too long, for `prepare`."""

import re
from collections.abc import Iterator

from tinysft_jax.data.tasks import Conversation

# What these ask for is still there when a story lacks its last sentences. A moral and an ending are not, whether
# people talk may be decided by the last line, and a story that is the answer is never cut.
TRIMMABLE_TASKS = frozenset(("summary", "what_happened", "main_character"))
# Half a story and the summary of the whole would teach to make things up.
MIN_KEPT = 0.5

# Not after "Mr.", and not before the "said" of a quotation.
_SENTENCE_END = re.compile(r"""(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bMrs)[.!?…]["'”’)]*(?=\s)(?! +[a-z])""")


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
    for end in reversed([match.end() for match in _SENTENCE_END.finditer(story)]):
        if end < MIN_KEPT * len(story):
            return
        if not _is_quoting(story[:end]):
            yield [{**question, "content": before + story[:end] + after}, answer]


def _is_quoting(text: str) -> bool:
    """Whether a quotation is open at the end of the text; none runs over the end of its paragraph."""
    paragraph = text.rpartition("\n")[2]
    return paragraph.count('"') % 2 == 1 or paragraph.count("“") > paragraph.count("”")
