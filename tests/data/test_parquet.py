"""Parquet files: the same conversations and texts as in JSON lines and text files, a few rows at a time."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tinysft_jax.console import UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.reading import MAX_BYTES
from tinysft_jax.data.sources import open_input

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TURNS = [{"role": "user", "content": "Hé"}, {"role": "assistant", "content": "Ho", "weight": 1}]
PARTS = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
LINES = {
    "chat-jsonl": [{"messages": TURNS, "id": 1}, {"messages": TURNS * 2, "id": 2}],
    "parts": [{"messages": PARTS}, {"messages": PARTS * 2}],
    "pairs": [{"prompt": f"Hi {i}", "completion": "Ho"} for i in range(150)],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": None}],
    "alpaca": [
        {"instruction": "I", "input": None, "output": "O"},
        {"instruction": "I", "input": "i", "output": "O", "system": "S"},
    ],
    "mixed": [{"prompt": "Hi", "completion": "Ho"}, {"instruction": "I", "output": "O"}, {"messages": TURNS}],
}


def write(path: Path, rows: list[dict] | pa.Table, **settings) -> Path:
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, path, **settings)
    return path


def run(path: Path, *flags: str) -> tuple[dict, dict, list[np.ndarray]]:
    """`data.json`, the ledger of the training split, and its arrays."""
    output = path.with_name(f"{path.name}.data")
    main = [f"--input={path}", f"--output={output}", "--workers=1", "--bpe_ranks=256", "--valid_fraction=0"]
    prepare.main([*main, "--overwrite", *flags])
    arrays = [np.load(output / "train" / f"{name}-00000.npy") for name in ("tokens", "supervised", "offsets")]
    ledger = json.loads((output / "ledger.json").read_text())["splits"]["train"]
    return json.loads((output / "data.json").read_text()), ledger, arrays


def items(path: Path, format: str = "auto", limit: int | None = None) -> list:
    return list(open_input(path, format, 0.0, limit))


@pytest.mark.parametrize("form", LINES)
def test_rows_give_what_lines_give(tmp_path: Path, form):
    lines = tmp_path / "chats.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in LINES[form]))
    expected, expected_ledger, expected_arrays = run(lines)
    columns = {key: [line.get(key) for line in LINES[form]] for line in LINES[form] for key in line}
    large = [pa.large_string() if name in ("prompt", "instruction", "output") else None for name in columns]
    tables = [
        pa.table(columns),
        pa.table({name: pa.array(columns[name], type) for name, type in zip(columns, large, strict=True)}),
    ]
    for table in tables:
        description, ledger, arrays = run(write(tmp_path / "chats.parquet", table, row_group_size=40))
        assert description["format"] == expected["format"] and ledger == expected_ledger
        assert all(np.array_equal(*pair) for pair in zip(arrays, expected_arrays, strict=True))


def test_rows_know_their_number_and_how_far_they_are(tmp_path: Path):
    path = write(tmp_path / "chats.parquet", LINES["pairs"], row_group_size=60)
    source = open_input(path, "auto", 0.0, None)
    found, positions = zip(*((item, source.position) for item in source), strict=True)
    assert [item.where for item in found] == [f"{path}:row {i}" for i in range(1, 151)]
    assert sorted(positions) == [*positions] and positions[74] == source.size // 2 and source.position == source.size
    assert len(items(path, limit=70)) == 70
    write(path, [*LINES["pairs"][:99], {"prompt": "Hi", "completion": ""}, *LINES["pairs"]], row_group_size=60)
    with pytest.raises(UserError, match=r"chats\.parquet:row 100: completion is empty"):
        run(path)
    assert list(tmp_path.iterdir()) == [path]
    _, ledger, _ = run(path, "--bad_lines=skip")
    assert ledger["skipped"] == {"not a conversation": 1} and ledger["forms"] == {"chat-jsonl": 249}


def test_a_pair_and_a_single_file_are_split_as_others_are(tmp_path: Path):
    for name, rows in (("train", LINES["pairs"][:5]), ("valid", LINES["pairs"][5:7])):
        write(tmp_path / f"a-{name}.parquet", rows)
    assert [item.split for item in items(tmp_path)] == ["train"] * 5 + ["valid"] * 2
    path = write(tmp_path / "all.parquet", LINES["pairs"])
    before = {item.text: item.split for item in open_input(path, "auto", 0.3, None)}
    assert set(before.values()) == {"train", "valid"}
    write(path, LINES["pairs"][::-1], row_group_size=7)
    assert before == {item.text: item.split for item in open_input(path, "auto", 0.3, None)}


def test_columns_that_are_not_read_are_counted_in_the_order_of_the_file(tmp_path: Path):
    columns = {key: [row[key] for row in LINES["pairs"]] for key in ("prompt", "completion")}
    unreadable = pa.array([2**62] * 150).cast(pa.timestamp("ms"))
    path = write(tmp_path / "chats.parquet", pa.table(dict.fromkeys("zyxab", unreadable) | columns))
    assert run(path)[1]["unread_fields"] == dict.fromkeys("abxyz", 150)
    # The division into splits is of this text.
    assert items(path)[0].text.startswith('{"z": 0, "y": 0, "x": 0, "a": 0, "b": 0, "prompt": "Hi 0"')


ALL = 'has no columns "messages", or "prompt" and "completion", or "conversations", or "instruction" and "output", but'
WRONG_COLUMNS = [
    ("auto", {"question": ["Q"], "answer": ["A"]}, f"{ALL} \\['question', 'answer'\\]$"),
    ("auto", {"instruction": ["I"], "input": ["i"]}, f"{ALL} \\['instruction', 'input'\\]$"),
    ("auto", {f"{'x' * 500}{i}\n": [1] for i in range(50)}, ALL),
    (
        "alpaca",
        LINES["sharegpt"],
        "has no columns \"instruction\" and \"output\", but \\['conversations', 'system'\\]$",
    ),
    ("sharegpt", LINES["alpaca"], 'has no columns "conversations", but'),
    ("chat-jsonl", {"prompt": ["P"], "text": ["T"]}, 'has no columns "messages", or "prompt" and "completion", but'),
]


@pytest.mark.parametrize(("format", "columns", "complaint"), WRONG_COLUMNS)
def test_wrong_columns_are_refused_before_anything_is_read(tmp_path: Path, format, columns, complaint):
    write(tmp_path / "a-train.parquet", [{"messages": [], "conversations": [], "instruction": "", "output": ""}])
    valid = write(tmp_path / "a-valid.parquet", columns if isinstance(columns, list) else pa.table(columns))
    for path in (valid, tmp_path):
        with pytest.raises(UserError, match=rf"a-valid\.parquet {complaint}") as caught:
            open_input(path, format, 0.1, None)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("format", ["text", "tinystories-instruct"])
def test_texts_and_stories_are_not_read_from_parquet(tmp_path: Path, format):
    with pytest.raises(UserError, match=rf"a\.parquet: a parquet file is read as conversations, not as {format}$"):
        open_input(write(tmp_path / "a.parquet", [{"text": "Once"}]), format, 0.1, None)


WRONG_TYPES = [
    ({"instruction": ["I"], "output": [3]}, "output must be a string, not int"),
    ({"instruction": ["I"], "output": [b"O"]}, "output must be a string, not dict"),
    ({"instruction": ["I"], "output": pa.array([None], pa.string())}, "a line must be an object with"),
    ({"messages": ['[{"role": "user"}]']}, "messages must be a list"),
    ({"messages": [{"role": "user"}]}, "messages must be a list"),
    (
        {"conversations": pa.array([[("human", "Q")]], pa.map_(pa.string(), pa.string()))},
        r"conversations\[0\] must be an",
    ),
]


@pytest.mark.parametrize(("columns", "complaint"), WRONG_TYPES)
def test_columns_of_other_types_are_refused_at_their_first_row(tmp_path: Path, columns, complaint):
    path = write(tmp_path / "a.parquet", pa.table(columns))
    with pytest.raises(UserError, match=rf"a\.parquet:row 1: {complaint}"):
        run(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_cut_short_or_damaged_leaves_nothing(tmp_path: Path):
    path = write(tmp_path / "chats.parquet", LINES["pairs"], compression="none", use_dictionary=False)
    whole = path.read_bytes()
    for end in (*range(1, len(whole), len(whole) // 7), len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"^can't read .*chats\.parquet \(is it whole\?\): "):
            run(path)
    start = whole.index(b"Hi 100") - 4  # a length, which now reaches beyond the page
    path.write_bytes(whole[:start] + b"\xff\xff\xff\x00" + whole[start + 4 :])
    with pytest.raises(UserError, match=r"^can't read .*chats\.parquet \(is it whole\?\): "):
        run(path, "--bad_lines=skip")
    path.write_bytes(whole.replace(b"prompt", b"promp\xff"))
    with pytest.raises(UserError, match=r"^can't read .*chats\.parquet \(is it whole\?\): "):
        run(path)
    write(path, LINES["pairs"], compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"Hi 100", b"Hi 1OO"))
    with pytest.raises(UserError, match=r"^can't read .*chats\.parquet \(is it whole\?\): .*checksum"):
        run(path)
    write(path, pa.table({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}))
    with pytest.raises(UserError, match="nothing is left to learn from"):
        run(path)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_can_not_be_read_are_named_or_skipped(tmp_path: Path):
    outputs = pa.array([b"O", b"caf\xe9", b"x" * MAX_BYTES, b"O"]).view(pa.string())
    dates = pa.array([None, None, None, 2**62]).cast(pa.timestamp("ms"))
    path = write(tmp_path / "a.parquet", pa.table({"instruction": ["I"] * 4, "output": outputs, "input": dates}))
    with pytest.raises(UserError, match=r"a\.parquet:row 2: not UTF-8 text"):
        run(path, "--limit=2", "--bad_lines=stop")
    flaws = [item.flaw for item in items(path)]
    assert flaws == [None, "not UTF-8 text", "longer than 8 MiB", "a value that can't be read"]


def test_a_large_file_is_never_all_in_memory(tmp_path: Path):
    text = np.random.default_rng(0).integers(97, 123, 32 << 20, np.uint8).tobytes().decode()
    rows = [{"prompt": "Hi", "completion": text[start : start + 8192]} for start in range(0, len(text), 8192)]
    # Pages of about a megabyte.
    path = write(tmp_path / "chats.parquet", rows, compression="none", use_dictionary=False, write_batch_size=16)
    assert pq.ParquetFile(path).num_row_groups == 1
    del rows
    before, highest = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for item in open_input(path, "auto", 0.0, None):
        assert len(item.text) > 8192
        highest = max(highest, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < highest < 8 << 20 and peak < 8 << 20


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path):
    path = write(tmp_path / "chats.parquet", LINES["pairs"] * 5)
    manifests = []
    for workers in ("1", "2"):
        run(path, f"--workers={workers}", "--valid_fraction=0.2")
        manifests.append((tmp_path / "chats.parquet.data" / "manifest.json").read_text())
    assert manifests[0] == manifests[1]
