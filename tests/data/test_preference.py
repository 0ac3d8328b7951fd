"""Pairs of a chosen and a rejected answer: every form gives the same ids, and a pair is never parted."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import own_tokenizers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer

from tinysft_jax import files
from tinysft_jax.console import UserError
from tinysft_jax.data import inspect, prepare
from tinysft_jax.data.batches import BatchSource, batches
from tinysft_jax.data.encode import Encoder
from tinysft_jax.data.forms import PREFERENCE, parse, prompt_of
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.sources import open_embedded, open_input
from tinysft_jax.data.store import Encoded, PreparedData, ShardWriter, Split


def turns(*texts: str, first: str = "user") -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def parts(messages: list[dict]) -> list[dict]:
    return [
        message | {"content": [{"type": "text", "text": letter} for letter in message["content"]]}
        for message in messages
    ]


def answer(*texts: str) -> list[dict]:
    return turns(*texts, first="assistant")


# One pair, as each form has it.
SAME = {
    "texts": {"prompt": "Who?", "chosen": "Ann", "rejected": "Bob"},
    "lists": {"prompt": turns("Who?"), "chosen": answer("Ann"), "rejected": answer("Bob")},
    "a list of a prompt": {"prompt": turns("Who?"), "chosen": "Ann", "rejected": answer("Bob")},
    "a list of an answer": {"prompt": "Who?", "chosen": answer("Ann"), "rejected": "Bob"},
    "no prompt": {"chosen": turns("Who?", "Ann"), "rejected": turns("Who?", "Bob")},
    "a null prompt": {"prompt": None, "chosen": turns("Who?", "Ann"), "rejected": turns("Who?", "Bob")},
    "the prompt again": {"prompt": "Who?", "chosen": turns("Who?", "Ann"), "rejected": turns("Who?", "Bob")},
    "the prompt once more": {"prompt": turns("Who?"), "chosen": "Ann", "rejected": turns("Who?", "Bob")},
    "parts": {"prompt": parts(turns("Who?")), "chosen": parts(turns("Who?", "Ann")), "rejected": parts(answer("Bob"))},
}
PAIR = SAME["texts"]
CHAT = {"messages": turns("Hi", "Ho")}
BEGIN = "<|system|>You are a helpful assistant that answers questions about stories.<|user|>"


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(path: Path, *flags: str) -> tuple[PreparedData, dict]:
    """The data set, and the ledger of its training split."""
    output = path.with_name(f"{path.name}.data")
    arguments = [f"--input={path}", f"--output={output}", "--overwrite", "--workers=1", "--bpe_ranks=256"]
    prepare.main([*arguments, "--valid_fraction=0", *flags])
    data = PreparedData(output)
    data.verify()
    return data, json.loads((output / "ledger.json").read_text())["splits"]["train"]


def texts(data: PreparedData, split: str = "train") -> Iterator[tuple[str, str]]:
    """Each conversation's text, and its supervised text."""
    for ids, supervised in map(data.split(split).conversation, range(len(data.split(split)))):
        yield data.tokenizer.decode(ids), data.tokenizer.decode(ids[supervised])


# Forms


@pytest.mark.parametrize("template", ["control", "text"])
def test_one_pair_gives_the_same_ids_in_every_form(tmp_path: Path, template):
    data, ledger = run(write(tmp_path / "pairs.txt", *SAME.values()), f"--template={template}")
    assert [*texts(data)] == [
        (f"{BEGIN}Who?<|assistant|>Ann<|endoftext|>", "Ann<|endoftext|>"),
        (f"{BEGIN}Who?<|assistant|>Bob<|endoftext|>", "Bob<|endoftext|>"),
    ] * len(SAME)
    assert (data.description["format"], data.tasks, data.per_item) == (PREFERENCE, ["preference"], 2)
    assert ledger["forms"] == {PREFERENCE: len(SAME)} and not ledger["unread_fields"]


LONGER = [{"role": "system", "content": "S"}, *turns("a", "b", "c")]


