"""Input that is not what it should be: named in one line, or skipped and counted, and never too much for the memory."""

import json
import time
from pathlib import Path

import pytest

from tinysft_jax.bpe import gpt2_tokens
from tinysft_jax.console import UserError
from tinysft_jax.data import prepare as command
from tinysft_jax.data.prepare import main
from tinysft_jax.data.reading import MAX_BYTES
from tinysft_jax.tokenizer import ChatTokenizer


def run(path: Path, output: Path, *flags: str) -> None:
    main(["--input", str(path), "--output", str(output), "--workers", "1", *flags])


GOOD = b'{"prompt": "Hi", "completion": "Hi"}'
HOSTILE = {
    b"{": "not valid JSON",
    b"[" * 100_000: "not valid JSON",
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000: "not valid JSON",
    b"1" * 1_000_000: "not valid JSON",
    b'{"prompt": "\x00", "completion": "Hi"}': "not valid JSON",
    b'{"prompt": "\xff", "completion": "Hi"}': "not UTF-8 text",
    b'{"prompt": "\xed\xa0\x80", "completion": "Hi"}': "not UTF-8 text",
    b'{"prompt": "\\ud800", "completion": "Hi"}': "not a conversation",
    b'{"prompt": {}, "completion": "Hi"}': "not a conversation",
    b'{"messages": [{"role": ["user"], "content": "Hi"}]}': "not a conversation",
    b'{"messages": [{"role": "' + b"x" * 100_000 + b'", "content": "Hi"}]}': "not a conversation",
    b"null": "not a conversation",
}


@pytest.mark.parametrize("line", HOSTILE)
def test_a_hostile_line_stops_with_one_short_line(tmp_path: Path, line):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=r"chats\.jsonl:3(, byte \d+)?: ") as caught:
        run(path, tmp_path / "data")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_hostile_lines_are_skipped_counted_and_the_first_ones_named(tmp_path: Path, capsys, monkeypatch, workers):
    monkeypatch.setattr(command, "ITEMS_PER_BLOCK", 2)
    path = tmp_path / "chats.jsonl"
    with path.open("wb") as file:
        file.writelines(GOOD + b"\n" + line + b"\n" for line in HOSTILE)
        end = file.seek(0, 2)
        file.truncate(end + MAX_BYTES + 1)  # a last line of NULs
    run(path, tmp_path / "data", "--bad_lines", "skip", "--valid_fraction", "0", "--workers", workers)
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())
    counts = ledger["splits"]["train"]
    assert counts["read"] == 2 * len(HOSTILE) + 1 and counts["tasks"]["chat"]["kept"] == len(HOSTILE)
    expected = {reason: sum(value == reason for value in HOSTILE.values()) for reason in HOSTILE.values()}
    assert counts["skipped"] == expected | {"longer than 8 MiB": 1}
    assert [line.split(": ")[0] for line in ledger["first_bad"]] == [f"{path}:{2 * i}" for i in range(1, 6)]
    printed = capsys.readouterr()
    assert "skipped 1 records: longer than 8 MiB" in printed.out
    assert [line.removeprefix("skipped ") for line in printed.err.splitlines()[:5]] == ledger["first_bad"]


# What a file holds, and what is said of it: nothing of it is learned as text.
UNUSABLE = {
    '{\n  "messages": []\n}\n': "chats.txt holds an object that spans lines; give each object a line of its own",
    '{"text": "Once"}\n': 'chats.txt:1: a line must be an object with "messages".* --format text',
    '["Once", "upon"]': "chats.txt:1, element 1: a line must be an object .* --format text",
    '[{"prompt": "a", "completion": "b"},\n{"prompt": 1}]': "chats.txt:2, element 2: a line must be an object with",
    '[{"prompt": "a", "completion": "b"}, {a: 1}]': "chats.txt:1, element 2: not valid JSON: Expecting property name",
    '[{"prompt": "a", "completion": "b"},': "chats.txt:1, element 2: not valid JSON: Expecting value",
    '[{"prompt": "a", "completion": "b"}, 2 3]': "chats.txt:1, element 2: not valid JSON: neither a comma nor",
    '[{"prompt": "a", "completion": "b"}]\n{}': "chats.txt:2: not valid JSON: something follows the array",
    '[{"prompt": "a", "completion": "b"}, ' + "[" * 100_000: "chats.txt:1, element 2: not valid JSON",
    '[{"prompt": "a", "completion": "b"}, "' + "x" * (MAX_BYTES + 2): "element 2: not valid JSON, or longer than 8 MiB",
}


