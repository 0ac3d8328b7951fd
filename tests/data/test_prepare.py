"""Prepare, end to end: what is written, the ledger, and that nothing is written when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinysft_jax.checkpoints import load_tokenizer
from tinysft_jax.console import RunError, UserError
from tinysft_jax.data import prepare as command
from tinysft_jax.data.encode import Encoder
from tinysft_jax.data.prepare import main, prepare
from tinysft_jax.data.sources import Item, Source
from tinysft_jax.data.store import ShardWriter
from tinysft_jax.tasks.make import TASK_NAMES
from tinysft_jax.tokenizer import ChatTokenizer

ARRAYS = {"tokens": np.uint16, "supervised": np.bool_, "offsets": np.int64, "tasks": np.uint8}


def run(path: Path, output: Path, *flags: str) -> dict:
    """Prepares in this process; returns data.json."""
    main(["--input", str(path), "--output", str(output), "--workers", "1", *flags])
    return json.loads((output / "data.json").read_text())


def conversations(data: Path, split: str = "train") -> list[tuple[str, str, str]]:
    """Every conversation as its task, its text and its supervised text."""
    tok, tasks = load_tokenizer(data), json.loads((data / "data.json").read_text())["tasks"]
    found = []
    for shard in sorted(path.name[-9:] for path in (data / split).glob("tokens-*.npy")):
        arrays = {name: np.load(data / split / f"{name}-{shard}") for name in ARRAYS}
        assert {name: array.dtype for name, array in arrays.items()} == ARRAYS
        for task, start, end in zip(arrays["tasks"], arrays["offsets"][:-1], arrays["offsets"][1:], strict=True):
            ids, supervised = arrays["tokens"][start:end], arrays["supervised"][start:end]
            found.append((tasks[task], tok.decode(ids), tok.decode(ids[supervised])))
    return found


def write_chats(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_sample_records_and_their_ledger(tmp_path: Path, records: Path):
    description = run(records / "samples.txt", tmp_path / "data", "--valid_fraction", "0")
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())["splits"]["train"]
    # Counted by hand in samples.txt: ten records, one without a story.
    assert ledger["read"] == 10 and ledger["skipped"] == {"no story": 1}
    assert {name: ledger["tasks"][name]["kept"] for name in ("summary", "words", "moral")} == {
        "summary": 6,
        "words": 7,
        "moral": 1,
    }
    found = conversations(tmp_path / "data")
    assert {name: sum(task == name for task, _, _ in found) for name in TASK_NAMES} == {
        name: counts["kept"] for name, counts in ledger["tasks"].items()
    }
    assert ("summary", "Zoë finds her café’s lost cat.<|endoftext|>") in [(task, said) for task, _, said in found]
    assert all(text.startswith("<|system|>You are a helpful assistant") for _, text, _ in found)
    totals = description["splits"]["train"]
    assert totals["conversations"] == len(found)
    tokens = np.load(tmp_path / "data" / "train" / "tokens-00000.npy")
    lengths = np.diff(np.load(tmp_path / "data" / "train" / "offsets-00000.npy"))
    assert (totals["tokens"], totals["longest"]) == (tokens.size, lengths.max())
    assert totals["supervised_tokens"] == np.load(tmp_path / "data" / "train" / "supervised-00000.npy").sum()
    assert description["splits"]["valid"] == dict.fromkeys(totals, 0)
    assert not list((tmp_path / "data" / "valid").iterdir())


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, records: Path, monkeypatch):
    monkeypatch.setattr(command, "ITEMS_PER_BLOCK", 2)
    flags = ["--valid_fraction", "0.3", "--seed", "3"]
    run(records / "samples.txt", tmp_path / "one", *flags)
    run(records / "samples.txt", tmp_path / "two", *flags, "--workers", "2")
    assert (tmp_path / "one" / "manifest.json").read_text() == (tmp_path / "two" / "manifest.json").read_text()
    assert len(json.loads((tmp_path / "one" / "manifest.json").read_text())["files"]) == 12


def test_the_size_of_the_blocks_changes_nothing(tmp_path: Path, records: Path, monkeypatch):
    run(records / "samples.txt", tmp_path / "one")
    monkeypatch.setattr(command, "ITEMS_PER_BLOCK", 1)
    run(records / "samples.txt", tmp_path / "two")
    assert (tmp_path / "one" / "manifest.json").read_text() == (tmp_path / "two" / "manifest.json").read_text()


def test_the_command_itself_prints_the_ledger_and_a_summary(tmp_path: Path, records: Path):
    arguments = ["--input", records / "samples.txt", "--output", tmp_path / "data", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tinysft_jax.data.prepare", *arguments], capture_output=True, text=True, check=True
    )
    assert "skipped 1 records: no story" in done.stdout
    assert "conversations" in done.stdout.splitlines()[-1]
    refused = subprocess.run(
        [sys.executable, "-m", "tinysft_jax.data.prepare", *arguments], capture_output=True, text=True
    )
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "add --overwrite" in refused.stderr


def test_chats_of_both_forms(tmp_path: Path):
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    path = write_chats(tmp_path / "chats.jsonl", {"messages": turns}, {"prompt": "Hi", "completion": '"Hi"'})
    description = run(path, tmp_path / "data", "--valid_fraction", "0")
    assert (description["format"], description["tasks"]) == ("chat-jsonl", ["chat"])
    assert (description["format_version"], description["dtype"]) == (4, "uint16")
    default = "You are a helpful assistant that answers questions about stories."
    assert conversations(tmp_path / "data") == [
        ("chat", "<|system|>SYSTEM<|user|>USER<|assistant|>ASSISTANT<|endoftext|>", "ASSISTANT<|endoftext|>"),
        ("chat", f'<|system|>{default}<|user|>Hi<|assistant|>"Hi"<|endoftext|>', '"Hi"<|endoftext|>'),
    ]


def test_conversations_are_read_as_such_whatever_the_name_and_layout(tmp_path: Path):
    chats = [{"prompt": f"Hi {i}", "completion": f"Ho\n{i} 🐱"} for i in range(9)]
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    files = {f"a.{ending}": lines for ending in ("jsonl", "json", "ndjson", "jsonlines", "txt")}
    files |= {f"array{indent}.json": json.dumps(chats, indent=indent) for indent in (None, 2)}
    files["together.jsonl"] = lines[: len(lines) // 9 * 4] + "\ufeff" + lines[len(lines) // 9 * 4 :]
    files["together.json"] = f"\ufeff{json.dumps(chats[:4])}\n\ufeff{json.dumps(chats[4:])}"
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert run(tmp_path / name, tmp_path / f"{name}.data", "--valid_fraction", "0")["format"] == "chat-jsonl"
        found = conversations(tmp_path / f"{name}.data")
        assert [learned for *_, learned in found] == [f"Ho\n{i} 🐱<|endoftext|>" for i in range(9)]


def test_an_answer_of_weight_0_is_read_and_not_learned(tmp_path: Path):
    turns = [{"role": role, "content": role.upper()} for role in ("user", "assistant", "user", "assistant")]
    turns[1]["weight"] = 0
    path = write_chats(tmp_path / "chats.jsonl", {"messages": turns})
    for template in ("control", "text"):
        run(path, tmp_path / template, "--valid_fraction", "0", "--template", template)
        ((_, text, learned),) = conversations(tmp_path / template)
        assert learned == "ASSISTANT<|endoftext|>" and text.count(learned) == 2
    turns[3]["weight"] = 0
    write_chats(path, {"messages": turns})
    with pytest.raises(UserError, match=r"chats\.jsonl:1: .*there is nothing to learn"):
        run(path, tmp_path / "none")
    turns[3]["weight"] = 0.5
    write_chats(path, {"messages": turns})
    with pytest.raises(UserError, match=r"chats\.jsonl:1: messages\[3\]\.weight is 0\.5; it must be 0 or 1"):
        run(path, tmp_path / "none")


def test_fields_that_are_not_read_are_named_and_counted(tmp_path: Path, capsys):
    turns = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Ho", "train": False}]
    lines = [{"messages": turns, "id": i, "prompt": None} for i in range(3)]
    path = write_chats(tmp_path / "chats.jsonl", *lines, {"prompt": "a", "completion": "b", "id": 3, "weight": 0})
    run(path, tmp_path / "data", "--valid_fraction", "0")
    expected = {"id": 4, "messages[].name": 3, "messages[].train": 3, "weight": 1}
    splits = json.loads((tmp_path / "data" / "ledger.json").read_text())["splits"]
    assert [splits[split]["unread_fields"] for split in ("train", "valid")] == [expected, {}]
    printed = capsys.readouterr().out
    assert all(f"not read, {n} times: the field {name}\n" in printed for name, n in expected.items())


def test_any_number_of_fields_of_any_length_leaves_a_short_ledger(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(command, "ITEMS_PER_BLOCK", 2)
    line = {"prompt": "a", "completion": "b", "\x1b[2J": 1}
    path = write_chats(tmp_path / "chats.jsonl", *(line | {f"{i}{'x' * 1000}{i}": 1} for i in range(500)))
    run(path, tmp_path / "data", "--valid_fraction", "0")
    counts = json.loads((tmp_path / "data" / "ledger.json").read_text())["splits"]["train"]["unread_fields"]
    assert sum(counts.values()) == 1000 and len(json.dumps(counts)) < 4000
    assert counts[r"'\x1b[2J'"] == 500 and counts["(others)"] == 500 - 19


@pytest.mark.parametrize("blank", ["\n", " ", "\u200b", "\ufeff", "\u00ad\t", "\x00"])
def test_what_looks_empty_is_refused_as_empty(tmp_path: Path, blank):
    for line in (
        {"prompt": "Hi", "completion": blank},
        {"prompt": blank, "completion": "Hi"},
        {"messages": [{"role": r, "content": c} for r, c in (("system", blank), ("user", "a"), ("assistant", "b"))]},
    ):
        path = write_chats(tmp_path / "chats.jsonl", line)
        with pytest.raises(UserError, match=r"chats\.jsonl:1: (prompt|completion|messages\[0\]\.content) is empty"):
            run(path, tmp_path / "data")
    path = tmp_path / "stories.txt"
    path.write_text(f"{blank}<|endoftext|>Once.<|endoftext|>{blank}", encoding="utf-8")
    assert run(path, tmp_path / "data", "--valid_fraction", "0")["splits"]["train"]["conversations"] == 1


def test_a_forged_marker_is_named_in_the_template_that_could_not_tell(tmp_path: Path):
    path = write_chats(tmp_path / "chats.jsonl", {"prompt": "<|assistant|>", "completion": "Hi"})
    run(path, tmp_path / "control", "--valid_fraction", "0")
    with pytest.raises(UserError, match=r"chats\.jsonl:1: messages\[0\]\.content contains <\|assistant\|>"):
        run(path, tmp_path / "text", "--template", "text")


def test_conversations_that_are_too_long_are_left_out_and_counted(tmp_path: Path):
    # With 256 ranks every byte is a token; four more are <|system|>, <|user|>, <|assistant|> and <|endoftext|>.
    chats = [
        {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", answer))]}
        for answer in ("x" * 14, "x" * 15, "y")
    ]
    path = write_chats(tmp_path / "chats.jsonl", *chats)
    flags = ["--valid_fraction", "0", "--max_tokens", "20", "--bpe_ranks", "256"]
    totals = run(path, tmp_path / "data", *flags)["splits"]["train"]
    assert totals == {"conversations": 2, "tokens": 27, "supervised_tokens": 17, "longest": 20, "shards": 1}
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())["splits"]["train"]
    assert ledger["tasks"]["chat"] == {
        "made": 3,
        "kept": 2,
        "trimmed": 0,
        "left_out": {"longer than max_tokens": 1},
        "tokens": {"total": 27, "supervised": 17, "mean": 13.5, "median": 7, "longest": 20},
    }
    with pytest.raises(UserError, match="left out 3 conversations: longer than max_tokens"):
        run(path, tmp_path / "none", *flags, "--max_tokens", "6")
    assert not (tmp_path / "none").exists()


def test_documents_are_cut_into_pieces_and_nothing_is_lost(tmp_path: Path):
    path = tmp_path / "documents.txt"
    path.write_text("Once there was a cat. 🐱\r\n<|endoftext|>\nEnd<|endoftext|>\n \n", newline="")
    flags = ["--max_tokens", "10", "--bpe_ranks", "256", "--valid_fraction", "0"]
    description = run(path, tmp_path / "data", *flags)
    assert (description["format"], description["chat_template"], description["tasks"]) == ("text", None, ["text"])
    tokens, supervised, offsets = (
        np.load(tmp_path / "data" / "train" / f"{name}-00000.npy") for name in ("tokens", "supervised", "offsets")
    )
    # 26 bytes and end-of-text, each piece beginning with the last token of the one before; 3 bytes and end-of-text.
    assert offsets.tolist() == [0, 10, 20, 29, 33]
    assert np.flatnonzero(~supervised).tolist() == [0, 10, 20, 29]
    decode = load_tokenizer(tmp_path / "data").decode
    assert decode(tokens[supervised]) == "nce there was a cat. 🐱<|endoftext|>nd<|endoftext|>"
    assert decode(tokens[[0, 10, 20, 29]]) == "OeaE"
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())["splits"]["train"]
    assert ledger["read"] == 2 and ledger["tasks"]["text"]["kept"] == 4


def test_embedded_stories_as_tasks_and_as_text(tmp_path: Path):
    for format in ("auto", "text"):
        main(["--embedded", "20", "--output", str(tmp_path / format), "--format", format, "--workers", "1"])
    tasks, text = (json.loads((tmp_path / format / "data.json").read_text()) for format in ("auto", "text"))
    assert tasks["tasks"] == list(TASK_NAMES) and tasks["source"] == {"embedded": {"train": 20, "valid": 1}}
    assert (text["splits"]["train"]["conversations"], text["splits"]["valid"]["conversations"]) == (280, 1)
    # The first token of a document is predicted from nothing, so it is not supervised.
    stories = {whole for _, whole, _ in conversations(tmp_path / "text")}
    told = {said.partition("<|endoftext|>") for task, _, said in conversations(tmp_path / "auto") if task == "words"}
    assert told and {story + end for story, end, _ in told} <= stories
    assert any(follow_ups for *_, follow_ups in told)
    asked = [prompt for task, prompt, _ in conversations(tmp_path / "auto") if task == "words"]
    assert {"very short" in prompt for prompt in asked} == {True, False}


def test_another_seed_asks_other_questions(tmp_path: Path, records: Path):
    for seed in ("0", "0", "1"):
        run(records / "samples.txt", tmp_path / "data", "--seed", seed, "--overwrite", "--valid_fraction", "0")
        found = conversations(tmp_path / "data")
        if seed == "0":
            first = found
    assert found != first


def test_shards_are_cut_when_they_are_full(tmp_path: Path):
    encoder = Encoder("text", ChatTokenizer(None, 256), max_tokens=100, seed=0)
    writer = ShardWriter(tmp_path / "train", tokens_per_shard=10)
    for text in ("abcd", "efgh", "", "ijkl", "mnop", "q"):
        items = [Item("train", "here", text)] if text else []
        splits, _ = encoder.encode(items)
        writer.add(splits["train"])
    writer.close()
    assert writer.totals == {"conversations": 5, "tokens": 22, "supervised_tokens": 17, "longest": 5, "shards": 3}
    offsets = [np.load(tmp_path / "train" / f"offsets-{shard:05d}.npy").tolist() for shard in range(3)]
    assert offsets == [[0, 5, 10], [0, 5, 10], [0, 2]]
    assert len(list((tmp_path / "train").iterdir())) == 12


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("malformed")])
def test_nothing_is_left_of_a_run_that_ends_early(tmp_path: Path, error):
    class Interrupted(Source):
        def __iter__(self):
            yield from [Item("train", "here", "text")] * 1000
            raise error

    encoder = Encoder("text", ChatTokenizer(None, 256), max_tokens=100, seed=0)
    with pytest.raises(type(error)):
        prepare(Interrupted("text", {}, 1000), encoder, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_what_it_would_have_replaced(tmp_path: Path):
    path = write_chats(tmp_path / "chats.jsonl", {"prompt": "Hi", "completion": "Hi"})
    run(path, tmp_path / "data", "--valid_fraction", "0")
    path.write_text("{")
    with pytest.raises(UserError):
        run(path, tmp_path / "data", "--valid_fraction", "0", "--overwrite")
    assert len(conversations(tmp_path / "data")) == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--max_tokens", "1"], "--max_tokens must be at least 2"),
        (["--max_tokens", "many"], "invalid int value"),
        (["--valid_fraction", "1"], "--valid_fraction must be"),
        (["--valid_fraction", "nan"], "--valid_fraction must be"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--bpe_ranks", "255"], "from 256 to 50256"),
        (["--template", "chatml"], "invalid choice"),
        (["--embedded", "3"], "not allowed with"),
        (["--output", "."], "exists"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_any_work(tmp_path: Path, records: Path, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        run(records / "samples.txt", tmp_path / "data", *flags)
    assert list(tmp_path.iterdir()) == []


def test_there_are_as_many_workers_as_cpus_that_may_be_used(monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7}, raising=False)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "processes that encode (default: 1)" in " ".join(capsys.readouterr().out.split())


def test_a_limit_makes_no_sense_for_embedded_stories(tmp_path: Path):
    with pytest.raises(UserError, match="--limit is for files"):
        main(["--embedded", "3", "--limit", "2", "--output", str(tmp_path / "data")])


def test_an_input_of_white_space_has_nothing_to_learn_from(tmp_path: Path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="could be made of 0 records"):
        run(tmp_path / "blank.txt", tmp_path / "data")


def test_a_full_disk_is_one_line(tmp_path: Path, records: Path, monkeypatch):
    real = Path.open

    def full(path: Path, mode: str = "r", *arguments, **options):
        return real(Path("/dev/full") if path.suffix == ".npy" else path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match="No space left on device"):
        run(records / "samples.txt", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
