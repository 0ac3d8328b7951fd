"""Tiny models: one of each family, and one that generates letters, in an order that random weights decide."""

import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from tinysft_jax import files
from tinysft_jax.checkpoints import write_model
from tinysft_jax.gpt_config import GPTConfig, RopeScaling
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, Params, make_model
from tinysft_jax.sampling.decode import Decoder
from tinysft_jax.tokenizer import ChatTokenizer

# Of the four frequencies of heads of 8, this stretches two, leaves one alone, and one is in between.
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=128)

# What differs from the PyTorch project's model. "everything" has all options at once: the quick tests are about it.
# The epsilons are large, so that one that is not used shows.
FAMILIES = {
    "default": {},
    "llama": {"n_heads": 4, "n_kv_heads": 2, "norm": "rms", "tied_head": False, "rope_scaling": SCALING},
    "qwen2": {"n_heads": 4, "n_kv_heads": 2, "norm": "rms", "norm_epsilon": 1e-3, "qkv_bias": True},
    "qwen3": {"n_heads": 4, "n_kv_heads": 1, "head_dim": 16, "norm": "rms", "norm_epsilon": 1e-3, "qk_norm": True},
}
FAMILIES["everything"] = FAMILIES["llama"] | FAMILIES["qwen2"] | FAMILIES["qwen3"] | {"n_kv_heads": 2}
OTHERS = ("llama", "qwen2", "qwen3")  # for the slow tier

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def family(name: str, **changes) -> GPTConfig:
    shape = {"vocab_size": 260, "dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128}
    return GPTConfig(**shape | FAMILIES[name] | changes)


def random_params(config: GPTConfig, deviation: float = 0.1) -> Params:
    """No parameter is trivial: a norm's scales are not 1, and biases not 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, deviation, leaf.shape).astype(np.float32), _initial(config))


@functools.cache
def _initial(config: GPTConfig) -> Params:
    """As NumPy arrays, which are on no device: a mesh of others would refuse them."""
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0)))))


def random_model(config: GPTConfig, deviation: float = 0.1, **options) -> GPT:
    return make_model(config, random_params(config, deviation), **options)


def make_tokenizer(template: str | None) -> ChatTokenizer:
    """A token a byte."""
    return ChatTokenizer(template, bpe_ranks=256)


def make_params(config: GPTConfig, ends: bool) -> dict:
    """Random parameters with which all but letters, and with `ends` end-of-text, are most unlikely."""
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(
        lambda leaf: np.array(rng.normal(0, 0.5, leaf.shape) if leaf.ndim > 2 else leaf, np.float32), params
    )
    # The head reads a constant in the first place, and elsewhere with signs at random: else each token would be
    # followed by itself.
    params["ln_f"]["scale"] *= rng.choice([-1, 1], config.dim)
    params["ln_f"]["scale"][0], params["ln_f"]["bias"][0] = 0, 10
    table = params["tok_emb"]["embedding"]
    table[:] = rng.normal(0, 1, table.shape)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    tokenizer = make_tokenizer("control")
    table[:, 0] = -2
    table[tokenizer.encode_text(LETTERS) + ([tokenizer.eot_id] if ends else []), 0] = 2
    return params


def make_config(context: int = 256) -> GPTConfig:
    return GPTConfig(vocab_size=260, dim=32, n_layers=2, n_heads=2, max_seq_len=context)


def make_decoder(ends: bool = True) -> Decoder:
    return Decoder(make_config(), make_params(make_config(), ends), np.dtype("float32"))


def save_model(path: Path, params: Params, description: ModelDescription, overwrite: bool = False) -> None:
    with files.new_directory(path, overwrite) as directory:
        write_model(directory, params, description)


def make_model_directory(path: Path, template: str | None, context: int = 256, ends: bool = False) -> Path:
    config, language = make_config(context), make_tokenizer(template).description()
    description = ModelDescription(config, language["chat_template"], language["tokenizer"], {})
    save_model(path, make_params(config, ends), description)
    return path


def decoder_of(model: GPT, dtype=None, mesh=None) -> Decoder:
    params = nnx.to_pure_dict(nnx.state(model))
    return Decoder(model.config, params, dtype or model.dtype, model.trained_length, mesh)
