"""Conversations in the forms that people have them in: each is told by its keys, and gives the same ids."""

import json
import sys
from pathlib import Path
from random import Random

import hostile_chats
import numpy as np
import own_tokenizers
import pytest
from tiny_model import make_tokenizer

from tinysft_jax import chat
from tinysft_jax.console import UserError
from tinysft_jax.data.encode import Encoder
from tinysft_jax.data.forms import CONVERSATIONS, parse
from tinysft_jax.data.prepare import main
from tinysft_jax.data.sources import open_input

# One conversation, as each form has it.
SAME = {
    "chat-jsonl": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": sender, "value": text} for sender, text in (("system", "Be kind."), ("human", "Q"), ("gpt", "A"))
        ]
    },
    "alpaca": {"system": "Be kind.", "instruction": "Q", "input": "", "output": "A"},
}


def share(*turns: tuple[str, object], **others: object) -> dict:
    return {"conversations": [{"from": sender, "value": value} for sender, value in turns]} | others


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run(path: Path, *flags: str) -> tuple[dict, dict, list[np.ndarray]]:
    """`data.json`, the ledger of the training split, and its arrays."""
    output = path.with_name(f"{path.name}{len(flags)}.data")
    main([f"--input={path}", f"--output={output}", "--workers=1", "--bpe_ranks=256", "--valid_fraction=0", *flags])
    arrays = [np.load(output / "train" / f"{name}-00000.npy") for name in ("tokens", "supervised", "offsets")]
    ledger = json.loads((output / "ledger.json").read_text())["splits"]["train"]
    return json.loads((output / "data.json").read_text()), ledger, arrays


@pytest.mark.parametrize("template", ["control", "text"])
def test_one_conversation_gives_the_same_ids_in_every_form(tmp_path: Path, template):
    tokenizer = make_tokenizer(template)
    ids, supervised = tokenizer.encode_chat(parse(SAME["alpaca"], CONVERSATIONS).conversations[0])
    assert tokenizer.decode(ids) == "<|system|>Be kind.<|user|>Q<|assistant|>A<|endoftext|>"
    for form, line in SAME.items():
        for flags in ([], [f"--format={form}"]):
            path = write(tmp_path / f"{form}.txt", line, line)
            description, ledger, arrays = run(path, f"--template={template}", *flags)
            assert (description["format"], description["tasks"], ledger["forms"]) == (form, ["chat"], {form: 2})
            assert np.array_equal(arrays[0], [*ids, *ids]) and np.array_equal(arrays[1], [*supervised, *supervised])


@pytest.mark.parametrize("kind", ["qwen3", "tinyllama"])
def test_turns_and_system_messages_meet_a_models_own_template(tmp_path: Path, kind):
    tokenizer = own_tokenizers.make_tokenizer(kind, tmp_path / kind)
    texts = ("Be kind.", *"QAqa")
    roles = ("system", *("user", "assistant") * 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    ids, supervised = tokenizer.encode_chat(messages)
    assert tokenizer.template not in chat.TEMPLATES and 0 < supervised.sum() < ids.size
    for first, *others in (("system", "human", "gpt", "user", "assistant"), (None, "user", "chatgpt", "human", "bing")):
        turns = [*zip(others, texts[1:], strict=True)]
        line = share((first, texts[0]), *turns) if first else share(*turns, system=texts[0])
        items = list(open_input(write(tmp_path / "chats.jsonl", line), "auto", 0.0, None))
        encoded, _ = Encoder(CONVERSATIONS, tokenizer, 512, 0).encode(items)
        assert np.array_equal(encoded["train"].tokens, ids)
        assert np.array_equal(encoded["train"].supervised, supervised)


def test_auto_tells_each_line_by_its_keys_and_counts_the_forms(tmp_path: Path, capsys):
    lines = [*SAME.values(), SAME["alpaca"], {"prompt": "Hi", "completion": "Ho", "instruction": "I"}]
    path = write(tmp_path / "chats.jsonl", *lines, {"prompt": None, "instruction": "Hi", "output": "Ho"})
    description, ledger, _ = run(path)
    assert description["format"] == "conversations" and ledger["read"] == 6
    assert ledger["forms"] == {"alpaca": 3, "chat-jsonl": 2, "sharegpt": 1}
    assert "conversations by form: 3 alpaca, 2 chat-jsonl, 1 sharegpt\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r'jsonl:1: a line must be an object with "instruction" and "output" \('):
        run(path, "--format=alpaca")
    description, ledger, _ = run(path, "--format=alpaca", "--bad_lines=skip")
    assert description["format"] == "alpaca" and ledger["forms"] == {"alpaca": 3}
    assert ledger["skipped"] == {"not a conversation": 3}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"instruction": "I", "output": "O"}, ["I", "O"]),
        ({"instruction": "I", "input": "  ", "output": "O", "system": ""}, ["I", "O"]),
        ({"instruction": "I\n", "input": "one\ntwo", "output": "O", "system": "S"}, ["S", "I\n\n\none\ntwo", "O"]),
        (share(("human", "Q"), ("bard", "A"), messages=None), ["Q", "A"]),
        (share(("human", "Q"), ("bing", "A"), ("user", "q"), ("claude", "a"), system="S"), ["S", *"QAqa"]),
        (share(("system", "S"), ("human", "Q"), ("model", "A"), ("human", "q"), system=" "), ["S", *"QAq"]),
    ],
)
def test_what_becomes_of_a_line(line, expected):
    assert [message["content"] for message in parse(line, CONVERSATIONS).conversations[0]] == expected


