"""Models in the forms that transformers reads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask a server

from pathlib import Path

import pytest
from tiny_model import make_model_directory

from tinysft_jax.interop.huggingface import write_huggingface
from tinysft_jax.model_directory import read_model


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """A tiny chat model with control tokens, as a Hugging Face folder; beside it `model`, what it was made from."""
    directory = tmp_path_factory.mktemp("chat")
    folder = directory / "huggingface"
    folder.mkdir()
    description, params = read_model(make_model_directory(directory / "model", "control"))
    write_huggingface(folder, params, description)
    return folder
