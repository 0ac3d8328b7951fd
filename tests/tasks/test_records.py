"""Parsing TinyStories-Instruct text."""

import io
import itertools
import json
import re
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.chat import is_blank
from tinysft_jax.tasks.records import SEPARATOR, StoryRecord, parse_record, parse_records, split_records

HEADER = re.compile(r"^(Features|Words|Summary|Random sentence|Story):", re.MULTILINE)


def test_samples(records):
    """The sample file, with every variation of the real ones, parses as its answers say."""
    with (records / "samples.txt").open(encoding="utf-8", newline="") as file:
        text = file.read()
    parsed = [asdict(record) for record in parse_records(io.StringIO(text, newline=""))]
    expected = [json.loads(line) for line in (records / "expected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert json.loads(json.dumps(parsed)) == expected
    assert [parse_record(each) for each in split_records([text])].count(None) == 1


def texts(without: str) -> st.SearchStrategy[str]:
    """What can stand in a field and come out as it went in."""
    usable = st.text(st.characters(exclude_characters=f"\ufeff{without}"), min_size=1).map(str.strip)
    return usable.filter(lambda text: not is_blank(text) and SEPARATOR not in text and not HEADER.search(text))


TEXTS = texts(without="\r") | st.sampled_from(
    ("It said:\n Words: two", "a\n\nb", "“Story: one”", "a, Features: b", "<|end")
)
ITEMS = texts(without="\r\n,")
# Plain dicts: building records while drawing would call on the type checker, which is random.
RECORDS = st.fixed_dictionaries(
    dict(
        features=st.none() | st.lists(ITEMS, max_size=3).map(tuple),
        words=st.lists(ITEMS, max_size=4).map(tuple),
        summary=st.none() | TEXTS,
        random_sentence=st.none() | TEXTS,
        story=TEXTS,
    )
)


@st.composite
def rendered(draw, record: dict) -> str:
    """A record's fields as text, in any order."""
    comma = draw(st.sampled_from((",", ", ", " , ")))
    fields = [
        "Features:" + comma.join(record["features"]) if record["features"] is not None else None,
        "Words: " + comma.join(record["words"]) if record["words"] else None,
        "Summary: " + record["summary"] if record["summary"] else None,
        "Random sentence: " + record["random_sentence"] if record["random_sentence"] else None,
        draw(st.sampled_from(("Story:", "Story: \n\n"))) + record["story"],
    ]
    return "\n".join(field for field in draw(st.permutations(fields)) if field is not None)


@st.composite
def files(draw) -> tuple[list[dict], str, int]:
    """Records, a file that holds them, and how many records in it have no story."""
    written, text, without_story = [], draw(st.sampled_from(("", "\ufeff"))), 0
    for record in draw(st.lists(RECORDS, max_size=4)):
        written.append(record)
        text += draw(rendered(record))
        text += draw(st.sampled_from(("\n", ""))) + SEPARATOR + draw(st.sampled_from(("\n", "\n\n", "")))
        if draw(st.booleans()):
            text += draw(st.sampled_from(("Words: a, b\n", "Story: \n\n", "no header\n"))) + SEPARATOR + "\n"
            without_story += 1
    if draw(st.booleans()):
        text = text.removesuffix("\n").removesuffix(SEPARATOR)
    line_end = draw(st.sampled_from(("\n", "\r\n")))
    return written, text.replace("\n", line_end), without_story


@given(files(), st.sampled_from(("file", "lines", "untranslated")))
def test_round_trip(file, how):
    """Whatever the order of fields, line ends and separators, the records come out as they went in."""
    written, text, without_story = file
    lines = {
        "file": io.StringIO(text, newline=None),
        "untranslated": io.StringIO(text, newline=""),
        "lines": text.split("\n"),
    }
    parsed = list(map(parse_record, split_records(lines[how])))
    assert [record for record in parsed if record is not None] == [StoryRecord(**record) for record in written]
    assert parsed.count(None) == without_story


def test_the_separator_may_be_glued_to_text():
    lines = ["Story: One.<|endoftext|>\n", "<|endoftext|>Story: Two.<|endoftext|>Story: Three."]
    assert [record.story for record in parse_records(lines)] == ["One.", "Two.", "Three."]


def test_a_header_counts_only_at_the_first_column():
    record = parse_record('Story: It said:\n "Words: two."\n Summary: not one.\nwords: small\nSummary: One.')
    assert record.story == 'It said:\n "Words: two."\n Summary: not one.\nwords: small'
    assert (record.words, record.summary) == ((), "One.")


def test_the_first_of_two_fields_counts_unless_it_is_empty():
    record = parse_record("Words:\nSummary: The true one.\nStory: A story.\nWords: late\nSummary: Another.")
    assert (record.words, record.summary, record.story) == (("late",), "The true one.", "A story.")


@pytest.mark.parametrize("blank", ["", " \t", "\u200b\ufeff\u00ad", "\x00\x1b", "\u2800\u3164"])
def test_fields_that_look_empty_are_none(blank):
    assert parse_record(f"Story:{blank}") is None
    record = parse_record(f"Words: a,{blank},b\nSummary:{blank}\nRandom sentence:{blank}\nStory: One.")
    assert record == StoryRecord(None, ("a", "b"), None, None, "One.")
    assert list(split_records([f"One.{SEPARATOR}{blank}{SEPARATOR}Two."])) == ["One.", "Two."]


def test_features_are_unknown_without_their_line():
    assert parse_record("Story: A.").features is None
    assert parse_record("Features:\nStory: A.").features == ()
    assert parse_record("Features: Twist ,, BadEnding,\nStory: A.").features == ("Twist", "BadEnding")


def test_nothing_inside_a_story_is_changed():
    story = "  Two  spaces,\ttabs,\n\n\n  indented lines \nand “quotes” — stay."
    assert parse_record(f"Story:{story} \n\n").story == story.strip()


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_record_looks_the_same_whatever_the_line_ends(line_end):
    """So that what is computed from a record's text, a hash, doesn't depend on them."""
    text = f"\ufeff{line_end}Words: a{line_end}Story: b{line_end}c{line_end}{SEPARATOR}{line_end}"
    assert list(split_records([text])) == ["Words: a\nStory: b\nc"]


def test_byte_order_marks_are_dropped_wherever_files_were_put_together():
    lines = ["\ufeffStory: One.\n", f"{SEPARATOR}\n", "\ufeffWords: a\n", "\ufeffStory: Tw\ufeffo.\n"]
    assert [(record.words, record.story) for record in parse_records(lines)] == [((), "One."), (("a",), "Two.")]


def test_a_record_is_yielded_before_the_next_one_is_read():
    """Memory is bounded by a record: an endless file can be parsed."""
    taken = Counter()

    def endless():
        for number in itertools.count():
            taken["lines"] += 1
            yield f"Story: {number}{SEPARATOR}\n"

    stories = [record.story for record in itertools.islice(parse_records(endless()), 3)]
    assert stories == ["0", "1", "2"]
    assert taken["lines"] == 3


def test_a_string_is_not_lines():
    with pytest.raises(TypeError, match="iterable of lines"):
        list(parse_records("Story: A."))
