"""A row in the terminal: that it is the one that training reads, and that it shows what is supervised."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tinysft_jax.console import UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import batches
from tinysft_jax.data.inspect import MARKER, PROMPT, SUPERVISED, Segment, main, read_row, render
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Conversations of a few embedded stories."""
    path = tmp_path_factory.mktemp("inspect") / "data"
    prepare.main(["--embedded=20", f"--output={path}", "--bpe_ranks=1024", "--max_tokens=700", "--workers=1"])
    return path


def shown(capsys, *flags: str) -> str:
    """What the command prints."""
    capsys.readouterr()
    main(list(flags))
    return capsys.readouterr().out


@pytest.mark.parametrize(("split", "seed", "epoch"), [("train", 0, 0), ("train", 3, 2), ("valid", 0, 1)])
def test_row_i_is_the_row_that_training_reads(data, split, seed, epoch):
    conversations = PreparedData(data).split(split)
    packing = Packing(conversations.lengths, 1024)
    rows = [
        {key: array[place] for key, array in batch.items()}
        for batch in batches(data, split, batch_size=4, seq_len=1024, seed=seed, epoch=epoch)
        for place in range(4)
    ]
    for index in range(packing.n_rows):
        segments, row = read_row(conversations, packing, index, seed, epoch), rows[index]
        for number, segment in enumerate(segments, 1):
            here = row["segment_ids"] == number
            np.testing.assert_array_equal(segment.tokens, row["tokens"][here])
            # A token is supervised if the position before it predicts it.
            np.testing.assert_array_equal(segment.supervised[1:], row["weights"][here][:-1] > 0)
            ids, supervised = conversations.conversation(segment.conversation)
            np.testing.assert_array_equal(segment.tokens, ids)
            np.testing.assert_array_equal(segment.supervised, supervised)
        assert len(segments) == row["segment_ids"].max()
        assert sum(segment.supervised.sum() for segment in segments) == row["weights"].sum()


def test_a_row_without_colour(data, capsys):
    out = shown(capsys, f"--data={data}", "--row=2", "--seed=1")
    prepared = PreparedData(data)
    split, tokenizer = prepared.split("train"), ChatTokenizer.from_description(prepared.description)
    packing = Packing(split.lengths, 1024)
    segments = read_row(split, packing, 2, 1, 0)
    assert "\x1b" not in out
    # What stands between the marks is what is supervised, and nothing else does.
    answers = [tokenizer.decode(run) for part in segments for run in supervised_runs(part)]
    assert re.findall("«([^»]*)»", out) == answers and len(answers) > len(segments)
    titles = [line for line in out.splitlines() if line.startswith("── ")]
    start = 0
    for number, (title, part) in enumerate(zip(titles, segments, strict=False), 1):
        task = prepared.tasks[split.tasks[part.conversation]]
        end = start + len(part.tokens) - 1
        n = int(part.supervised.sum())
        assert title == (
            f"── {number} · conversation {part.conversation:,} · {task} · tokens {start:,} to {end:,} · "
            f"{n:,} ({n / len(part.tokens):.1%}) supervised"
        )
        start = end + 1
    assert titles[-1] == "── end" and len(titles) == len(segments) + 1
    supervised = sum(int(part.supervised.sum()) for part in segments)
    assert out.splitlines()[-1] == (
        f"train row 2 of {packing.n_rows}, seed 1, epoch 0: {len(segments)} conversations, {start:,} tokens, "
        f"{supervised:,} ({supervised / start:.1%}) supervised, {1024 - start:,} ({1 - start / 1024:.1%}) padding"
    )


def supervised_runs(part: Segment) -> list[np.ndarray]:
    cuts = np.flatnonzero(np.diff(part.supervised)) + 1
    runs = zip(np.split(part.tokens, cuts), np.split(part.supervised, cuts), strict=True)
    return [tokens for tokens, supervised in runs if supervised[0]]


def test_all_of_the_text_is_there(data, capsys):
    """Without the marks, each segment reads as its conversation, a role a line."""
    prepared = PreparedData(data)
    split, tokenizer = prepared.split("train"), ChatTokenizer.from_description(prepared.description)
    packing = Packing(split.lengths, 1024)
    for row in range(0, packing.n_rows, 3):
        out = shown(capsys, f"--data={data}", f"--row={row}").replace("«", "").replace("»", "")
        _, *parts = re.split(r"^── .*\n", out, flags=re.MULTILINE)
        for part, segment in zip(parts[:-1], read_row(split, packing, row), strict=True):
            text = tokenizer.decode(split.conversation(segment.conversation)[0])
            assert part == re.sub(r"(?=<\|(user|assistant)\|>)", "\n", text) + "\n"