@pytest.mark.parametrize(
    ("line", "chosen", "rejected"),
    [
        ({"prompt": LONGER, "chosen": "d", "rejected": "e"}, "d.", "e."),
        ({"chosen": [*LONGER, *answer("d")], "rejected": [*LONGER, *answer("e", "f", "g")]}, "d.", "e.g."),
        ({"prompt": LONGER, "chosen": answer("d", "e", "f"), "rejected": answer("d", "e", "g")}, "d.f.", "d.g."),
        # Without a prompt, it is the longest that there can be.
        ({"chosen": turns(*"abcd"), "rejected": turns(*"abce")}, "d.", "e."),
        ({"chosen": turns(*"abcd"), "rejected": turns(*"azcd")}, "b.d.", "z.d."),
        ({"chosen": turns(*"ab"), "rejected": turns(*"abcd")}, "b.", "b.d."),
        ({"prompt": "a", "chosen": turns(*"abcd"), "rejected": turns(*"abce")}, "b.d.", "b.e."),
    ],
)
def test_of_the_prompt_nothing_is_learned_and_of_what_follows_every_answer(line, chosen, rejected):
    tokenizer = make_tokenizer("control")
    for messages, learned in zip(parse(line, PREFERENCE).conversations, (chosen, rejected), strict=True):
        ids, supervised = tokenizer.encode_chat(messages)
        assert tokenizer.decode(ids[supervised]).replace("<|endoftext|>", ".") == learned
        prompt = tokenizer.decode(ids[: supervised.argmax()])
        assert prompt.endswith("<|assistant|>") and prompt.count("<|user|>a") == 1


def test_an_answer_in_the_prompt_is_not_learned_whatever_its_weight():
    for weight in (None, 0, 1):
        line = {"prompt": turns("a", "b", "c"), "chosen": "d", "rejected": "e"}
        line["prompt"][1]["weight"] = weight
        for messages in parse(line, PREFERENCE).conversations:
            assert [message.get("weight") for message in messages] == [0, 0, 0, None]


def test_an_answer_of_weight_0_is_read_and_not_learned():
    line = {"prompt": "a", "chosen": answer("b", "c", "d"), "rejected": "e"}
    line["chosen"][0]["weight"] = 0
    chosen, _ = parse(line, PREFERENCE).conversations
    ids, supervised = make_tokenizer("control").encode_chat(chosen)
    assert make_tokenizer("control").decode(ids[supervised]) == "d<|endoftext|>"
    line["chosen"][2]["weight"] = 0
    with pytest.raises(UserError, match="nothing to learn"):
        parse(line, PREFERENCE)


@pytest.mark.parametrize("kind", ["qwen3", "tinyllama"])
def test_pairs_meet_a_models_own_template(tmp_path: Path, kind):
    tokenizer = own_tokenizers.make_tokenizer(kind, tmp_path / kind)
    path = write(tmp_path / "pairs.jsonl", {"prompt": LONGER, "chosen": "d", "rejected": "e f"})
    encoded, _ = Encoder(PREFERENCE, tokenizer, 512, 0).encode(list(open_input(path, "auto", 0.0, None)))
    expected = [tokenizer.encode_chat([*LONGER, *answer(text)]) for text in ("d", "e f")]
    assert np.array_equal(encoded["train"].tokens, np.concatenate([ids for ids, _ in expected]))
    assert encoded["train"].lengths.tolist() == [len(ids) for ids, _ in expected]
    # Of each, what is supervised after the last question: the answer and its end.
    first_answers = [int(np.diff(supervised, prepend=False).nonzero()[0][2]) for _, supervised in expected]
    learned = [
        np.where(np.arange(len(s)) < start, False, s) for (_, s), start in zip(expected, first_answers, strict=True)
    ]
    assert np.array_equal(encoded["train"].supervised, np.concatenate(learned))


