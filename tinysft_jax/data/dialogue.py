"""Whether the characters of a story speak, as far as quotation marks show it.

Not everything in quotation marks is speech: a sign, a title or a thought can stand there too. It is speech where a verb
of saying stands beside it.
"""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAYS = _words(
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

    Returns:
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
