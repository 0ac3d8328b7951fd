"""Models in the forms that transformers reads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask a server

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import make_model_directory

from tinysft_jax.checkpoints import open_model
from tinysft_jax.conversion.huggingface import write_huggingface
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription
from tinysft_jax.tokenizer import ChatTokenizer


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """A tiny chat model with control tokens, as a Hugging Face folder; beside it `model`, what it was made from."""
    directory = tmp_path_factory.mktemp("chat")
    folder = directory / "huggingface"
    folder.mkdir()
    description, params = open_model(make_model_directory(directory / "model", "control"))
    write_huggingface(folder, params, description)
    return folder


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory) -> Callable[..., Path]:
    """Makes folders of the smallest model there is, with any tokenizer, and with rows that have no meaning to it."""
    made = {}

    def make(template: str | None, bpe_ranks: int, unused: int = 0) -> Path:
        if (template, bpe_ranks, unused) not in made:
            tokenizer = ChatTokenizer(template, bpe_ranks)
            config = GPTConfig(vocab_size=tokenizer.vocab_size + unused, dim=2, n_layers=1, n_heads=1)
            params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0)))))
            made[template, bpe_ranks, unused] = folder = tmp_path_factory.mktemp("folder")
            write_huggingface(folder, params, ModelDescription(config, **tokenizer.description(), source={}))
        return made[template, bpe_ranks, unused]

    return make


@pytest.fixture(scope="session")
def make_family(tmp_path_factory) -> Callable:
    """Makes one of `families.CASES` or `families.MORE`: a random model of transformers, and what it was read as."""
    import families  # with torch, which the other tests here do without

    return functools.cache(lambda case: families.make(case, tmp_path_factory.mktemp("family")))
