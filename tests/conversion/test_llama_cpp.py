"""llama.cpp opens the files that are written, and computes what this package computes."""

import dataclasses
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import own_tokenizers
import pytest
from llama_cpp import LlamaCpp
from tiers import slow
from tiny_model import decoder_of, family, random_params

from tinysft_jax.conversion.gguf import read_gguf, write_gguf
from tinysft_jax.conversion.gguf_file import read_gguf_file
from tinysft_jax.parameters import ModelDescription, make_model
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.tokenizer import ChatTokenizer

gguf = pytest.importorskip("gguf")

TOKENS = 30
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi <b> é"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "Tim's 12 dogs"},
]
# Family, and the template of the project's own tokenizer or the kind of another model's.
MODELS = ["default text", "llama smollm2", "llama tinyllama", "qwen2 qwen3", "qwen3 llama3"]


def make_tokenizer(kind: str, folder: Path) -> ChatTokenizer:
    own = kind in ("control", "text")
    return ChatTokenizer(kind, bpe_ranks=3000) if own else own_tokenizers.make_tokenizer(kind, folder)


@pytest.mark.parametrize("model", ["default control", *slow(*MODELS)])
def test_llama_cpp_runs_a_file(tmp_path, model):
    """Ten prompts continue alike, greedily; texts and conversations have the same ids."""
    name, kind = model.split()
    tokenizer = make_tokenizer(kind, tmp_path / "folder")
    config = family(name, vocab_size=tokenizer.vocab_size, dim=64, n_heads=4, max_seq_len=256)
    description = ModelDescription(config, **tokenizer.description(), source={})
    description = dataclasses.replace(description, tokenizer_files=tokenizer.files)
    write_gguf(path := tmp_path / "a.gguf", params := random_params(config, 0.5), description, "A model")
    decoder, theirs, draw = decoder_of(make_model(config, params, dtype=jnp.float32)), LlamaCpp(path, 256), Random(0)
    special = set(tokenizer.bpe.special_ids.values())
    for length in range(1, 30, 3):
        prompt = [draw.randrange(config.vocab_size) for _ in range(length)]
        (ours,) = decoder.generate([np.array(prompt)], SamplingOptions(2 * TOKENS, 0.0), 1)
        found = theirs.greedy(prompt, 2 * TOKENS)
        # It ends with a special token; without one, what it keeps back are bytes that are no whole character.
        assert found == list(ours[: len(found)]) and (len(found) >= TOKENS or found[-1] in special)
    for text in own_tokenizers.mixed_texts(1000):
        assert theirs.encode(text) == tokenizer.encode_text(text)
    messages = [m for m in MESSAGES if m["role"] != "system"] if kind == "tinyllama" else MESSAGES
    prompt = theirs.encode(theirs.prompt(messages), special=True)
    assert prompt == tokenizer.encode_prompt(messages).tolist() or kind in ("text", "qwen3")


# Where the scales of a block are, in bytes, and how large they are here.
SCALES = {
    "Q4_K": {0: 3e-4, 2: 2e-3},
    "Q6_K": {208: 1e-4},
    "Q4_0": {0: 0.02},
    "Q4_1": {0: 0.02, 2: -0.15},
    "Q8_0": {0: 1e-3},
    "Q5_K": {0: 1e-4, 2: 2e-3},
    "Q3_K": {108: 1e-3},
    "F16": {},
    "BF16": {},
}


@pytest.mark.parametrize("encoding", ["Q4_K", "Q6_K", *slow(*list(SCALES)[2:])])
def test_blocks_of_random_bits(tmp_path, encoding):
    """An embedding of any bits, with small scales: our logits from what is decoded are llama.cpp's own.

    The other matrices are float32: by blocks llama.cpp multiplies activations that it rounds to eight bits.
    """
    tokenizer = make_tokenizer("control", tmp_path)
    config = family("llama", vocab_size=tokenizer.vocab_size, dim=256, mlp_ratio=2.0, max_seq_len=64)
    description = ModelDescription(config, **tokenizer.description(), source={})
    write_gguf(path := tmp_path / "a.gguf", random_params(config), description, "A model")
    randomize(path, gguf.GGMLQuantizationType[encoding])
    _, params = read_gguf(path)
    prompt = [5, 77, 2999, 0, 1024]
    logits = make_model(config, params, dtype=jnp.float32)(jnp.array([prompt]))[0, -1, : config.vocab_size]
    ours, theirs = jax.nn.log_softmax(logits), LlamaCpp(path, 64).log_probabilities(prompt, config.vocab_size)
    assert ours.std() > 0.5
    np.testing.assert_allclose(ours, [theirs[id] for id in range(config.vocab_size)], atol=1e-4)


def randomize(path: Path, encoding: "gguf.GGMLQuantizationType") -> None:
    """Writes a file again, with random bits in its embedding."""
    (pairs, tensors), rng = read_gguf_file(path), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), pairs.pop("general.architecture"))
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in pairs.items():
        kinds.get(type(value), writer.add_array)(key, value.tolist() if isinstance(value, np.ndarray) else value)
    for name, tensor in tensors.items():
        values = np.asarray(tensor)
        if is_embedding := name == "token_embd.weight":
            scales = SCALES[encoding.name]
            values = random_blocks(rng, values, encoding) if scales else gguf.quantize(values, encoding)
        writer.add_tensor(name, values, raw_dtype=encoding if is_embedding else tensor.encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def random_blocks(rng: np.random.Generator, values: np.ndarray, encoding: "gguf.GGMLQuantizationType") -> np.ndarray:
    values_per_block, size = gguf.GGML_QUANT_SIZES[encoding]
    blocks = rng.integers(0, 256, (values.size // values_per_block, size), np.uint8)
    for at, scale in SCALES[encoding.name].items():
        scales = (scale * rng.uniform(0.5, 1.5, (len(blocks), 1))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(len(values), -1)
