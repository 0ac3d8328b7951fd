"""Models of Hugging Face's families: what transformers computes from a folder is what comes out here, and back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES, FAMILIES, MORE, random_model, save
from flax import nnx
from safetensors.numpy import load_file
from tiers import slow
from tiny_model import make_tokenizer, save_model

import tinysft_jax as tsft
from tinysft_jax.checkpoints import open_model
from tinysft_jax.conversion.families import read_config
from tinysft_jax.conversion.huggingface import read_huggingface, rounded, write_huggingface
from tinysft_jax.conversion.names import huggingface_layout
from tinysft_jax.conversion.parity import measure_parity
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, make_model, pad_vocabulary, trim_vocabulary

torch = pytest.importorskip("torch")


def tokens_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(97, size=shape, dtype=np.int32)


@pytest.mark.parametrize("case", [*CASES, *slow(*MORE)])
def test_logits_and_gradients_are_those_of_transformers(make_family, case):
    made, tokens = make_family(case), tokens_of(2, 64)
    config = made.description.config
    inputs = torch.from_numpy(tokens).long()
    made.model.zero_grad()
    theirs = made.model(inputs, labels=inputs)  # the mean of the cross-entropy of each next token
    theirs.loss.backward()

    graph, _ = nnx.split(make_model(config, made.params, dtype=jnp.float32))

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean(), logits

    params = jax.tree.map(jnp.asarray, made.params)
    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, theirs.logits.detach().numpy(), rtol=0, atol=1e-4)
    assert np.ptp(logits) > 5, "not so small that any would be close"
    assert float(value) == pytest.approx(theirs.loss.item(), abs=1e-5)

    grads = trim_vocabulary(jax.tree.map(np.asarray, grads), config)
    views = huggingface_layout(config).views(grads, config.n_layers)
    expected = {name: parameter.grad.numpy() for name, parameter in made.model.named_parameters()}
    assert views.keys() == expected.keys()
    for name, view in views.items():
        largest = np.abs(expected[name]).max()
        assert largest > 0
        np.testing.assert_allclose(view, expected[name], rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize("case", [*CASES, *slow(*MORE)])
def test_greedy_tokens_are_those_of_transformers(make_family, case):
    made, prompts = make_family(case), tokens_of(4, 8)
    model = make_model(made.description.config, made.params, dtype=jnp.float32)
    ours = tsft.generate(model, prompts.tolist(), max_new_tokens=50, temperature=0)
    inputs = torch.from_numpy(prompts).long()
    theirs = made.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=50, pad_token_id=0
    )
    assert ours == theirs[:, 8:].tolist()
    assert {len(ids) for ids in ours} == {50} and len({id for ids in ours for id in ids}) > 5


def rewrite(folder: Path, tmp_path: Path, dtype: str = "float32") -> Path:
    """Folder → model directory → folder."""
    description, params = read_huggingface(folder)
    save_model(tmp_path / "model", params, description)
    description, params = open_model(tmp_path / "model")
    (tmp_path / "folder").mkdir()
    write_huggingface(tmp_path / "folder", params, description, dtype)
    return tmp_path / "folder"


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("case", ["llama", *slow("qwen2", "qwen3", "stablelm", *MORE)])
def test_a_folder_comes_back_bit_by_bit(make_family, tmp_path, case):
    made = make_family(case)
    back = rewrite(made.folder, tmp_path)
    assert_same_bits(load_file(back / "model.safetensors"), load_file(made.folder / "model.safetensors"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (made.folder, back))
    assert (after["architectures"], after["model_type"]) == (before["architectures"], before["model_type"])
    assert read_config(after) == read_config(before) == made.description.config
    # Its config.json says the same to transformers, of this version and of those that know no rope_parameters.
    model = make_model(made.description.config, made.params, dtype=jnp.float32)
    assert measure_parity(model, back).holds
    del after["rope_parameters"]
    (back / "config.json").write_text(json.dumps(after))
    assert measure_parity(model, back).holds
    assert read_config(after) == made.description.config


@pytest.mark.parametrize("case", [*FAMILIES[:1], *slow(*FAMILIES[1:])])
def test_a_folder_in_bfloat16_comes_back_bit_by_bit(case, tmp_path):
    """In several files."""
    family, changes = CASES[case]
    folder = save(random_model(family, **changes), tmp_path / "source", "bfloat16", max_shard_size="20KB")
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    back = rewrite(folder, tmp_path, "bfloat16")
    assert_same_bits(load_file(back / "model.safetensors"), {name: each[name] for each in shards for name in each})
    content = json.loads((back / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["qwen2", *slow("llama", "qwen3", "stablelm")])
def test_a_folder_in_float16_is_read_exactly(case, tmp_path):
    family, changes = CASES[case]
    folder = save(random_model(family, **changes), tmp_path / "source", "float16")
    theirs, ours = (load_file(each / "model.safetensors") for each in (folder, rewrite(folder, tmp_path)))
    assert_same_bits({name: tensor.astype(np.float32) for name, tensor in theirs.items()}, ours)


@pytest.mark.parametrize("case", ["qwen3", *slow("llama", "qwen2", "stablelm")])
def test_what_is_written_in_bfloat16_is_the_rounded_model(make_family, tmp_path, case):
    made = make_family(case)
    write_huggingface(tmp_path, made.params, made.description, "bfloat16")
    params = rounded(made.params, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, read_huggingface(tmp_path)[1], params)
    config = made.description.config
    assert measure_parity(make_model(config, params, dtype=jnp.float32), tmp_path).holds
    assert not measure_parity(make_model(config, made.params, dtype=jnp.float32), tmp_path).holds


def test_a_pad_token_has_a_row_in_both_tables(tmp_path):
    """Of a model with this package's tokenizer and an untied head; as ever, only in the folder."""
    config = GPTConfig(260, dim=32, n_layers=1, n_heads=2, max_seq_len=64, norm="rms", tied_head=False)
    params = trim_vocabulary(nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(0)))), config)
    params = pad_vocabulary(jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, params), config)
    description = ModelDescription(config, **make_tokenizer("control").description(), source={})
    write_huggingface(tmp_path, params, description)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape == (261, 32)
        np.testing.assert_allclose(tensors[name][260], tensors[name][:260].mean(axis=0), atol=1e-6)
    again, read = read_huggingface(tmp_path)
    assert (again.config, again.tokenizer) == (config, description.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert measure_parity(make_model(config, params, dtype=jnp.float32), tmp_path).holds
