"""The code that the documents give does what they say."""

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_model import make_model_directory

DOCS = Path(__file__).parents[2] / "docs"


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def test_model_directory_is_read_with_orbax_and_json(tmp_path, monkeypatch, capsys):
    make_model_directory(tmp_path / "runs" / "sft" / "model", "control")
    monkeypatch.chdir(tmp_path)
    code = code_blocks("export.md")[3]
    assert "tinysft" not in code
    names = {}
    exec(code, names)
    assert "(2, 32, 32)" in capsys.readouterr().out
    assert names["params"]["tok_emb"]["embedding"].shape == (260, 32)


def test_chat_through_transformers_and_the_folder_for_llama_cpp(tmp_path, chat_folder, monkeypatch, capsys):
    pytest.importorskip("torch")
    (tmp_path / "stories").symlink_to(chat_folder)
    monkeypatch.chdir(tmp_path)
    chat, llama = code_blocks("export.md")[0], code_blocks("export.md")[2]
    exec(chat.replace("model.generate(", "model.generate(max_new_tokens=5, "), {})
    assert capsys.readouterr().out.strip()
    exec(llama, {})
    tensors = load_file("stories-llama/model.safetensors")
    assert (tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"]).all()
    assert (tmp_path / "stories-llama" / "tokenizer.json").exists()
