import json

import pytest

from tinysft_jax.console import UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.store import PreparedData
from tinysft_jax.sampling.chat import load_transcript, save_transcript

# With a line separator that is no end of a line in JSON.
TRANSCRIPT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Who\u2028 is "Mia"?'},
    {"role": "assistant", "content": "A girl\nwith a kite…"},
    {"role": "user", "content": "And Leo?"},
    {"role": "assistant", "content": "Her friend."},
]


def test_what_is_saved_is_loaded(tmp_path):
    save_transcript(tmp_path / "chat.jsonl", TRANSCRIPT)
    assert load_transcript(tmp_path / "chat.jsonl") == TRANSCRIPT
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


@pytest.mark.parametrize("content", [{"messages": TRANSCRIPT}, [{"messages": TRANSCRIPT}]], ids=["object", "array"])
def test_other_layouts_of_one_conversation_are_loaded(tmp_path, content):
    (tmp_path / "chat.json").write_text("\ufeff" + json.dumps(content, indent=2), encoding="utf-8")
    assert load_transcript(tmp_path / "chat.json") == TRANSCRIPT


def test_weights_are_kept_and_matter_to_training_alone(tmp_path):
    weighted = [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in TRANSCRIPT]
    save_transcript(tmp_path / "chat.jsonl", weighted)
    assert load_transcript(tmp_path / "chat.jsonl") == weighted


def test_parts_of_text_are_joined(tmp_path):
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in TRANSCRIPT]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": parts}))
    assert load_transcript(tmp_path / "chat.jsonl") == TRANSCRIPT


def test_prepare_reads_what_is_saved(tmp_path):
    save_transcript(tmp_path / "chat.jsonl", TRANSCRIPT)
    output = tmp_path / "data"
    options = ["--format=chat-jsonl", "--valid_fraction=0", "--workers=1", "--bpe_ranks=256"]
    prepare.main([f"--input={tmp_path / 'chat.jsonl'}", f"--output={output}", *options])
    split = PreparedData(output).split("train")
    assert len(split) == 1 and split.conversation(0)[1].sum() == len("A girl\nwith a kite…Her friend.".encode()) + 2


def test_a_file_is_only_replaced_on_demand(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        save_transcript(path, TRANSCRIPT)
    assert path.read_text() == "mine"
    save_transcript(path, TRANSCRIPT, overwrite=True)
    assert load_transcript(path) == TRANSCRIPT


@pytest.mark.parametrize("name", ["missing/chat.jsonl", "a\0b", "x" * 300])
def test_where_nothing_can_be_written(tmp_path, name):
    with pytest.raises(UserError, match="can't write"):
        save_transcript(tmp_path / name, TRANSCRIPT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"{",
        b"[" * 100_000,
        b"\xff",
        b'{"text": "no chat"}',
        json.dumps({"messages": TRANSCRIPT[:2]}).encode(),
        json.dumps([{"messages": TRANSCRIPT}] * 2).encode(),
        2 * (json.dumps({"messages": TRANSCRIPT}).encode() + b"\n"),
    ],
    ids=lambda content: str(content[:20]),
)
def test_files_without_a_conversation_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"chat\.jsonl") as error:
        load_transcript(path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="can't read"):
            load_transcript(path)
