"""Conversations in the forms that people have them in: each is told by its keys, and gives the same ids."""

import importlib.util
import json
import sys
from pathlib import Path
from random import Random

import hostile_chats
import numpy as np
import pytest
from tiny_model import make_tokenizer

from tinysft_jax.console import UserError
from tinysft_jax.data.encode import Encoder
from tinysft_jax.data.forms import form_of, parse, unread_fields
from tinysft_jax.data.prepare import main
from tinysft_jax.data.sources import open_input

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
# One conversation, as each form has it.
SAME = {
    "chat-jsonl": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
            *({"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "QAqa", strict=True)),
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": sender, "value": text}
            for sender, text in zip(("system", "human", "gpt", "user", "chatgpt"), ("Be kind.", *"QAqa"), strict=True)
        ]
    },
    "alpaca": {"system": "Be kind.", "instruction": "q", "input": "", "output": "a", "history": [["Q", "A"]]},
}
MESSAGES = parse(SAME["chat-jsonl"], "chat-jsonl")


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


def test_one_conversation_gives_the_same_ids_in_every_form(tmp_path: Path):
    expected = None
    for form, line in SAME.items():
        assert form_of(line) == form and parse(line, form) == MESSAGES
        for flags in ([], [f"--format={form}"]):
            description, ledger, arrays = run(write(tmp_path / f"{form}.txt", line, line), *flags)
            assert (description["format"], description["tasks"], ledger["forms"]) == (form, ["chat"], {form: 2})
            assert all(np.array_equal(*pair) for pair in zip(arrays, expected or arrays, strict=True))
            expected = arrays
    tokenizer = make_tokenizer("control")
    ids = tokenizer.encode_chat(MESSAGES)[0]
    assert np.array_equal(expected[0], [*ids, *ids]) and tokenizer.decode(ids).startswith("<|system|>Be kind.<|user|>Q")


def test_auto_tells_each_line_by_its_keys_and_counts_the_forms(tmp_path: Path, capsys):
    lines = [*SAME.values(), SAME["alpaca"], {"prompt": "Hi", "completion": "Ho", "instruction": "I"}]
    path = write(tmp_path / "chats.jsonl", *lines, {"prompt": None, "instruction": "Hi", "output": "Ho"})
    description, ledger, _ = run(path)
    assert description["format"] == "mixed" and ledger["read"] == 6
    assert ledger["forms"] == {"alpaca": 3, "chat-jsonl": 2, "sharegpt": 1}
    assert "conversations by form: 3 alpaca, 2 chat-jsonl, 1 sharegpt\n" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"jsonl:1: .*\"instruction\" and \"output\"; or give --format chat-jsonl, which"
    ):
        run(path, "--format=alpaca")
    description, ledger, _ = run(path, "--format=alpaca", "--bad_lines=skip")
    assert description["format"] == "alpaca" and ledger["forms"] == {"alpaca": 3}
    assert ledger["skipped"] == {"not a conversation": 3}
    assert "by form" not in capsys.readouterr().out, "the format says it"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"instruction": "I", "output": "O"}, ["I", "O"]),
        ({"instruction": "I", "input": "  ", "output": "O", "history": [], "system": ""}, ["I", "O"]),
        ({"instruction": "I\n", "input": "one\ntwo", "output": "O"}, ["I\n\n\none\ntwo", "O"]),
        (share(("system", ""), ("human", "Q"), ("bard", "A"), messages=None), ["Q", "A"]),
        (share(("human", "Q"), ("bing", "A"), ("user", "q"), ("claude", "a"), system="S"), ["S", *"QAqa"]),
        (share(("system", None), ("human", "Q"), ("model", "A"), system="S"), ["S", "Q", "A"]),
    ],
)
def test_what_becomes_of_a_line(line, expected):
    assert [message["content"] for message in parse(line, form_of(line))] == expected


