"""The main character of a story: the one that is named most often, where that is clear.

A character is a name ("Lily") or a being ("the little duck"). Mentions are counted. Most of the code finds out which
words are names, which nouns are beings, and which being has which name: after "a duck called Pip", "the duck" is Pip.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from tinysft_jax.tasks.answers import word_set

# The character that is named most needs this many mentions, and so many more than the next one: fewer if it also comes
# first in the story. A mention that opens a sentence counts twice.
MIN_MENTIONS = 2
MARGIN = 3
MARGIN_IF_FIRST = 1

# Capitalised words that occur inside sentences and are not names. The family's titles are among them because they say
# who someone is to the main character.
_NOT_NAMES = word_set(
    """Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August
    September October November December Christmas Halloween Easter Thanksgiving Earth English God End Ok Yes No Mom
    Mommy Mum Mummy Mama Momma Mother Dad Daddy Papa Father Grandma Grandpa Granny Grandmother Grandfather Grandad
    Nana Sir Miss Mister Madam Mrs Mr Ms Dr Little Big Old Young Happy Birthday
    He She They It We You I The A An His Her Their My Your Our Its This That These Those There Then But And So When
    As After Before While Once One Every Everyone Everybody Everything Suddenly Finally Soon Now At In On From With For
    To Inside Outside If Because What Why Who Where How Oh Not All Some Many Just Even Later Luckily Next Also
    Sometimes Wow Hello Hi Hey Please Thank Thanks Look Let Can Do Don Are Is Was Did Will Come Go Sorry Okay Good
    Great Yay"""
)
# Nouns that are beings in every story. Any other noun is one where it thinks, feels or speaks.
_BEINGS = word_set(
    """boy girl child kid baby toddler man woman lady farmer king queen prince princess knight pirate wizard witch
    fairy giant elf monster dragon unicorn mermaid ghost robot clown sailor captain baker teacher doctor cat kitten
    kitty dog puppy pup mouse rat rabbit bunny hare bear fox wolf lion tiger elephant giraffe zebra monkey horse
    pony donkey cow calf pig piglet sheep lamb goat deer squirrel hedgehog beaver otter badger mole kangaroo koala
    panda camel hippo rhino whale dolphin shark fish octopus crab turtle tortoise frog toad snake lizard alligator
    crocodile dinosaur snail worm caterpillar butterfly bee ant beetle ladybug spider bird duck duckling goose swan
    hen chick chicken rooster turkey owl eagle crow parrot penguin pigeon robin sparrow bat animal creature"""
)
_FEELS = word_set(
    """said says asked replied answered cried shouted yelled whispered laughed smiled giggled sang thought wanted
    wished hoped decided felt loved liked knew learned learnt understood remembered believed"""
)
_INDEFINITE = word_set("a an another")
_ARTICLES = _INDEFINITE | {"the", "this", "that"}
_PREPOSITIONS = word_set("of to in on at by for from with without near under over into behind beside like about")
_FUNCTION_WORDS = word_set(
    """and or but as than then that who which when was were is are be had has have did do not his her its their my your
    our he she it they we you i"""
)
# What ends the search for a noun's article; everything else between the two counts as an adjective.
_NOT_ADJECTIVES = _FEELS | _PREPOSITIONS | _FUNCTION_WORDS
_NOT_NOUNS = _NOT_ADJECTIVES | word_set("one other both rest voice family sign note letter book people children")
_NAMING = word_set("named called")

_WORD = re.compile(r"(?:(?:(?:Mr|Mrs|Ms|Dr)\.?|Miss|Aunt|Uncle|Mother|Father) (?=[A-Z]))?[^\W\d_]+(?:-[^\W\d_]+)*")
_OPENING = re.compile(r"[.!?:…\n–—]|[\"“”'‘(\[]$| - $")


class _Word(NamedTuple):
    text: str  # without a possessive ending: that is the next word
    gap: str  # between the word before and this one
    opens: bool  # a sentence or a quotation


class _Being(NamedTuple):
    start: int  # of "a little duck" in the words: the article
    end: int  # the noun
    noun: str
    adjectives: tuple[str, ...]
    introduces: bool


def main_character(story: str) -> str | None:
    """The name ("Lily") or the being with its article ("the little duck") that the story is about.

    None where it isn't clear: two characters are named about as often, or nobody is named twice.
    """
    words = _split(story)
    names = _names(words)
    mentions = _mentions(words, names)
    if not mentions:
        return None
    pairs = [  # "Tom and Lily": both open a sentence with it, and neither comes first
        (index - 2, index)
        for index in range(2, len(words))
        if words[index - 1].text == "and" and {words[index - 2].text, words[index].text} <= names
    ]
    openers = {index for index, word in enumerate(words) if word.opens}
    openers |= {second for first, second in pairs if first in openers}
    opened = {name: len(openers.intersection(found)) for name, found in mentions.items()}
    scores = {name: len(found) + opened[name] for name, found in mentions.items()}
    best, *others = sorted(mentions, key=lambda name: (-scores[name], mentions[name][0]))
    is_person = best in names and (opened[best] or any(_is_subject(words, index) for index in mentions[best]))
    if not (best.startswith("the ") or is_person) or len(mentions[best]) < MIN_MENTIONS:
        return None
    lead = scores[best] - max((scores[other] for other in others), default=0)
    start = mentions[best][0]
    if all(start < mentions[other][0] for other in others) and all(start != first for first, _ in pairs):
        return best if lead >= MARGIN_IF_FIRST else None
    return best if lead >= MARGIN and opened[best] == max(opened.values()) else None


def _is_subject(words: list[_Word], index: int) -> bool:
    """Whether the name is introduced ("named Ben") or acts ("One day, Ben"): places and things rarely do."""
    before = words[index - 1].text
    return before in _NAMING or (words[index].gap == ", " and before.islower())


def _split(story: str) -> list[_Word]:
    words: list[_Word] = []
    end = 0
    for match in _WORD.finditer(story):
        gap = story[end : match.start()]
        words.append(_Word(match[0], gap, end == 0 or (gap != " " and _OPENING.search(gap) is not None)))
        end = match.end()
    return words


def _names(words: list[_Word]) -> set[str]:
    """The words with a capital that they don't owe to opening a sentence."""
    written = Counter(word.text for word in words)
    inside = Counter(word.text for word in words if word.text[0].isupper() and not word.opens)
    names = {word for word, count in inside.items() if count >= written[word.lower()]}
    for first, link, second in zip(words, words[1:], words[2:], strict=False):
        if first.text[0].isupper() and link.text == "and" and second.text in names:
            names.add(first.text)
    return {word for word in names if word not in _NOT_NAMES and not word.isupper()}


