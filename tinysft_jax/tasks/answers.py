"""Answers found in a story: where sentences end, the moral, whether somebody speaks."""

import itertools
import re
from collections.abc import Iterator

# Not after "Mr.", and not before the "said" of a quotation.
_END = re.compile(r"""(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bMrs)[.!?…]["'”’)]*(?=\s)(?! +[a-z])""")


def sentence_ends(text: str) -> Iterator[int]:
    """Yields the index after each sentence but the last. A quotation is not divided."""
    start = straight = curly = 0
    for match in _END.finditer(text):
        _, line_break, part = text[start : match.end()].rpartition("\n")
        if line_break:  # no quotation runs over the end of its paragraph
            straight = curly = 0
        straight += part.count('"')
        curly += part.count("“") - part.count("”")
        start = match.end()
        if straight % 2 == 0 and curly <= 0:
            yield start


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of the text, without the white space around them."""
    for start, end in itertools.pairwise((0, *sentence_ends(text), len(text))):
        if sentence := text[start:end].strip():
            yield sentence


_MORALS = (
    # The moral of the story is: share what you find. / The lesson is to be kind to others. / Moral: ...
    re.compile(r"\b(?:moral|lesson)\b(?: of (?:the|this) \w+)?(?: is\b[:,]?| was\b[:,]?|:) \W*\w+ \w+ \w+", re.I),
    # Tom learned that it is good to share. / They learned an important lesson: never lie. But not: Tom learned to swim.
    re.compile(
        r"\blearn(?:ed|t) (?:(?:that day )?that |how important |the (?:importance|value) |not to "
        r"|(?:to )?(?:always|never) |.{0,30}\blesson\b.{0,20}(?:[:,–—]| -| about| that) \w+)"
    ),
    # Tom realized that he should share. But not: Tom realized that his ball was gone.
    re.compile(
        r"\b(?:reali[sz]ed|understood) (?:how important |that .*\b(?:should|must|need|important|better|always|never)\b)"
    ),
)
_SPEECH = re.compile(r"[\"“”]|^['‘]")


def find_moral(story: str) -> str | None:
    """The last sentence of the story that says what it teaches, word for word.

    One that names the moral is preferred to one about what somebody learned, and that to one about what somebody
    realised. None where there is none but speech, and sentences that need others ("He learned his lesson.").
    """
    found = [sentence for line in story.split("\n") for sentence in sentences(line)]
    told = [sentence for sentence in reversed(found) if not _SPEECH.search(sentence)]
    return next((sentence for pattern in _MORALS for sentence in told if pattern.search(sentence)), None)


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAYS = word_set(
    """say says said saying ask asks asked asking reply replies replied answer answers answered tell tells told cry
    cries cried shout shouts shouted yell yells yelled scream screamed call calls called whisper whispers
    whispered explain explains explained exclaim exclaims exclaimed add adds added beg begs begged sing sings sang
    agree agrees agreed suggest suggested warn warned mumble mumbled growl growled squeak squeaked roar roared
    cheer cheered respond responds responded offer offered promise promised repeat repeated scold scolded continue
    continued laugh laughs laughed smile smiles smiled giggle giggles giggled gasp gasps gasped sigh sighs sighed
    sob sobs sobbed"""
)
_QUOTATION = re.compile(r'"([^"\n]*)(?:"|$)', re.MULTILINE)
_ENDS_AS_SPEECH = re.compile(r"[.,!?…—–-]\s*$")
# The words beside a quotation, up to the end of their sentence.
_CLAUSE_BEFORE = re.compile(r'[^.!?"\n]*$')
_CLAUSE_AFTER = re.compile(r'[^.!?"\n]*')
# A sign said: "..." / She painted a sign. It said: "..." / a dog called "Spot"
_NOT_SPEECH = re.compile(
    r"\b(?:signs?|notes?|letters?|cards?|books?|pages?|labels?|posters?|stickers?|papers?|maps?|messages?|words)\b"
    r"(?: (?!and\b)\w+){0,5}(?:\W+(?:it|that|which))? (?:said|says|say|reads?)\W*$|\bcall(?:s|ed)?$",
    re.IGNORECASE,
)
_SINGLE_QUOTES = re.compile(r"(?<!\S)['‘][A-Z]")


def has_dialogue(story: str) -> bool | None:
    """Whether somebody in the story speaks in quotation marks, straight or curly.

    None where that isn't clear: a quotation reads like speech but no verb says so, or the quotes are single ones.
    """
    unclear = False
    story = re.sub("[“”„]", '"', story)
    for quotation in _QUOTATION.finditer(story):
        ends_as_speech = _ENDS_AS_SPEECH.search(quotation[1]) is not None
        before = story[max(0, quotation.start() - 100) : quotation.start()].rstrip()
        after = story[quotation.end() : quotation.end() + 50]
        if ends_as_speech and _says(_CLAUSE_AFTER.match(after)):
            return True
        if _NOT_SPEECH.search(before):
            continue
        if _says(_CLAUSE_BEFORE.search(before)):
            return True
        unclear = unclear or ends_as_speech
    return None if unclear or _SINGLE_QUOTES.search(story) else False


def _says(clause: re.Match[str] | None) -> bool:
    return clause is not None and not _SAYS.isdisjoint(re.findall(r"\w+", clause[0]))
