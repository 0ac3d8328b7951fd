"""A data set that was not written by `prepare`, or was changed since: refused in one line."""

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinysft_jax import files
from tinysft_jax.checkpoints import load_tokenizer
from tinysft_jax.console import UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.batches import BatchSource, batches, epoch_batches
from tinysft_jax.data.encode import Encoder
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.sources import Item
from tinysft_jax.data.store import ARRAYS, SPLITS, PreparedData, ShardWriter, Split, dtypes
from tinysft_jax.tasks.make import STORIES
from tinysft_jax.tokenizer import ChatTokenizer


@pytest.fixture
def data(chat_data, tmp_path) -> Path:
    return Path(shutil.copytree(chat_data, tmp_path / "data"))


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert message.endswith(("prepare the data again", "nested more than 200 levels deep", "upgrade tinysft-jax"))
    return message


def change_description(data: Path, path: str, value: Any) -> None:
    """Puts a value at a dotted path of `data.json`; Ellipsis: removes what is there."""
    content = inner = json.loads((data / "data.json").read_text())
    *parents, key = path.split(".")
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    if value is ...:
        del inner[key]
    (data / "data.json").write_text(json.dumps(content))
    files.write_manifest(data)  # whoever changes the one can change the other


def change_array(data: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Changes an array of the training split's shard, in place or by returning another."""
    path = data / "train" / f"{name}-00000.npy"
    array = np.load(path)
    changed = change(array)
    np.save(path, array if changed is None else changed)
    files.write_manifest(data)


# data.json

VALUES = (None, True, False, -1, 2.5, float("nan"), 2**63, -(10**4000), "", "7", [], [7], {}, {"a": 7})
# What each key may be, of these values; a description that differs only in that is understood.
SOUND = {
    "format": ("", "7"),
    "chat_template": (),
    "tokenizer": (),
    "tokenizer.kind": (),
    "tokenizer.bpe_ranks": (),
    "max_tokens": (),
    "tasks": (),
    "seed": (-1, 2**63, -(10**4000)),
    "dtype": (),
    "tokenizer_hash": (),
    "source": ({}, {"a": 7}),
    "splits": (),
    "splits.train": (),
    "splits.valid": (),
    **{f"splits.valid.{total}": () for total in ("conversations", "tokens", "supervised_tokens", "longest", "shards")},
}


@pytest.mark.parametrize("path", SOUND)
def test_each_key_must_be_there_and_of_its_type(data, path):
    change_description(data, path, ...)
    assert f"data.json: it lacks {path!r}" in refusal(lambda: PreparedData(data))
    for value in VALUES:
        change_description(data, path, value)
        if any(value is sound or value == sound for sound in SOUND[path] if type(value) is type(sound)):
            PreparedData(data)
        else:
            message = refusal(lambda: PreparedData(data))
            assert "data.json: " in message and any(word in message for word in ("must be", "there is no", "lacks"))


@pytest.mark.parametrize(
    "tasks", [["a", "a"], ["a", 1], ["a\x1b[2J"], ["a\nb"], [""], [["a"]], [f"task {i}" for i in range(257)]]
)
def test_tasks_are_different_names_that_print(data, tasks):
    change_description(data, "tasks", tasks)
    assert "tasks is" in refusal(lambda: PreparedData(data))


@pytest.mark.parametrize(
    "description", [{"bpe_ranks": 255}, {"bpe_ranks": 50257}, {"kind": "gpt3"}], ids=lambda value: str(value)
)
def test_the_tokenizer_is_one_that_there_is(data, description):
    change_description(data, "tokenizer", {"kind": "gpt2", "bpe_ranks": 256} | description)
    assert "data.json: " in refusal(lambda: PreparedData(data))


def test_other_keys_are_passed_over(data):
    change_description(data, "splits.test", 7)
    PreparedData(data).verify()


def test_a_source_nested_deeply_is_refused(data):
    change_description(data, "source", json.loads('{"a":' * 300 + "1" + "}" * 300))
    refusal(lambda: PreparedData(data))


@pytest.mark.parametrize("total", ["conversations", "tokens"])
def test_totals_are_compared_with_the_arrays(data, total):
    PreparedData(data).split("train")
    change_description(data, f"splits.train.{total}", 271)
    assert f"{total.replace('_', ' ')}, data.json says 271" in refusal(lambda: PreparedData(data).split("train"))


@pytest.mark.parametrize("shards", [2, 10**6, 2**31 - 1])
def test_more_shards_than_there_are(data, shards):
    change_description(data, "splits.train.shards", shards)
    assert "does not list train/tokens-00001.npy" in refusal(lambda: PreparedData(data))


# Shards


def test_what_is_not_in_the_manifest_is_not_read(data):
    """A pipe, say, that nobody writes to, or a link to somewhere."""
    for name in ("data.json", "train/tokens-00000.npy"):
        content = json.loads((data / "manifest.json").read_text())
        del content["files"][name]
        files.write_json(data / "manifest.json", content)
        assert f"does not list {name}" in refusal(lambda: PreparedData(data))
        files.write_manifest(data)


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_must_be_a_row_of_its_dtype(data, name):
    own = dtypes({})[name]
    kinds = [np.uint32, np.int8, np.float32, np.complex64, "U2", ">u2", ">i8", "V0", [("a", own)], "M8[s]"]
    original = (data / "train" / f"{name}-00000.npy").read_bytes()
    others = [lambda array, kind=kind: np.zeros(len(array), kind) for kind in kinds]
    for change in (*others, lambda array: array[None], lambda array: array[0]):
        change_array(data, name, change)
        assert f"{name}-00000.npy holds " in refusal(lambda: PreparedData(data).split("train"))
        (data / "train" / f"{name}-00000.npy").write_bytes(original)


def as_npy(header: bytes, version: bytes) -> bytes:
    length = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + length + header + bytes(8)


HEADERS = [
    b"[" * 9000,
    b"-" * 9000 + b"1",
    b"'''",
    b"  x\n y",
    b"{[]: 3}",
    b"\xff",
    b"{'descr': [(3,)], 'fortran_order': False, 'shape': (3,), }",
    *(
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (%s,), }" % shape
        for shape in (b"-1", b"True", b"1000", b"9" * 40, b"%d" % 2**62, b"%d" % (2**63 - 1))
    ),
]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("header", HEADERS, ids=lambda header: repr(header[-40:]))
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x03\x00"])
def test_a_header_that_is_none(data, header, version):
    (data / "train" / "tasks-00000.npy").write_bytes(as_npy(header, version))
    files.write_manifest(data)
    assert "tasks-00000.npy" in refusal(lambda: PreparedData(data).split("train"))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04" + bytes(40), b"\x80\x04K\x01.", b"1 2 3\n"])
