import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import save_model

from tinysft_jax.console import UserError
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, make_model, trim_vocabulary
from tinysft_jax.sharding import make_mesh
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.state import grow_vocabulary, make_steps, starting_model
from tinysft_jax.training.step import make_optimizer

PLAIN = GPTConfig(vocab_size=257, dim=16, n_layers=1, n_heads=2, max_seq_len=64)
BYTES = {"kind": "gpt2", "bpe_ranks": 256}
RANDOM = {"vocab_size": 0, "dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "mlp_ratio": 4.0}


def params_of(config):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0)))))


def saved(path, config=PLAIN, template=None, tokenizer=BYTES):
    save_model(path, params_of(config), ModelDescription(config, template, tokenizer, {"kind": "random"}))
    return str(path)


@pytest.mark.parametrize("tied_head", [True, False])
def test_control_tokens_start_as_the_mean_of_their_spellings(tied_head):
    """In the embedding, and in an untied head as well."""
    tokenizer, plain = ChatTokenizer("control", 256), dataclasses.replace(PLAIN, tied_head=tied_head)
    params = params_of(plain)
    config, grown = grow_vocabulary(plain, params, tokenizer)
    assert config.vocab_size == tokenizer.vocab_size == 260
    pieces = tokenizer.encode_text("<|user|>")
    for name in ("tok_emb",) if tied_head else ("tok_emb", "head"):
        old, new = params[name]["embedding"], grown[name]["embedding"]
        np.testing.assert_array_equal(new[:257], old[:257])
        np.testing.assert_allclose(new[tokenizer.control_ids["<|user|>"]], old[pieces].mean(axis=0), rtol=1e-6)
        assert np.all(new[260:] == 0) and len(new) == config.padded_vocab_size
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    before, after = (jax.jit(make_model(*model).__call__)(tokens) for model in ((plain, params), (config, grown)))
    np.testing.assert_allclose(before, after[..., :257], atol=1e-6)


def test_a_plain_model_learns_the_datas_template(chat_data, tmp_path):
    description, params = starting_model(saved(tmp_path / "model"), RANDOM, PreparedData(chat_data))
    assert (description.chat_template, description.tokenizer) == ("control", BYTES)
    assert description.config.vocab_size == 260
    assert trim_vocabulary(params, description.config)["tok_emb"]["embedding"].shape == (260, 16)
    assert description.source["init_from"] == "model"


def test_a_model_says_to_which_length_it_was_trained(chat_data, tmp_path):
    """The data's longest conversation, or the starting model's length if larger; of unknown training: its context."""
    data, path = PreparedData(chat_data), Path(saved(tmp_path / "model"))
    longest = int(data.split("train").lengths.max())
    content = json.loads((path / "model.json").read_text())
    for own, trained in ((longest - 1, longest), (longest + 1, longest + 1), (None, 64)):
        (path / "model.json").write_text(json.dumps(content | {"trained_length": own}))
        assert starting_model(str(path), RANDOM, data)[0].trained_length == trained
    assert longest < 63


def test_random_weights_take_the_datas_vocabulary(chat_data):
    description, params = starting_model("random", RANDOM, PreparedData(chat_data))
    assert params is None and description.config.vocab_size == 260
    with pytest.raises(UserError, match=r"model.vocab_size 100 is below the data's 260"):
        starting_model("random", RANDOM | {"vocab_size": 100}, PreparedData(chat_data))


@pytest.mark.parametrize(
    ("tokenizer", "template", "vocab_size", "complaint"),
    [
        ({"kind": "gpt2", "bpe_ranks": 300}, None, 301, "--bpe_ranks 300"),
        (None, None, 301, "names no tokenizer.*--bpe_ranks 300"),
        (BYTES, "text", 257, "prepare the data with --tokenizer"),
    ],
)
def test_a_model_of_another_language_is_refused(chat_data, tmp_path, tokenizer, template, vocab_size, complaint):
    config = GPTConfig(vocab_size=vocab_size, dim=16, n_layers=1, n_heads=2, max_seq_len=64)
    path = saved(tmp_path / "model", config, template, tokenizer)
    with pytest.raises(UserError, match=complaint):
        starting_model(path, RANDOM, PreparedData(chat_data))


def test_the_state_is_created_as_it_is_sharded():
    mesh = make_mesh(2, 2, 2)
    model = nnx.eval_shape(lambda: GPT(PLAIN, rngs=nnx.Rngs(0)))
    params = params_of(PLAIN)
    steps = make_steps(mesh, model, make_optimizer(1e-3, 0.01, 0.9, 0.95, 1.0), lambda step: jnp.float32(1e-3))
    for start in (params, None):
        state = steps.create(start, 0)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), steps.shapes
        )
        kernel = state["params"]["blocks"]["attn"]["wq"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (1, 8, 8)
        moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.shape == kernel.shape]
        assert len(moments) == 8 and all(leaf.addressable_shards[0].data.size == 64 for leaf in moments)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == steps.shardings
    # Random parameters follow from the seed, as those of a model made on one device do.
    np.testing.assert_allclose(kernel, params["blocks"]["attn"]["wq"]["kernel"], atol=1e-7)