ONLY = 'a line must be an object with "chosen" and "rejected"'
OWN_FILE = 'a pair of answers needs both "chosen" and "rejected", and a file without other conversations'
DIFFERS = "a prompt that differs: "
BAD = [
    ({"prompt": "Q", "chosen": "A"}, rf"{ONLY} \("),
    ({"prompt": "Q", "chosen": "A", "rejected": None}, rf"{ONLY} \("),
    ({"question": "Q"}, f"{ONLY}; to learn the file as it is, give --format text"),
    (CHAT, rf"{ONLY} \("),
    ([PAIR], ONLY),
    ({"chosen": "A", "rejected": "B"}, 'a pair needs a "prompt", or in "chosen" and "rejected" lists of messages that'),
    ({"chosen": turns("Q", "A"), "rejected": "B"}, 'a pair needs a "prompt", or'),
    (PAIR | {"rejected": "Ann"}, "a pair without a difference: chosen and rejected have the same answer"),
    (PAIR | {"rejected": turns("Who?", "Ann")}, "a pair without a difference"),
    ({"chosen": turns("Q", "A"), "rejected": turns("Q", "A")}, "a pair without a difference"),
    (PAIR | {"chosen": ""}, "chosen is empty: it has no character that can be seen"),
    (PAIR | {"prompt": "\u200b"}, "prompt is empty: it has no character"),
    (PAIR | {"rejected": answer(" ")}, r"rejected\[0\].content is empty"),
    (PAIR | {"rejected": []}, "rejected is empty: it has no message"),
    (PAIR | {"prompt": []}, "prompt is empty: it has no message"),
    (PAIR | {"chosen": 3}, "chosen must be a string, not int"),
    (PAIR | {"chosen": {"role": "assistant", "content": "A"}}, "chosen must be a string, not dict"),
    (PAIR | {"chosen": ["A"]}, r'chosen\[0\] must be an object with "role" and "content"'),
    (PAIR | {"prompt": [{"role": "user"}]}, r'prompt\[0\] must be an object with "role" and "content"'),
    (PAIR | {"prompt": answer("Q")}, r"prompt\[0\] has the role 'assistant' where 'system' or 'user' is due"),
    (PAIR | {"prompt": turns("Q", "A")}, "prompt must end with a user message, not with the role 'assistant'"),
    (PAIR | {"prompt": LONGER[:1]}, "prompt must end with a user message, not with the role 'system'"),
    (PAIR | {"prompt": [{"role": "tool", "content": "4"}]}, r"prompt\[0\] has the role 'tool'"),
    (
        PAIR | {"chosen": [{"role": "tool", "content": "4"}]},
        r"chosen\[0\] has the role 'tool' where 'assistant' is due",
    ),
    (PAIR | {"chosen": answer("A", "Q", "A")[:2]}, "chosen must end with an answer of the assistant"),
    (PAIR | {"rejected": turns("Who?")}, "rejected must end with an answer of the assistant"),
    (PAIR | {"chosen": turns("Where?", "A")}, f'{DIFFERS}chosen does not begin with the messages of "prompt"'),
    (PAIR | {"rejected": [LONGER[0], *turns("Who?", "A")]}, f"{DIFFERS}rejected does not begin"),
    (PAIR | {"prompt": turns("Q", "A", "q"), "chosen": turns("Q", "B")}, f"{DIFFERS}chosen does not begin"),
    (
        {"chosen": turns("Q", "A"), "rejected": turns("q", "B")},
        f"{DIFFERS}chosen and rejected share no beginning that",
    ),
    ({"chosen": [LONGER[0], *turns("Q", "A")], "rejected": turns("Q", "B")}, f"{DIFFERS}chosen and rejected share"),
    ({"chosen": [LONGER[0], *turns("Q", "A")], "rejected": [LONGER[0], *turns("q", "B")]}, f"{DIFFERS}chosen and"),
    (
        {"chosen": answer("A"), "rejected": answer("B")},
        r"chosen\[0\] has the role 'assistant' where 'system' or 'user'",
    ),
    (PAIR | {"chosen": [{"role": "assistant", "content": "A", "tool_calls": [1]}]}, r"chosen\[0\] has tool_calls"),
    (PAIR | {"chosen": [{"role": "assistant", "content": "A", "weight": 2}]}, r"chosen\[0\].weight is 2; it must be"),
    (
        PAIR | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
        r"chosen\[0\].content\[0\] is {'type'",
    ),
]


@pytest.mark.parametrize(("line", "complaint"), BAD)
def test_what_is_no_pair_is_named_with_its_line_or_counted(tmp_path: Path, line, complaint):
    path = write(tmp_path / "pairs.jsonl", PAIR, line, SAME["no prompt"])
    items, tokenizer = list(open_input(path, "auto", 0.0, None)), make_tokenizer("control")
    stop, skip = (Encoder(PREFERENCE, tokenizer, 512, 0, bad_items=bad) for bad in ("stop", "skip"))
    with pytest.raises(UserError, match=rf"pairs\.jsonl:2: {complaint}") as caught:
        stop.encode(items)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("(--bad_lines=skip leaves such out)")
    _, ledger = skip.encode(items)
    assert ledger.skipped == {("train", "not a pair"): 1} and ledger.kept == 2
    assert ledger.forms == {("train", PREFERENCE): 2}