def test_a_weight_counts_in_sharegpt_too():
    line = share(("human", "Q"), ("gpt", "A"), ("human", "q"), ("gpt", "a"))
    line["conversations"][1]["weight"] = 0
    assert [message.get("weight") for message in parse(line, "sharegpt").conversations[0]] == [None, 0, None, None]
    line["conversations"][3]["weight"] = 0
    with pytest.raises(UserError, match="nothing to learn"):
        parse(line, "sharegpt")


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
NO_FORM = 'a line must be an object with "messages", or "prompt" and "completion", or "conversations", or "instruction"'
NO_PART = r'; only {"type": "text", "text": "..."} can be used'
BAD = [
    ({"question": "Q"}, f'{NO_FORM} and "output"; to learn the file as it is, give --format text \\('),
    ([SAME["alpaca"]], NO_FORM),
    ({"instruction": "I"}, rf'{NO_FORM} and "output" \('),
    ({"output": "O", "input": "x"}, NO_FORM),
    ({"instruction": None, "output": "O"}, NO_FORM),
    ({"instruction": " ", "output": "O"}, "instruction is empty"),
    ({"instruction": "I", "output": ""}, "output is empty"),
    ({"instruction": "I", "output": ["O"]}, "output must be a string, not list"),
    ({"instruction": "I", "output": "O", "input": 3}, "input must be a string, not int"),
    ({"instruction": "I", "output": "O", "system": {}}, "system must be a string, not dict"),
    (share(), "conversations must be a list of at least one"),
    ({"conversations": "Q"}, "conversations must be a list of at least one"),
    ({"conversations": ["Q", "A"]}, r'conversations\[0\] must be an object with "from" and "value"'),
    ({"conversations": [{"from": "human"}]}, r'conversations\[0\] must be an object with "from" and "value"'),
    (share(("gpt", "A"), ("human", "Q")), r"conversations\[0\] has the role 'assistant' where 'system' or 'user'"),
    (share(("gpt", "A"), ("human", "Q"), system="S"), r"conversations\[0\] has the role 'assistant' where 'user'"),
    (share(("human", "Q"), ("human", "Q")), r"conversations\[1\] has the role 'user' where 'assistant'"),
    (share(("system", "S"), ("human", "Q"), system="S"), r"conversations\[0\] has the role 'system' where"),
    (share(("human", "Q")), "nothing to learn"),
    (share(("system", ""), ("human", "Q"), ("gpt", "A")), r"conversations\[0\].value is empty"),
    (share(("human", "Q"), ("gpt", 3)), r"conversations\[1\].value must be a string, not int"),
    (
        share(("human", "Q"), ("observation", "{}")),
        r"conversations\[1\].from is 'observation'; it must be one of system",
    ),
    ({"conversations": [{"from": ["human"], "value": "Q"}]}, r"\.from is \['human'\]"),
    ({"messages": [*TURNS, {"role": "tool", "content": "4"}]}, r"messages\[2\] has the role 'tool' where 'user'"),
    (
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        r"messages\[1\] has tool_calls: only text can be used",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        rf"messages\[0\].content\[1\] is {{'type': 'image_url'}}{NO_PART}",
    ),
    ({"messages": [TURNS[0], {"role": "assistant", "content": ["a"]}]}, rf"messages\[1\].content\[0\] is 'a'{NO_PART}"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, NO_PART),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, NO_PART),
    ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\].content is empty"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD)
def test_what_can_not_be_used_is_named_with_its_line_or_counted(tmp_path: Path, line, complaint):
    path = write(tmp_path / "chats.jsonl", SAME["alpaca"], line, SAME["sharegpt"])
    items, tokenizer = list(open_input(path, "auto", 0.0, None)), make_tokenizer("control")
    stop, skip = (Encoder(CONVERSATIONS, tokenizer, 512, 0, bad_items=bad) for bad in ("stop", "skip"))
    with pytest.raises(UserError, match=rf"chats\.jsonl:2: .*{complaint}") as caught:
        stop.encode(items)
    assert "\n" not in str(caught.value) and "--bad_lines=skip" in str(caught.value)
    _, ledger = skip.encode(items)
    assert ledger.skipped == {("train", "not a conversation"): 1} and ledger.kept == 2
    assert ledger.forms == {("train", "alpaca"): 1, ("train", "sharegpt"): 1}


def test_a_line_that_can_not_be_used_leaves_nothing_behind(tmp_path: Path):
    path = write(tmp_path / "chats.jsonl", SAME["sharegpt"], share(("gpt", "A"), ("human", "Q")))
    with pytest.raises(UserError, match=r"chats\.jsonl:2: conversations\[0\]"):
        run(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_read_is_counted_in_every_form():
    line = {"messages": [TURNS[0] | {"id": 7, "tool_calls": []}, TURNS[1]], "prompt": "P", "images": None}
    assert parse(line, CONVERSATIONS).unread == ["prompt", "messages[].id", "messages[].tool_calls"]
    line = share(("human", "Q"), ("gpt", "A"), id=1, image="a.png", system=None)
    line["conversations"][0] |= {"text": "a", "weight": 0, "markdown": None}
    assert parse(line, CONVERSATIONS).unread == ["id", "image", "conversations[].text"]
    assert parse(SAME["alpaca"] | {"history": [], "id": None}, CONVERSATIONS).unread == ["history"]


def test_a_pyarrow_that_is_not_there_is_asked_for(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "chats.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"chats\.parquet needs pyarrow: pip install -e '\.\[parquet\]'$"):
        run(tmp_path / "chats.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile_chats.KINDS)
def test_hostile_files_are_read_or_refused_in_one_line(tmp_path: Path, kind):
    """200 of each kind; `make soak` tries more."""
    pytest.importorskip("pyarrow")
    outcomes = [hostile_chats.outcome(hostile_chats.write(Random(seed), kind, tmp_path)) for seed in range(200)]
    assert min(map(outcomes.count, ("kept", "skipped", "refused"))) > 2