def test_a_file_that_is_no_array(data, content):
    (data / "train" / "tokens-00000.npy").write_bytes(content)
    files.write_manifest(data)
    assert "tokens-00000.npy" in refusal(lambda: PreparedData(data).split("train"))


def test_a_shard_that_went_after_the_data_was_opened(data):
    opened = PreparedData(data)
    (data / "train" / "tasks-00000.npy").unlink()
    assert "can't read " in (said := refusal(lambda: opened.split("train"))) and "No such file" in said


CONTRADICTIONS = {
    "a task too many": ("tasks", lambda array: np.append(array, array[:1])),
    "no task": ("tasks", lambda array: array[:0]),
    "a mark too few": ("supervised", lambda array: array[1:]),
    "no offset": ("offsets", lambda array: array[:0]),
    "offsets from 1": ("offsets", lambda array: array.__setitem__(0, 1)),
    "offsets that end early": ("offsets", lambda array: array.__setitem__(-1, array[-1] - 1)),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_arrays_that_contradict_each_other(data, kind):
    """Seen when a shard is opened, in a worker process as well."""
    description = PreparedData(data).description
    change_array(data, *CONTRADICTIONS[kind])
    assert "shard 0 contradict each other" in refusal(lambda: Split(data / "train", description, 50260))


TOO_SHORT = {
    "an empty conversation": lambda array: array.__setitem__(5, array[4]),
    "a negative length": lambda array: array.__setitem__(5, array[6] + 1),
    "a negative place": lambda array: array.__setitem__(5, -1),
}
TOO_LONG = {
    "a place far out": lambda array: array.__setitem__(5, 2**63 - 1),
    "a length over the longest": lambda array: array.__setitem__(slice(5, 9), array[9] - [4, 3, 2, 1]),
    "a length that is short as an int32": lambda array: array.__setitem__(5, array[5] + 2**32),
}


@pytest.mark.parametrize("kind", TOO_SHORT)
def test_lengths_below_one(data, kind):
    change_array(data, "offsets", TOO_SHORT[kind])
    change_description(data, "splits.train.longest", 2**31 - 1)  # which leaves the next conversation its new length
    assert "offsets give a conversation" in refusal(lambda: PreparedData(data).split("train"))


@pytest.mark.parametrize("kind", TOO_LONG)
def test_lengths_over_the_longest(data, kind):
    change_array(data, "offsets", TOO_LONG[kind])
    assert "offsets give a conversation" in refusal(lambda: PreparedData(data).split("train"))


def test_a_task_that_has_no_name(data):
    change_array(data, "tasks", lambda array: array.__setitem__(-1, 1))
    assert "the task id 1, data.json names 1 tasks" in refusal(lambda: PreparedData(data).split("train"))


def test_tokens_outside_the_vocabulary(data):
    """Named by `--verify`, and otherwise by the batch that has one; ids are those of the data's tokenizer."""
    change_array(data, "tokens", lambda array: array.__setitem__(-1, 259))
    PreparedData(data).verify()
    change_array(data, "tokens", lambda array: array.__setitem__(-1, 260))
    assert "the token id 260, its vocabulary has 260" in refusal(lambda: PreparedData(data).verify())
    split = PreparedData(data).split("train")
    source = BatchSource(split, Packing(split.lengths, 128).epoch(), 4, 128)
    assert "the token id 260" in refusal(lambda: list(epoch_batches(source)))


@pytest.mark.parametrize("change", [lambda array: array ^ (array.cumsum() == 1), lambda array: array.view("u1") * 2])
def test_marks_that_are_others(data, change):
    """One that was lost, and bytes that are neither 0 nor 1, which would weigh more."""
    path = data / "train" / "supervised-00000.npy"
    np.save(path, change(np.load(path)).astype("u1").view(bool))
    files.write_manifest(data)
    PreparedData(data).split("train")
    assert "supervised tokens, data.json says" in refusal(lambda: PreparedData(data).verify())


def test_verify_reads_both_splits(data):
    path = data / "valid" / "tokens-00000.npy"
    tokens = np.load(path)
    tokens[0] = 60000
    np.save(path, tokens)
    files.write_manifest(data)
    assert "valid holds the token id 60000" in refusal(lambda: PreparedData(data).verify())


def test_a_shard_that_is_a_pipe_is_not_waited_for(data):
    path = data / "train" / "tasks-00000.npy"
    path.unlink()
    os.mkfifo(path)
    for size in (0, 7):
        content = json.loads((data / "manifest.json").read_text())
        content["files"]["train/tasks-00000.npy"]["bytes"] = size
        files.write_json(data / "manifest.json", content)
        assert "is not a regular file" in refusal(lambda: PreparedData(data))


# Requests


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("stories") / "data"
    prepare.main(["--embedded=8", f"--output={output}", "--bpe_ranks=2048", "--workers=1"])
    return output


def test_requests_are_those_of_the_conversations(stories):
    """In the order of the shard. A story that is the answer is not written down a second time."""
    data, tokenizer = PreparedData(stories), load_tokenizer(stories)
    data.verify()
    for split in map(data.split, SPLITS):
        for index in range(len(split)):
            ids, supervised = split.conversation(index)
            prompt = tokenizer.decode(ids[: supervised.argmax()])
            answer = tokenizer.decode(ids[supervised]).partition("<|endoftext|>")[0]
            request = split.request(index)
            assert request.keys() == {"task", "conditions", "answer"}
            assert request["task"] == data.tasks[split.tasks[index]]
            assert request["answer"] == (None if request["task"] in STORIES else answer)
            assert bool(request["conditions"]) == (request["task"] in STORIES)
            assert all(word in prompt for word in request["conditions"].get("words", ()))


def test_the_code_in_the_docs_reads_the_arrays(stories, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").symlink_to(stories)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    ids, supervised = PreparedData(stories).split("train").conversation(0)
    assert capsys.readouterr().out == f"{np.array(ids)} {np.array(supervised)}\n"


def test_requests_of_several_shards_travel_to_other_processes(tmp_path):
    writer, encoder = ShardWriter(tmp_path / "train", 1), Encoder("text", ChatTokenizer(None, 256), 100, 0)
    requests = [{"task": "words", "conditions": {"words": [f"é{i}\n"]}, "answer": None} for i in range(6)]
    for i in range(0, 6, 2):
        splits, _ = encoder.encode([Item("train", "here", "ab")] * 2)
        writer.add(dataclasses.replace(splits["train"], requests=requests[i : i + 2]))
    writer.close()
    assert writer.totals["shards"] == 3
    description = {"format": "tinystories-instruct", "format_version": 2, "splits": {"train": writer.totals}}
    description |= encoder.tokenizer.description()
    split = pickle.loads(pickle.dumps(Split(tmp_path / "train", description, 50260)))
    assert [split.request(index) for index in (5, *range(6))] == [requests[5], *requests]


def test_chats_plain_text_and_data_of_version_1_have_no_requests(chat_data, fixtures, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time.")
    text = tmp_path / "text"
    prepare.main([f"--input={tmp_path / 'a.txt'}", f"--output={text}", "--valid_fraction=0", "--workers=1"])
    for directory in (chat_data, text, fixtures / "data_version_1"):
        assert PreparedData(directory).split("train").request(0) is None
        assert not list(directory.rglob("requests*"))


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"\xff", b'{"task": "words"}', b"[" * 100_000, b'{"task": 1}'])
def test_a_request_that_is_none(stories, tmp_path, line):
    data = Path(shutil.copytree(stories, tmp_path / "data"))
    path = data / "train" / "requests-00000.jsonl"
    _, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([line, b"\n", *lines]))
    files.write_manifest(data)
    split = PreparedData(data).split("train")
    assert "requests-00000.jsonl, line 1: " in refusal(lambda: split.request(0))
    assert split.request(1) == json.loads(lines[0])


