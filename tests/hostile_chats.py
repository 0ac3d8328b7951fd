"""Files of conversations, in each form and container, that are damaged or not what they say."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

from tiny_model import make_tokenizer

from tinysft_jax.console import UserError
from tinysft_jax.data.encode import Encoder
from tinysft_jax.data.forms import CONVERSATIONS, PREFERENCE
from tinysft_jax.data.sources import open_input

LINES: dict[str, dict[str, Any]] = {
    "chat-jsonl": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " é"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Ho"}], "weight": 1},
        ]
    },
    "sharegpt": {
        "system": "S",
        "conversations": [
            *({"from": sender, "value": sender, "weight": None} for sender in ("human", "gpt", "user", "bing"))
        ],
    },
    "alpaca": {"instruction": "Add", "input": "1, 2", "output": "3", "system": ""},
    "preference-jsonl": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Ho"}], "weight": 1}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No"}], "weight": None}],
    },
    "preference-jsonl without a prompt": {
        key: [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("Hi", "Ho", "Q", answer))
        ]
        for key, answer in (("chosen", "A"), ("rejected", "B"))
    },
}
KINDS = [*LINES, *(f"{form}.parquet" for form in LINES)]
VALUES = [
    *(None, True, 0, 1, -1, 10**30, 1.5, float("nan"), "", " \n", "\u200b", "\x00", "\ud800", "<|user|>", "x" * 3000),
    *([], {}, [[]], [None], ["a"], [["a"]], [["a", 1]], {"type": "image_url"}, {"type": "text"}, b"\xff", 2**63 - 1),
    *("system", "user", "assistant", "tool", "gpt", "function", ["user"], [{"type": "image"}], [{"from": "human"}]),
    *({"a": {"a": {"a": 1}}}, [{"type": "text", "text": None}], [{"role": "user", "content": "a"}], "[]", "{}"),
]
KEYS = ["messages", "prompt", "completion", "conversations", "instruction", "output", "role", "value", "tool_calls"]
KEYS += ["chosen", "rejected", "images", "weight", "type", "text", "", "x" * 3000, "\x1b[2J"]


def hostile(draw: Random, form: str) -> Any:
    """A line of a form in which up to three things, at any depth, were lost, doubled, renamed or replaced."""
    line = copy.deepcopy(LINES[form])
    for _ in range(draw.randint(0, 3)):
        inner: Any = line
        while deeper := [value for value in (inner.values() if isinstance(inner, dict) else inner) if _is_box(value)]:
            if draw.random() < 0.3:
                break
            inner = draw.choice(deeper)
        places = sorted(inner, key=str) if isinstance(inner, dict) else list(range(len(inner)))
        if not places:
            continue
        place, edit = draw.choice(places), draw.randrange(4)
        if edit == 0:
            del inner[place]
        elif edit == 1 and isinstance(inner, dict):
            inner[draw.choice(KEYS)] = inner.pop(place)
        elif edit == 1:
            inner.insert(draw.choice(places), copy.deepcopy(inner[place]))
        else:
            inner[place] = copy.deepcopy(draw.choice(VALUES))
    return line


def write(draw: Random, kind: str, directory: Path) -> Path:
    """A file of a kind with one hostile line among sound ones, of damaged bytes, or with the name of the other kind."""
    form = kind.removesuffix(".parquet")
    lines = [LINES[form]] * draw.randint(0, 3) + [hostile(draw, form)] + [LINES[form]] * draw.randint(0, 1)
    names, content = ["chats.parquet", "chats.jsonl"], None
    if kind == form:
        content = "\n".join(json.dumps(line, default=repr) for line in lines).encode()
    elif draw.random() < 0.6:
        content = _table(draw, lines)
    if content is None:  # rows that no table can hold together, or bytes that are damaged
        content = _table(draw, [LINES[form]] * 3)
    if draw.random() < (0.1 if kind == form else 0.5):
        content = _damaged(draw, content)
    path = directory / names[(kind == form) ^ (draw.random() < 0.05)]
    path.write_bytes(content)
    return path


def outcome(path: Path) -> str:
    """What `prepare` makes of a file: "kept", "skipped" where lines are left out, or "refused", in one line."""
    try:
        source = open_input(path, "auto", 0.5, None)
        items = list(source)
    except UserError as error:
        _check(error, f"{path}")
        return "refused"
    tokenizer = make_tokenizer(None if source.format == "text" else "control")
    stop, skip = (Encoder(source.format, tokenizer, 128, 0, bad_items=bad) for bad in ("stop", "skip"))
    encoded, ledger = skip.encode(items)
    made = ledger.kept + ledger.left_out.total()
    if source.format in (CONVERSATIONS, PREFERENCE):
        per_item = 2 if source.format == PREFERENCE else 1
        assert sum(part.lengths.size for part in encoded.values()) == per_item * ledger.kept
        assert ledger.read.total() == len(items) == ledger.skipped.total() + made
        assert ledger.forms.total() == made
    try:
        stop.encode(items)
        assert not ledger.bad
    except UserError as error:
        _check(error, f"{path}:")
        assert ledger.bad and str(error).startswith(ledger.bad[0])
    return "skipped" if ledger.bad else "kept"


def _check(error: UserError, place: str) -> None:
    message = str(error)
    assert place in message and "\n" not in message and len(message) < 2000


def _is_box(value: object) -> bool:
    return isinstance(value, dict | list) and bool(value)


def _table(draw: Random, rows: list[Any]) -> bytes | None:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    try:
        table = pyarrow.Table.from_pylist(rows)
        settings = {"compression": draw.choice(["none", "snappy", "zstd"]), "use_dictionary": draw.random() < 0.5}
        pyarrow.parquet.write_table(table, sink, row_group_size=draw.randint(1, 9), **settings)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
        return None
    return sink.getvalue().to_pybytes()


def _damaged(draw: Random, content: bytes) -> bytes:
    """Cut short, or with a few bytes changed, at the end more often than elsewhere."""
    if draw.random() < 0.3:
        return content[: draw.randrange(1, len(content))]
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        first = draw.choice([0, len(content) // 2, max(len(content) - 600, 0)])
        changed[draw.randrange(first, len(content))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
    return bytes(changed)
