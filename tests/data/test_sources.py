"""What prepare reads: files and pairs, formats, the division into train and valid."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.console import UserError
from tinysft_jax.data.reading import MAX_BYTES
from tinysft_jax.data.sources import Item, open_embedded, open_input, split_of
from tinysft_jax.tasks.records import parse_record

RECORD = "Words: cat, hat\nStory: \n\nA cat had a hat.\n"


def items(path: Path, format: str = "auto", valid_fraction: float = 0.0, limit: int | None = None) -> list[Item]:
    return list(open_input(path, format, valid_fraction, limit))


@pytest.mark.parametrize(
    "names",
    [
        ("TinyStories-Instruct-train.txt", "TinyStories-Instruct-valid.txt"),
        ("TinyStoriesInstruct-train.txt", "TinyStoriesInstruct-valid.txt"),
        ("my.chat-train.jsonl", "my.chat-valid.jsonl"),
        ("train.txt", "valid.txt"),
    ],
)
def test_a_directory_gives_its_pair(tmp_path: Path, names):
    for name, text in zip(names, ("one", "two"), strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("about training")
    assert [(item.split, item.text.strip()) for item in items(tmp_path)] == [("train", "one"), ("valid", "two")]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "has no pair like"),
        (["a-train.txt"], r"has a-train\.txt but no a-valid\.txt"),
        (["a-train.txt", "b-valid.txt"], r"no a-valid\.txt"),
        (["a-train.txt", "a-valid.txt", "b-train.txt", "b-valid.txt"], r"several pairs: a-train\.txt, b-train\.txt"),
    ],
)
def test_a_directory_without_one_pair_is_refused(tmp_path: Path, names, complaint):
    for name in names:
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=complaint):
        open_input(tmp_path, "auto", 0.1, None)


def test_missing_and_empty_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no .*nowhere\.txt"):
        open_input(tmp_path / "nowhere.txt", "auto", 0.1, None)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        open_input(tmp_path / "empty.txt", "auto", 0.1, None)


@pytest.mark.parametrize(
    ("name", "text", "format"),
    [
        ("a.jsonl", "{}", "conversations"),
        ("a.txt", RECORD, "tinystories-instruct"),
        ("a.txt", "A Story: of a cat.\n", "text"),
        ("a.txt", f"\ufeff{RECORD}", "tinystories-instruct"),
        ("a.txt", "\ufeffStory: A cat.", "tinystories-instruct"),
        ("a.md", "Once upon a time.", "text"),
        ("a.json", "Once upon a time.", "text"),
        ("a.JSONL", "{", "conversations"),
        ("a.json", '{"messages": [', "conversations"),
        *(
            (f"a.{ending}", '\ufeff\n {"messages": []}\nno', "conversations")
            for ending in ("json", "ndjson", "txt", "md")
        ),
        ("a.txt", '{\n  "messages": []\n}', "conversations"),
        ("a.txt", '{"text": "' + "long " * 100_000 + '"}', "conversations"),
        ("a.txt", '[\n  {"messages": []},\n', "conversations"),
        ("a.txt", '[{"messages": []}]', "conversations"),
        ("a.txt", '["one", "two"]', "conversations"),
        ("a.txt", "{a} b", "text"),
        ("a.txt", "{'messages': []}", "text"),
        ("a.txt", "[Laughs] Once upon a time.", "text"),
        ("a.txt", "[1] Once upon a time.", "text"),
        ("a.txt", '["Once"] upon a time.', "text"),
        ("a.txt", "[" * 100_000, "text"),
    ],
)
def test_the_format_is_told_from_name_and_content(tmp_path: Path, name, text, format):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert open_input(tmp_path / name, "auto", 0.1, None).format == format
    assert open_input(tmp_path / name, "text", 0.1, None).format == "text"


def test_a_pair_of_two_formats_is_refused(tmp_path: Path):
    (tmp_path / "a-train.txt").write_text("Once upon a time.")
    (tmp_path / "a-valid.txt").write_text('{"messages": []}')
    with pytest.raises(UserError, match=r"a-train\.txt looks like text and a-valid\.txt looks like conversations"):
        open_input(tmp_path, "auto", 0.1, None)
    assert len(items(tmp_path, "text")) == 2


def test_items_know_where_they_stand(tmp_path: Path):
    chat, array, story = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.txt"
    chat.write_text('\ufeff{"a": 1}\n\n\ufeff{"b": 2}\n\ufeff\n', encoding="utf-8")
    array.write_text('\ufeff[\n{"a": 1}, {"b":\n2},\n3]', encoding="utf-8")
    story.write_text(f"{RECORD}<|endoftext|>\n<|endoftext|>\n{RECORD}")
    assert [(item.where, item.text) for item in items(chat)] == [
        (f"{chat}:1", '{"a": 1}'),
        (f"{chat}:3", '{"b": 2}'),
    ]
    assert [(item.where, item.text) for item in items(array)] == [
        (f"{array}:2, element 1", '{"a": 1}'),
        (f"{array}:2, element 2", '{"b":\n2}'),
        (f"{array}:4, element 3", "3"),
    ]
    assert [item.where for item in items(story)] == [f"{story}, record 1", f"{story}, record 2"]
    assert [item.where for item in items(story, "text")] == [f"{story}, document 1", f"{story}, document 2"]


def test_a_limit_holds_for_each_file(tmp_path: Path):
    for split in ("train", "valid"):
        (tmp_path / f"a-{split}.txt").write_text("one<|endoftext|>two<|endoftext|>three")
    assert [(item.split, item.text.strip()) for item in items(tmp_path, limit=2)] == [
        *(("train", "one"), ("train", "two"), ("valid", "one"), ("valid", "two"))
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf_8_is_a_flaw_of_its_line(tmp_path: Path, name):
    path = tmp_path / name
    path.write_bytes(b"fine\ncaf\xe9 \n<|endoftext|>\nfine\n")
    found = items(path)
    (bad,) = [item for item in found if item.flaw]
    assert (bad.where, bad.text, bad.flaw) == (f"{path}:2, byte 4", "", "not UTF-8 text")
    assert found[-1].text.strip() == "fine"


def test_what_is_too_long_is_a_flaw_of_its_first_line(tmp_path: Path):
    for name, whole in (("a.jsonl", "\n"), ("a.txt", "<|endoftext|>")):
        path = tmp_path / name
        path.write_bytes(f"fine\n{whole}".encode())
        with path.open("r+b") as file:
            file.seek(0, 2)
            start = file.tell()
            file.truncate(start + MAX_BYTES + 1)  # NULs
        found = [(item.where, item.text.strip(), item.flaw) for item in items(path)]
        assert found[1] == (f"{path}:{3 if whole == chr(10) else 2}", "", "longer than 8 MiB")
        assert found[0][1] == "fine" and len(found) == 2


def test_position_reaches_the_size(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("é\r\n<|endoftext|>\r\nb".encode())
    for source in (open_input(tmp_path / "a.txt", "auto", 0.1, None), open_embedded(3, "auto", 0)):
        assert source.position == 0
        list(source)
        assert source.position == source.size


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_split_depends_on_the_text_alone_and_grows_with_the_fraction(text):
    assert split_of(text, 0.0) == "train" and split_of(text, 1.0) == "valid"
    assert split_of(text, 0.5) == split_of(f"\n{text}\n", 0.5)
    if split_of(text, 0.3) == "valid":
        assert split_of(text, 0.6) == "valid"


def test_the_split_has_the_fraction_that_was_asked_for_and_stays_when_a_file_grows(tmp_path: Path):
    documents = [f"Document {i}" for i in range(2000)]
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(documents[:1000]))
    before = items(path, valid_fraction=0.1)
    path.write_text("<|endoftext|>".join(["new", *documents]))
    after = {item.text: item.split for item in items(path, valid_fraction=0.1)}
    assert all(after[item.text] == item.split for item in before)
    assert 150 < sum(split == "valid" for split in after.values()) < 250


def test_embedded_stories_come_as_records_or_as_text():
    records, texts = list(open_embedded(40, "auto", 0)), list(open_embedded(40, "text", 0))
    # A story for training is followed by its sketch, and in text by twelve verses; one for validation by nothing.
    assert [(item.split, item.brief) for item in records] == [("train", False), ("train", True)] * 40 + [
        ("valid", False)
    ] * 2
    assert [item.split for item in texts] == ["train"] * 14 * 40 + ["valid"] * 2
    stories = [parse_record(item.text).story for item in records]
    assert [item.text for item in texts[:560] if "verse" not in item.where] == stories[:80]
    assert [item.text for item in texts[560:]] == stories[80:]
    assert sum("verse" in item.where for item in texts) == 12 * 40
    assert [item.text for item in open_embedded(40, "auto", 1)] != [item.text for item in records]
    assert [item.split for item in open_embedded(1, "auto", 0)] == ["train", "train", "valid"]


def test_embedded_stories_refuse_what_they_cannot_be():
    with pytest.raises(UserError, match="not alpaca"):
        open_embedded(1, "alpaca", 0)
    with pytest.raises(UserError, match="positive number"):
        open_embedded(0, "auto", 0)
