"""The moral of a story, where one sentence of it says what there is to learn."""

import re

_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Ms\.)(?<!Dr\.)\s+|\n+")
_SPEECH = re.compile(r"[\"“”]|^['‘]")

# The moral of the story is: share what you find. / The lesson is to be kind to others. / Moral: ...
_MORAL = re.compile(r"\b(?:moral|lesson)\b(?: of (?:the|this) \w+)?(?: is\b[:,]?| was\b[:,]?|:) \W*\w+ \w+ \w+", re.I)
# Tom learned that it is good to share. / They learned an important lesson: never lie. But not: Tom learned to swim.
_LEARNED = re.compile(
    r"\blearn(?:ed|t) (?:(?:that day )?that |how important |the (?:importance|value) |not to |(?:to )?(?:always|never) "
    r"|.{0,30}\blesson\b.{0,20}(?:[:,–—]| -| about| that) \w+)"
)
# Tom realized that he should share. But not: Tom realized that his ball was gone.
_REALISED = re.compile(
    r"\b(?:reali[sz]ed|understood) (?:how important |that .*\b(?:should|must|need|important|better|always|never)\b)"
)


def find_moral(story: str) -> str | None:
    """The last sentence of the story that says what there is to learn, word for word.

    A sentence that names the moral goes before one about what somebody learned, and that before one about what
    somebody realised.

    Returns:
      None where no sentence does, or only one that needs its neighbours to be understood ("He learned his lesson."),
      or that somebody speaks.
    """
    sentences = [sentence.strip() for sentence in _SENTENCE_END.split(story)]
    for pattern in (_MORAL, _LEARNED, _REALISED):
        for sentence in reversed(sentences):
            if pattern.search(sentence) and not _SPEECH.search(sentence):
                return sentence
    return None
