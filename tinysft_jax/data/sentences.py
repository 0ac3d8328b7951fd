"""Where sentences end: a quotation, whatever is in it, belongs to one."""

import itertools
import re
from collections.abc import Iterator

# Not after "Mr.", and not before the "said" of a quotation.
_END = re.compile(r"""(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bMrs)[.!?…]["'”’)]*(?=\s)(?! +[a-z])""")


def sentence_ends(text: str) -> Iterator[int]:
    """Yields the index after each sentence but the last."""
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
    start = 0
    for end in itertools.chain(sentence_ends(text), (len(text),)):
        if sentence := text[start:end].strip():
            yield sentence
        start = end