def test_a_line_that_is_no_pair_leaves_nothing_behind(tmp_path: Path):
    path = write(tmp_path / "pairs.jsonl", PAIR, PAIR | {"rejected": "Ann"})
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: a pair without a difference"):
        run(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_line_with_the_keys_of_a_form_tells_what_a_file_holds(tmp_path: Path):
    unknown = [{"id": 1}, [], 7]
    for lines, format, complaint in (
        ([*unknown, PAIR, CHAT], PREFERENCE, f"pairs.txt:1: {ONLY}"),
        ([PAIR, CHAT], PREFERENCE, f"pairs.txt:2: {ONLY}"),
        ([CHAT, PAIR], "conversations", f"pairs.txt:2: {OWN_FILE}"),
    ):
        path = write(tmp_path / "pairs.txt", *lines)
        path.write_bytes(path.read_bytes() + b"{\n")
        assert open_input(path, "auto", 0.0, None).format == format
        with pytest.raises(UserError, match=complaint):
            run(path)
        data, ledger = run(path, "--bad_lines=skip")
        assert data.per_item == (2 if format == PREFERENCE else 1)
        assert ledger["forms"] == ({PREFERENCE: 1} if format == PREFERENCE else {"chat-jsonl": 1})
        kind = "not a pair" if format == PREFERENCE else "not a conversation"
        assert ledger["skipped"] == {kind: len(lines) - 1, "not valid JSON": 1}
    damaged = tmp_path / "pairs.jsonl"
    damaged.write_bytes(b"{\n\xff\n" + json.dumps(PAIR).encode())
    assert open_input(damaged, "auto", 0.0, None).format == PREFERENCE
    with pytest.raises(UserError, match=OWN_FILE):
        run(write(path, {"prompt": "Who?", "chosen": "Ann"}))
    # A conversation with other fields is one.
    path = write(tmp_path / "pairs.txt", CHAT | PAIR)
    data, ledger = run(path)
    assert data.description["format"] == "chat-jsonl" and ledger["unread_fields"].keys() == PAIR.keys()
    data, ledger = run(path, f"--format={PREFERENCE}")
    assert data.description["format"] == PREFERENCE and ledger["unread_fields"] == {"messages": 1}


def test_an_array_and_a_train_and_valid_pair_are_read(tmp_path: Path):
    (tmp_path / "pairs.json").write_text(json.dumps([*SAME.values()], indent=2))
    assert len([*texts(run(tmp_path / "pairs.json")[0])]) == 2 * len(SAME)
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "a-train.jsonl", PAIR)
    write(tmp_path / "files" / "a-valid.jsonl", CHAT)
    with pytest.raises(
        UserError, match=r"a-train\.jsonl looks like preference-jsonl and a-valid\.jsonl looks like conv"
    ):
        run(tmp_path / "files")
    write(tmp_path / "files" / "a-valid.jsonl", SAME["lists"])
    data, _ = run(tmp_path / "files")
    assert [*texts(data)] == [*texts(data, "valid")]


def test_embedded_stories_are_no_pairs():
    with pytest.raises(UserError, match="not preference-jsonl"):
        open_embedded(1, PREFERENCE, 0)