def test_requests_are_as_many_as_conversations(stories, tmp_path):
    data = Path(shutil.copytree(stories, tmp_path / "data"))
    path = data / "train" / "requests-00000.jsonl"
    path.write_bytes(path.read_bytes() + b"{}\n")
    assert "requests-00000.jsonl has" in refusal(lambda: PreparedData(data))
    files.write_manifest(data)
    split = PreparedData(data).split("train")
    assert f"has {len(split) + 1} requests and {len(split)} conversations" in refusal(lambda: split.request(0))
    path.unlink()
    assert "requests-00000.jsonl is missing" in refusal(lambda: PreparedData(data))
    files.write_manifest(data)
    assert "does not list train/requests-00000.jsonl" in refusal(lambda: PreparedData(data))


# Versions


def test_version_1_is_read(fixtures):
    """It had no requests, no dtype and no hash of its tokenizer."""
    data = PreparedData(fixtures / "data_version_1")
    data.verify()
    assert data.description["format_version"] == 1
    batch = next(iter(batches(data.directory, split="train", batch_size=2, seq_len=1024)))
    ids = batch["tokens"][0][batch["segment_ids"][0] == 1]
    assert load_tokenizer(data.directory).decode(ids).startswith("<|system|>You are a helpful assistant")


def test_ids_of_another_tokenizer_are_refused(data):
    change_description(data, "tokenizer_hash", "0" * 16)
    said = refusal(lambda: PreparedData(data))
    assert f"'{'0' * 16}'" in said and ChatTokenizer("control", 256).fingerprint() in said