def _mentions(words: list[_Word], names: set[str]) -> dict[str, list[int]]:
    """The ascending indices of the words that mention each character, and of words that might be a name.

    "John" may only ever open sentences, or just the story. He is no answer then, but who is has to be named more.
    """
    mentions: defaultdict[str, list[int]] = defaultdict(list)
    written = Counter(word.text for word in words)
    for index, word in enumerate(words):
        may_be_name = word.opens and (index == 0 or written[word.text] > 1) and not written[word.text.lower()]
        if word.text in names or (may_be_name and word.text not in _NOT_NAMES):
            mentions[word.text].append(index)
    for character, index in _being_mentions(words, names):
        mentions[character].append(index)
    return {character: sorted(found) for character, found in mentions.items()}


def _beings(words: list[_Word]) -> list[_Being]:
    """The nouns with an article that stand for beings, in order."""
    phrases = []
    acting = set(_BEINGS)
    texts = [word.text for word in words] + [""]
    for index, word in enumerate(words):
        if word.text.islower() and word.text not in _NOT_NOUNS and (start := _article(words, index)) is not None:
            phrases.append((start, index))
            acts = texts[index + 1] in _FEELS and words[index + 1].gap == " "
            if acts and (start == 0 or texts[start - 1].lower() not in _PREPOSITIONS):
                acting.add(word.text)
    return [
        _Being(start, end, texts[end], tuple(texts[start + 1 : end]), texts[start].lower() in _INDEFINITE)
        for start, end in phrases
        if texts[end] in acting and texts[end + 1] not in acting  # "baby" is an adjective in "the baby elephant"
    ]


def _article(words: list[_Word], noun: int) -> int | None:
    """The index of the article that belongs to the noun, with only adjectives between them."""
    for index in range(noun - 1, max(noun - 6, -1), -1):
        text = words[index].text.lower()
        if text in _ARTICLES and words[index + 1].gap == " ":
            return index
        if words[index + 1].gap not in (" ", ", ") or text in _NOT_ADJECTIVES or text != words[index].text:
            return None
    return None


def _being_mentions(words: list[_Word], names: set[str]) -> Iterator[tuple[str, int]]:
    """Yields (character, word index) for each mention of a being; the character is its name where it has one.

    "The duck" is whoever was introduced as a duck. Where the story has two of them, an adjective has to tell which.
    """
    beings = _beings(words)
    introduced: defaultdict[str, dict[tuple[str, ...], set[str]]] = defaultdict(dict)  # noun → adjectives → names
    for being in beings:
        if being.introduces or not introduced[being.noun]:
            introduced[being.noun].setdefault(being.adjectives, set())

    def candidates(being: _Being) -> list[tuple[str, ...]]:
        if being.introduces:
            return [being.adjectives]
        known = introduced[being.noun]
        return [adjectives for adjectives in known if set(adjectives) & set(being.adjectives)] or list(known)

    for being, name in _named_beings(words, beings):
        known = candidates(being)
        if name in names and len(known) == 1:
            introduced[being.noun][known[0]].add(name)
    for being in beings:
        characters = set()
        for adjectives in candidates(being):
            characters |= introduced[being.noun][adjectives] or {" ".join(("the", *adjectives, being.noun))}
        if len(characters) == 1:
            yield characters.pop(), being.start


def _named_beings(words: list[_Word], beings: list[_Being]) -> Iterator[tuple[_Being, str]]:
    """Yields each being that the story gives a name, with the name."""
    texts = [*(word.text for word in words), "", "", ""]  # what is before the first word and after the last is empty
    for being in beings:
        before, after = being.start - 1, being.end + 1
        ends_there = after >= len(words) or words[after].gap.startswith((",", ".", "!", "?"))
        if texts[after] in ("who", "that") and texts[after + 1] in ("is", "was"):
            after += 2
        if texts[after] in _NAMING:  # a duck (who was) called Pip
            yield being, texts[after + 1]
        elif texts[after] == "whose" and texts[after + 1] == "name":  # a duck whose name was Pip
            yield being, texts[after + 3]
        elif texts[before] in ("is", "was"):  # Pip was a duck
            yield being, texts[before - 1]
        elif words[being.start].gap == ", " and ends_there:  # Pip, a duck,
            yield being, texts[before]
        elif not being.introduces and before >= 0 and words[before].opens and words[being.start].gap == " ":
            yield being, texts[before]  # Pip the duck
    for index, text in enumerate(texts):
        if text in ("His", "Her", "Its") and texts[index + 1] == "name" and texts[index + 2] in ("is", "was"):
            described = [being for being in beings if being.end < index]
            if described:  # There was a duck. Her name was Pip.
                yield described[-1], texts[index + 3]