@pytest.mark.parametrize("content", UNUSABLE, ids=lambda content: content[:50])
def test_json_that_can_not_be_used_is_refused(tmp_path: Path, content):
    path = tmp_path / "chats.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=UNUSABLE[content]) as caught:
        run(path, tmp_path / "data")
    assert len(str(caught.value)) < 600 and list(tmp_path.iterdir()) == [path]


def test_elements_that_can_not_be_used_are_skipped_and_counted(tmp_path: Path):
    path = tmp_path / "chats.json"
    long = b'{"prompt": "' + b"x" * MAX_BYTES + b'", "completion": "y"}'
    path.write_bytes(b"[" + b", ".join([GOOD, b"1", b'{"prompt": "caf\xe9", "completion": "y"}', long, GOOD]) + b"]")
    run(path, tmp_path / "data", "--bad_lines", "skip", "--valid_fraction", "0")
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())
    counts = ledger["splits"]["train"]
    assert counts["skipped"] == {"longer than 8 MiB": 1, "not UTF-8 text": 1, "not a conversation": 1}
    assert counts["read"] == 5 and counts["tasks"]["chat"]["kept"] == 2
    assert [line.removeprefix(f"{path}:1, ").split(":")[0] for line in ledger["first_bad"]] == [
        *("element 2", "element 3, byte 16", "element 4")
    ]


@pytest.mark.parametrize("format", ["text", "tinystories-instruct"])
def test_records_that_are_no_text_stop_or_are_skipped(tmp_path: Path, format):
    path = tmp_path / "stories.txt"
    good = b"Summary: A cat.\nStory: \n\nThere was a cat.\n"
    with path.open("wb") as file:
        file.write(b"<|endoftext|>\n".join((good, b"Story: caf\xe9", good.replace(b"a", b"the"), b"")))
        end = file.seek(0, 2)
        file.truncate(end + MAX_BYTES + 1)
    flags = ["--format", format, "--valid_fraction", "0"]
    with pytest.raises(UserError, match=r"stories\.txt:6, byte 11: not UTF-8 text"):
        run(path, tmp_path / "data", *flags)
    run(path, tmp_path / "data", *flags, "--bad_lines", "skip")
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())
    assert ledger["splits"]["train"]["read"] == 4
    assert ledger["splits"]["train"]["skipped"] == {"not UTF-8 text": 1, "longer than 8 MiB": 1}
    assert ledger["first_bad"][1] == f"{path}:11: longer than 8 MiB"


def test_a_long_run_of_white_space_is_refused_before_the_tokenizer_fails(tmp_path: Path):
    path = tmp_path / "stories.txt"
    path.write_text("a" + " " * 1_100_000 + "b<|endoftext|>c")
    with pytest.raises(UserError, match="document 1: over 500,000 white-space characters in a row"):
        run(path, tmp_path / "data")


def test_a_story_far_too_long_costs_no_time(tmp_path: Path):
    path = tmp_path / "stories.txt"
    story = "Once a cat sat. " * 300_000
    path.write_text(f"Summary: Long.\nStory: {story}<|endoftext|>\nStory: A cat sat. A cat.")
    start = time.monotonic()
    run(path, tmp_path / "data", "--valid_fraction", "0", "--format", "tinystories-instruct")
    assert time.monotonic() - start < 5
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())["splits"]["train"]
    assert ledger["skipped"] == {"a story too long for any task": 1}


def test_no_token_is_longer_than_what_is_left_out_unseen_is_judged_by():
    assert max(map(len, gpt2_tokens())) == ChatTokenizer().longest_token