def test_rows_of_parquet_give_what_lines_give(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, names in enumerate(
        (["texts"], ["lists"], ["no prompt", "a null prompt"], ["the prompt again"], ["parts"])
    ):
        rows = [SAME[name] | {"id": 7} for name in names] * 3
        expected, ledger = run(write(tmp_path / f"{number}.jsonl", *rows))
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        for flags in ([], [f"--format={PREFERENCE}"]):
            data, found = run(path, *flags)
            assert (
                [*texts(data)] == [*texts(expected)]
                and found == ledger
                and found["unread_fields"] == {"id": 3 * len(names)}
            )
    # The columns of a set that has both.
    pq.write_table(pa.Table.from_pylist([CHAT | PAIR]), path)
    assert [run(path, *flags)[0].description["format"] for flags in ([], flags)] == ["chat-jsonl", PREFERENCE]
    pq.write_table(pa.Table.from_pylist([CHAT]), path)
    with pytest.raises(UserError, match=r"4\.parquet has no columns \"chosen\" and \"rejected\", but \['messages'\]$"):
        run(path, f"--format={PREFERENCE}")


# Splits and the ledger


def test_pairs_of_one_prompt_are_never_in_different_splits(tmp_path: Path):
    def forms(i: int) -> list[dict]:
        """Of one prompt."""
        lists = [
            {"chosen": turns(f"Q{i}", "A"), "rejected": turns(f"Q{i}", "B")},
            {"prompt": parts(turns(f"Q{i}")), "chosen": "A", "rejected": "B", "id": i},
        ]
        return [{"prompt": f"Q{i}", "chosen": f"A{j}", "rejected": "B"} for j in range(3)] + lists

    path = write(tmp_path / "pairs.jsonl", *(line for i in range(60) for line in forms(i)))
    data, _ = run(path, "--valid_fraction=0.4")
    train, valid = ([text.split("<|user|>")[1].split("<")[0] for text, _ in texts(data, s)] for s in ("train", "valid"))
    assert len(train) + len(valid) == 2 * 5 * 60 and set(train).isdisjoint(valid)
    assert 12 <= len(set(valid)) <= 36
    assert len({prompt_of(json.dumps(line)) for line in forms(0)}) == 1
    for text in ("", "{", "[" * 100_000, "7", '{"chosen": "A"}', json.dumps(PAIR | {"chosen": ""})):
        assert prompt_of(text) == text


def test_the_ledger_counts_pairs_and_the_tokens_of_both(tmp_path: Path, capsys):
    # With 256 ranks every byte is a token; four more are <|system|>, <|user|>, <|assistant|> and <|endoftext|>.
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "U", "name": "Ann"}]
    lengths = ((14, 1), (1, 14), (15, 1), (1, 15), (2, 3))
    lines = [{"prompt": prompt, "chosen": "x" * a, "rejected": "y" * b, "score_chosen": 1.0} for a, b in lengths]
    data, ledger = run(write(tmp_path / "pairs.jsonl", *lines), "--max_tokens=20")
    assert data.description["splits"]["train"] == {
        **{"conversations": 6, "tokens": 6 * 6 + 15 + 15 + 5, "supervised_tokens": 6 + 15 + 15 + 5, "longest": 20},
        "shards": 1,
    }
    assert (ledger["read"], ledger["forms"]) == (5, {PREFERENCE: 5})
    assert ledger["tasks"]["preference"] == {
        **{"made": 5, "kept": 3, "trimmed": 0, "left_out": {"longer than max_tokens": 2}},
        "tokens": {"total": 71, "supervised": 41, "mean": 23.7, "median": 27, "longest": 27},
    }
    assert ledger["unread_fields"] == {"prompt[].name": 5, "score_chosen": 5}
    printed = capsys.readouterr().out
    assert "pairs by form: 5 preference-jsonl\n" in printed
    assert "left out 2 pairs: longer than max_tokens\n" in printed
    with pytest.raises(UserError, match="nothing is left to learn from: left out 5 pairs: longer than max_tokens"):
        run(tmp_path / "pairs.jsonl", "--max_tokens=6")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(prepare, "ITEMS_PER_BLOCK", 2)
    path, manifests = write(tmp_path / "pairs.jsonl", *(PAIR | {"prompt": f"Who {i}?"} for i in range(30))), []
    for workers in (1, 2):
        data, _ = run(path, f"--workers={workers}", "--valid_fraction=0.3")
        manifests.append((data.directory / "manifest.json").read_text())
    assert manifests[0] == manifests[1]


# The data set


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> PreparedData:
    """Pairs of many lengths, at most 60 tokens a conversation."""
    lines = [
        {"prompt": [LONGER[0], *turns(f"Q{i}")], "chosen": "a" * (1 + i % 29), "rejected": "b" * (1 + i % 31)}
        for i in range(100)
    ]
    path = write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", *lines)
    return run(path, "--valid_fraction=0.2")[0]


def split_of_pairs(directory: Path, lengths: list[tuple[int, int]]) -> Split:
    """A split, two pairs a shard, whose tokens are the indices of their conversations."""
    writer = ShardWriter(directory / "train", tokens_per_shard=1)
    flat = np.array(lengths, np.int32).reshape(-1)
    for start in range(0, len(flat), 4):
        part, numbers = flat[start : start + 4], np.arange(start, len(flat))[:4]
        tokens = np.repeat(numbers, part)
        writer.add(Encoded(tokens, np.ones(tokens.size, bool), part, np.zeros(part.size, np.uint8)))
    writer.close()
    description = {
        "format": PREFERENCE,
        "format_version": 4,
        "tasks": ["preference"],
        "splits": {"train": writer.totals},
    }
    return Split(directory / "train", description, 260)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25)), min_size=1, max_size=60), st.integers(50, 120))
