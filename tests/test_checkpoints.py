import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from tinysft_jax.checkpoints import load_description, load_model, load_params, save_model
from tinysft_jax.console import UserError
from tinysft_jax.model import GPT, GPTConfig
from tinysft_jax.parameters import ModelDescription

CONFIG = GPTConfig(vocab_size=260, dim=16, n_layers=2, n_heads=2, max_seq_len=32)
DESCRIPTION = ModelDescription(CONFIG, "control", {"kind": "gpt2", "bpe_ranks": 256}, {"kind": "random"})


@pytest.fixture(scope="module")
def params():
    return nnx.to_pure_dict(nnx.state(GPT(CONFIG, rngs=nnx.Rngs(0))))


@pytest.fixture
def saved(tmp_path, params):
    save_model(tmp_path / "model", params, DESCRIPTION)
    return tmp_path / "model"


def edit_model_json(path, **changes):
    content = json.loads((path / "model.json").read_text()) | changes
    (path / "model.json").write_text(json.dumps(content))


def test_what_is_saved_is_loaded(saved, params):
    assert load_description(saved) == DESCRIPTION
    jax.tree.map(np.testing.assert_array_equal, load_params(saved, CONFIG), params)
    assert load_model(saved).config == CONFIG


def test_version_1_is_read(fixtures):
    """Written by version 0.1.0; each array counts from 0."""
    description = load_description(fixtures / "model_version_1")
    assert description.chat_template == "control" and description.trained_length == 32
    params = load_params(fixtures / "model_version_1", description.config)
    embedding = params["tok_emb"]["embedding"]
    assert not embedding[260:].any()
    params["tok_emb"]["embedding"] = embedding[:260]
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf.ravel(), np.arange(leaf.size)), params)


def test_padding_rows_are_not_stored(saved):
    from orbax.checkpoint import v1 as ocp

    assert ocp.metadata(saved / "params").metadata["tok_emb"]["embedding"].shape == (260, 16)


def test_an_existing_directory_is_not_replaced_unasked(saved, params):
    before = (saved / "model.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="--overwrite"):
        save_model(saved, params, DESCRIPTION)
    assert (saved / "model.json").stat().st_mtime_ns == before
    save_model(saved, params, DESCRIPTION, overwrite=True)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format_version": 2}, "upgrade"),
        ({"format_version": "1"}, "no format_version"),
        ({"model": {"vocab_size": 260}}, "exactly the keys"),
        ({"model": [1]}, r"model is \[1\]; it must be an object"),
        ({"chat_template": "llama"}, "chat_template"),
        ({"trained_length": 33}, "trained_length is 33; it must be from 1 to the context, 32"),
        ({"trained_length": "long"}, "trained_length is 'long'"),
    ],
)
def test_a_description_that_cannot_be_is_refused(saved, changes, complaint):
    edit_model_json(saved, **changes)
    with pytest.raises(UserError, match=complaint):
        load_model(saved)


def test_parameters_of_another_shape_are_named(saved):
    shape = json.loads((saved / "model.json").read_text())["model"]
    edit_model_json(saved, model=shape | {"dim": 32})
    with pytest.raises(UserError, match=r"blocks.attn.wk.kernel is float32\[2, 16, 16\], not float32\[2, 32, 32\]"):
        load_model(saved)


def test_missing_parts_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    shutil.rmtree(saved / "params")
    with pytest.raises(UserError, match="params"):
        load_model(saved)
    (saved / "model.json").unlink()
    with pytest.raises(UserError, match=r"no model.json"):
        load_model(saved)