def test_in_colour_styles_tell_it_all():
    tokenizer = ChatTokenizer("control", 256)
    ids, supervised = tokenizer.encode_chat(
        [{"role": "user", "content": "Hi [b]é"}, {"role": "assistant", "content": "Yes «ö»"}]
    )
    text = render(Segment(0, ids, supervised), tokenizer, marks=False)
    styles = {text.plain[span.start : span.end].strip(): span.style for span in text.spans}
    assert styles["Hi [b]é"] == PROMPT and styles["Yes «ö»<|endoftext|>"] == SUPERVISED
    assert styles["<|user|>"] == styles["<|system|>"] == styles["<|assistant|>"] == MARKER
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="truecolor", width=200).print(text, soft_wrap=True)
    assert "\x1b[1;32mYes «ö»<|endoftext|>" in screen.getvalue()


def test_several_answers_are_marked_one_by_one():
    tokenizer = ChatTokenizer("control", 256)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ids, supervised = tokenizer.encode_chat([{"role": role, "content": content} for role, content in turns])
    text = render(Segment(0, ids, supervised), tokenizer, marks=True).plain
    assert text.split("\n")[1:] == [
        "<|user|>a",
        "<|assistant|>«b<|endoftext|>»",
        "<|user|>c",
        "<|assistant|>«d<|endoftext|>»",
    ]


def test_a_terminal_does_not_obey_the_data():
    tokenizer = ChatTokenizer(None, 256)
    ids = np.array(tokenizer.encode_text("\x1b[2J\x07a\r\x7f\x9b\tb\nc"), np.int32)
    text = render(Segment(0, ids, np.zeros(ids.size, bool)), tokenizer, marks=True).plain
    assert text == "␛[2J␇a␍␡\ufffd\tb\nc"


def test_plain_text_is_shown_too(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A cat.<|endoftext|>\nA dog.", encoding="utf-8")
    flags = ["--format=text", "--bpe_ranks=256", "--workers=1", "--valid_fraction=0"]
    prepare.main([f"--input={tmp_path / 'text.txt'}", f"--output={tmp_path / 'data'}", *flags])
    out = shown(capsys, f"--data={tmp_path / 'data'}", "--seq_len=64")
    assert "A« dog.<|endoftext|>»\n" in out and "text" in out.splitlines()[0]
    with pytest.raises(UserError, match=r"the valid split of .* is empty"):
        main([f"--data={tmp_path / 'data'}", "--split=valid"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--row=9999"], r"there is no row 9,999: the rows are from 0 to \d+$"),
        (["--row=-1"], "there is no row -1"),
        (["--seq_len=50"], r"seq_len is 50, but the longest conversation has \d+ tokens"),
        (["--seed=-1"], "--seed must be 0 or more, not -1"),
        (["--epoch=-2"], "--epoch must be 0 or more, not -2"),
        (["--split=test"], "invalid choice"),
        (["--data=."], "not a prepared data set"),
    ],
)
def test_what_is_not_there_is_refused(data, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        main([f"--data={data}", *flags])


def test_the_last_row_is_there(data, capsys):
    split = PreparedData(data).split("train")
    n_rows = Packing(split.lengths, 1024).n_rows
    assert f"row {n_rows - 1:,} of {n_rows:,}" in shown(capsys, f"--data={data}", f"--row={n_rows - 1}")
    with pytest.raises(UserError, match=f"from 0 to {n_rows - 1}$"):
        main([f"--data={data}", f"--row={n_rows}"])


@pytest.mark.slow
def test_the_command_in_a_pipe_that_knows_only_ascii(data):
    command = [sys.executable, "-m", "tinysft_jax.data.inspect", f"--data={data}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert r"<|assistant|>\xab" in done.stdout and done.stderr == ""
    refused = subprocess.run([*command, "--row=9999"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1


def test_hashes_are_compared_when_asked(chat_data, tmp_path):
    shutil.copytree(chat_data, tmp_path / "data")
    path = tmp_path / "data" / "valid" / "tokens-00000.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    main([f"--data={tmp_path / 'data'}", "--seq_len=64"])
    with pytest.raises(UserError, match=r"valid/tokens-00000.npy has other content"):
        main([f"--data={tmp_path / 'data'}", "--seq_len=64", "--verify"])