def test_a_weight_counts_in_sharegpt_too():
    line = share(("human", "Q"), ("gpt", "A"), ("human", "q"), ("gpt", "a"))
    line["conversations"][1]["weight"] = 0
    assert [message.get("weight") for message in parse(line, "sharegpt")] == [None, 0, None, None]
    line["conversations"][3]["weight"] = 0
    with pytest.raises(UserError, match="nothing to learn"):
        parse(line, "sharegpt")


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
NO_CHAT, NO_TEXT = "not a conversation", "not of text alone"
BAD = [
    ({"instruction": "I"}, 'there is no "output"; the form alpaca has "instruction" and "output"', NO_CHAT),
    ({"output": "O", "input": "x"}, 'there is no "instruction"', NO_CHAT),
    ({"instruction": None, "output": "O"}, 'there is no "instruction"', NO_CHAT),
    ({"instruction": " ", "output": "O"}, "instruction is empty", NO_CHAT),
    ({"instruction": "I", "output": ""}, "output is empty", NO_CHAT),
    ({"instruction": "I", "output": ["O"]}, "output must be a string, not list", NO_CHAT),
    ({"instruction": "I", "output": "O", "input": 3}, "input must be a string, not int", NO_CHAT),
    ({"instruction": "I", "output": "O", "system": {}}, "system must be a string, not dict", NO_CHAT),
    ({"instruction": "I", "output": "O", "history": [["Q"]]}, "history must be a list of pairs", NO_CHAT),
    ({"instruction": "I", "output": "O", "history": "Q"}, "history must be a list of pairs", NO_CHAT),
    ({"instruction": "I", "output": "O", "history": [["Q", ""]]}, "history is empty", NO_CHAT),
    ({"instruction": "I", "output": "O", "images": ["a.png"]}, "images is not empty: only text", NO_TEXT),
    (share(), "conversations must be a list of at least one", NO_CHAT),
    (share(("system", " ")), "conversations must be a list of at least one", NO_CHAT),
    ({"conversations": "Q"}, "conversations must be a list of at least one", NO_CHAT),
    ({"conversations": ["Q", "A"]}, r'conversations\[0\] must be an object with "from" and "value"', NO_CHAT),
    ({"conversations": [{"from": "human"}]}, r'conversations\[0\] must be an object with "from" and "value"', NO_CHAT),
    (share(("gpt", "A"), ("human", "Q")), r"conversations\[0\] has the role 'assistant' where", NO_CHAT),
    (share(("human", "Q"), ("human", "Q")), r"conversations\[1\] has the role 'user' where 'assistant'", NO_CHAT),
    (share(("system", ""), ("gpt", "A")), r"conversations\[1\] has the role 'assistant' where", NO_CHAT),
    (share(("system", "S"), ("human", "Q"), system="S"), r"conversations\[0\] has the role 'system' where", NO_CHAT),
    (share(("human", "Q")), "nothing to learn", NO_CHAT),
    (share(("human", "Q"), ("gpt", "")), r"conversations\[1\].value is empty", NO_CHAT),
    (share(("human", "Q"), ("gpt", 3)), r"conversations\[1\].value must be a string, not int", NO_CHAT),
    (share(("narrator", "Q")), r"conversations\[0\].from is 'narrator'; it must be one of human", NO_CHAT),
    ({"conversations": [{"from": ["human"], "value": "Q"}]}, r"\.from is \['human'\]", NO_CHAT),
    *(
        (share(("human", "Q"), (sender, "{}")), rf"conversations\[1\].from is '{sender}': tools", NO_TEXT)
        for sender in ("function_call", "observation", "tool")
    ),
    (share(("human", "<image>"), ("gpt", "A"), image="a.png"), "image is not empty: only text", NO_TEXT),
    ({"messages": [*TURNS, {"role": "tool", "content": "4"}]}, r"messages\[2\].role is 'tool': tools", NO_TEXT),
    (
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        r"messages\[1\].tool_calls: tools",
        NO_TEXT,
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        r"messages\[0\].content\[1\] is of the type 'image_url': only text",
        NO_TEXT,
    ),
    ({"messages": [{"role": "user", "content": ["a"]}]}, r'content\[0\] must be {"type": "text", "text"', NO_CHAT),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\] must be {", NO_CHAT),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, r"content\[0\] must be {", NO_CHAT),
    ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\].content is empty", NO_CHAT),
    ({"question": "Q"}, 'with "messages", or "prompt" and "completion", or "conversations", or "instruction"', NO_CHAT),
]


@pytest.mark.parametrize(("line", "complaint", "kind"), BAD)
def test_what_can_not_be_used_is_named_with_its_line_or_counted(tmp_path: Path, line, complaint, kind):
    path = write(tmp_path / "chats.jsonl", SAME["alpaca"], line, SAME["sharegpt"])
    items, tokenizer = list(open_input(path, "auto", 0.0, None)), make_tokenizer("control")
    stop, skip = (Encoder("chat-jsonl", tokenizer, 512, 0, bad_items=bad, any_form=True) for bad in ("stop", "skip"))
    with pytest.raises(UserError, match=rf"chats\.jsonl:2: .*{complaint}") as caught:
        stop.encode(items)
    assert "\n" not in str(caught.value) and "--bad_lines=skip" in str(caught.value)
    _, ledger = skip.encode(items)
    assert ledger.skipped == {("train", kind): 1} and ledger.kept == 2
    assert ledger.forms == {("train", "alpaca"): 1, ("train", "sharegpt"): 1}


def test_a_line_that_can_not_be_used_leaves_nothing_behind(tmp_path: Path):
    path = write(tmp_path / "chats.jsonl", SAME["sharegpt"], share(("gpt", "A"), ("human", "Q")))
    with pytest.raises(UserError, match=r"chats\.jsonl:2: conversations\[0\]"):
        run(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_read_is_counted_in_every_form():
    parts = [{"type": "text", "text": "Q", "cache": 1, "image": None}]
    line = {"messages": [{"role": "user", "content": parts, "id": 7}, TURNS[1]], "images": [], "prompt": "P"}
    assert [*unread_fields(line, "chat-jsonl")] == ["prompt", "messages[].id", "messages[].content[].cache"]
    line = share(("human", "Q"), ("gpt", "A"), id=1, tools="[]", system=None)
    line["conversations"][0] |= {"text": "a", "content": ["a"], "weight": 0}
    assert [*unread_fields(line, "sharegpt")] == ["id", "tools", "conversations[].text", "conversations[].content"]
    assert [*unread_fields(SAME["alpaca"] | {"text": "a", "id": None}, "alpaca")] == ["text"]


def test_a_pyarrow_that_is_not_there_is_asked_for(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "chats.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"chats\.parquet needs pyarrow: pip install -e '\.\[parquet\]'$"):
        run(tmp_path / "chats.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile_chats.KINDS)
def test_hostile_files_are_read_or_refused_in_one_line(tmp_path: Path, kind):
    """200 of each kind; `make soak` tries more."""
    if "parquet" in kind and not HAS_PYARROW:
        pytest.skip("no pyarrow")
    outcomes = [hostile_chats.outcome(hostile_chats.write(Random(seed), kind, tmp_path)) for seed in range(200)]
    # Of lines, any can be skipped.
    expected = ("kept", "skipped", "refused") if "parquet" in kind else ("kept", "skipped")
    assert min(map(outcomes.count, expected)) > 5 and set(outcomes) == set(expected)