def test_a_pair_is_in_one_row_its_chosen_conversation_first(lengths, seq_len):
    with tempfile.TemporaryDirectory() as directory:
        split = split_of_pairs(Path(directory), lengths)
        assert (len(split), split.per_item) == (2 * len(lengths), 2)
        assert split.item_lengths.tolist() == [sum(pair) for pair in lengths] and split.item_lengths.dtype == np.int32
        plan = Packing(split.item_lengths, seq_len).epoch(seed=3)
        source, seen = BatchSource(split, plan, 2, seq_len), []
        for row in range(len(plan)):
            batch = {key: array[row % 2] for key, array in source[row // 2].items()}
            conversations = source.segments_of(row).tolist()
            assert batch["segment_ids"].max() == len(conversations)
            for i, (conversation, length) in enumerate(zip(conversations, split.lengths[conversations], strict=True)):
                here = batch["segment_ids"] == i + 1
                assert np.array_equal(batch["tokens"][here], [conversation] * length)
                assert np.array_equal(batch["positions"][here], np.arange(length))
                assert conversation % 2 == i % 2
            assert np.array_equal(conversations[1::2], np.add(conversations[::2], 1))
            seen += conversations
        assert sorted(seen) == list(range(len(split)))


def test_batches_hold_pairs(pairs):
    split = pairs.split("train")
    assert len(split) == 2 * len(split.item_lengths) > 100
    found = []
    for batch in batches(pairs.directory, batch_size=4, seq_len=128, seed=1):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            said = [pairs.tokenizer.decode(tokens[segments == i]) for i in range(1, segments.max() + 1)]
            prompts = [text.split("<|assistant|>")[0] for text in said]
            assert prompts[::2] == prompts[1::2]
            assert all("<|assistant|>a" in text for text in said[::2])
            assert all("<|assistant|>b" in text for text in said[1::2])
            found += prompts[::2]
    assert len(found) == len(set(found)) == len(split.item_lengths)


def test_other_data_has_items_of_one_conversation(chat_data):
    data = PreparedData(chat_data)
    split = data.split("train")
    assert data.per_item == split.per_item == 1
    assert np.array_equal(split.item_lengths, split.lengths) and split.item_lengths.dtype == split.lengths.dtype
    source = BatchSource(split, plan := Packing(split.item_lengths, 128).epoch(), 4, 128)
    assert all(np.array_equal(source.segments_of(row), plan.row(row)) for row in range(len(plan)))


def test_a_row_of_pairs_is_shown(pairs, capsys):
    inspect.main([f"--data={pairs.directory}", "--seq_len=200", "--row=1"])
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("── ")][:-1]
    split = pairs.split("train")
    source = BatchSource(split, Packing(split.item_lengths, 200).epoch(), 1, 200)
    names = [title.split(" · tokens")[0] for title in titles]
    assert len(names) > 2 and names == [
        f"── {number} · pair {conversation // 2} · {('chosen', 'rejected')[conversation % 2]} · preference"
        for number, conversation in enumerate(source.segments_of(1).tolist(), 1)
    ]
    with pytest.raises(UserError, match=r"seq_len is 50, but the longest pair has \d+ tokens; raise it, or prepare"):
        inspect.main([f"--data={pairs.directory}", "--seq_len=50"])


def change(data: PreparedData, directory: Path, **changes: object) -> Path:
    """A copy whose `data.json` says something else."""
    path = Path(shutil.copytree(data.directory, directory))
    files.write_json(path / "data.json", data.description | changes)
    files.write_manifest(path)
    return path


def test_half_a_pair_is_damage(tmp_path):
    chats, _ = run(write(tmp_path / "chats.jsonl", *([CHAT] * 3)))
    changed = PreparedData(change(chats, tmp_path / "data", format=PREFERENCE))
    with pytest.raises(
        UserError, match=r"train holds 3 conversations, which make no whole pairs; prepare the data again$"
    ):
        changed.split("train")


def test_versions_up_to_this_one_are_read(chat_data, tmp_path):
    chats = PreparedData(chat_data)
    assert chats.description["format_version"] == 4
    for version in (2, 3):
        older = PreparedData(change(chats, tmp_path / str(version), format_version=version))
        assert np.array_equal(older.split("train").item_lengths, chats.split("train").item_lengths)
    with pytest.raises(UserError, match=r"data\.json has format_version 5, this program knows up to 4; upgrade"):
        PreparedData(change(chats, tmp_path / "newer", format_version=5))
