"""The code that the documents give does what they say."""

import re
from pathlib import Path

import pytest
from tiny_model import make_model_directory

DOCS = Path(__file__).parents[2] / "docs"


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def test_model_directory_is_read_with_orbax_and_json(tmp_path, monkeypatch, capsys):
    make_model_directory(tmp_path / "runs" / "sft" / "model", "control")
    monkeypatch.chdir(tmp_path)
    code = code_blocks("export.md")[2]
    assert "tinysft" not in code
    names = {}
    exec(code, names)
    assert "(2, 32, 32)" in capsys.readouterr().out
    assert names["params"]["tok_emb"]["embedding"].shape == (260, 32)


def test_chat_through_transformers(tmp_path, chat_folder, monkeypatch, capsys):
    pytest.importorskip("torch")
    (tmp_path / "stories").symlink_to(chat_folder)
    monkeypatch.chdir(tmp_path)
    chat = code_blocks("export.md")[0]
    exec(chat.replace("model.generate(", "model.generate(max_new_tokens=5, "), {})
    assert capsys.readouterr().out.strip()
