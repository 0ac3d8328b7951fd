"""Checkpoints that the PyTorch project reads as its own."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiers import slow
from tiny_model import make_model_directory, save_model
from torch_twin import TorchTwin, save

from tinysft_jax.checkpoints import load_model, open_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.conversion.names import TORCH, bare_name
from tinysft_jax.conversion.parity import measure_parity
from tinysft_jax.conversion.torch import LONGEST_CONTEXT, read_torch_checkpoint, write_torch_checkpoint
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import model_parameter_shapes

torch = pytest.importorskip("torch")


def write(path, description, params):
    write_torch_checkpoint(path, params, description)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["pretrained_small", "pretrained_compiled", "sft_small"])
def test_checkpoint_comes_back_bit_by_bit(fixtures, tmp_path, name):
    """From a model directory: every key in its place, buffers included, and all that the file says of itself."""
    before = torch.load(fixtures / f"{name}.pt", weights_only=True)
    description, params = read_torch_checkpoint(fixtures / f"{name}.pt")
    save_model(tmp_path / "model", params, description)
    after = write(tmp_path / "a.pt", *open_model(tmp_path / "model"))
    state = {bare_name(key): tensor for key, tensor in before["model_state_dict"].items()}
    assert list(after["model_state_dict"]) == list(state)
    for key, tensor in after["model_state_dict"].items():
        assert tensor.dtype == state[key].dtype and tensor.is_contiguous()
        assert torch.equal(tensor, state[key]), key
    rest = before.keys() - {"model_state_dict", "optimizer_state_dict"}
    assert {key: after[key] for key in rest} == {key: before[key] for key in rest}
    assert after.keys() == before.keys() and after["optimizer_state_dict"] == {}
    again, params_again = read_torch_checkpoint(tmp_path / "a.pt")
    assert (again.config, again.chat_template) == (description.config, description.chat_template)
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_features_are_reordered_head_by_head():
    config = GPTConfig(vocab_size=4, dim=12, n_layers=1, n_heads=2)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model_parameter_shapes(config))
    params["blocks"]["attn"]["wq"]["kernel"][:] = np.arange(12)
    tensors = TORCH.export_tensors(params, config)
    assert tensors["blocks.0.attn.wq.weight"][:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    jax.tree.map(np.testing.assert_array_equal, TORCH.import_tensors(tensors, config), params)


@pytest.mark.parametrize("hidden, theta, n_heads", [(64, 10000.0, 2), (41, 500.0, 4), (176, 123456.7, 1)])
def test_strict_load_state_dict_computes_the_same(tmp_path, hidden, theta, n_heads):
    shape = {"hidden": hidden, "theta": theta, "n_heads": n_heads, "max_seq_len": 40}
    twin, other = TorchTwin(**shape), TorchTwin(**shape, seed=1)
    content = write(tmp_path / "b.pt", *read_torch_checkpoint(save(twin.checkpoint(), tmp_path / "a.pt")))
    assert content["config"] == twin.config
    other.load_state_dict(content["model_state_dict"], strict=True)
    tokens = torch.randint(70, (2, 40))
    with torch.no_grad():
        # The table of angles is computed anew, and PyTorch's own formulas differ in the last bit.
        torch.testing.assert_close(other(tokens), twin(tokens), rtol=0, atol=2e-5)


def test_blocks_share_one_mask(tmp_path, fixtures):
    """A file of 12 layers and 1,024 positions would else be 50 MB larger."""
    write(tmp_path / "a.pt", *read_torch_checkpoint(fixtures / "pretrained_small.pt"))
    state = torch.load(tmp_path / "a.pt", weights_only=True)["model_state_dict"]
    assert len({state[f"blocks.{i}.attn.mask"].data_ptr() for i in range(3)}) == 1
    assert state["head.weight"].data_ptr() == state["tok_emb.weight"].data_ptr()


@pytest.mark.parametrize("template", ["text", *slow("control", None)])
def test_template_and_small_vocabulary_come_back(tmp_path, template):
    """The file names what the PyTorch project's own can't: its reader passes over the key."""
    directory = make_model_directory(tmp_path / "model", template)
    description, params = open_model(directory)
    content = write(tmp_path / "a.pt", description, params)
    assert content.get("model_type") == (None if template is None else "sft")
    assert content["step"] == 0 and math.isnan(content["loss"])
    assert content["model_state_dict"]["tok_emb.weight"].shape == (260, 32)
    again, _ = read_torch_checkpoint(tmp_path / "a.pt")
    assert (again.chat_template, again.tokenizer) == (template, {"kind": "gpt2", "bpe_ranks": 256})
    assert measure_parity(load_model(directory), tmp_path / "a.pt").holds


def test_step_and_loss_are_those_of_the_source(tmp_path):
    description, params = open_model(make_model_directory(tmp_path / "model", "text"))
    description = dataclasses.replace(description, source={"step": 3, "loss": 1.25})
    content = write(tmp_path / "a.pt", description, params)
    assert (content["step"], content["loss"]) == (3, 1.25)


def test_a_stated_tokenizer_that_can_not_be_is_refused(tmp_path):
    content = TorchTwin().checkpoint() | {"tinysft_jax": {"chat_template": "x", "tokenizer": {"kind": "gpt2"}}}
    with pytest.raises(UserError, match=r"a\.pt: chat_template"):
        read_torch_checkpoint(save(content, tmp_path / "a.pt"))


def test_full_disk_is_one_line(fixtures):
    description, params = read_torch_checkpoint(fixtures / "sft_small.pt")
    with pytest.raises(RunError, match="can't write /dev/full"):
        from pathlib import Path

        write_torch_checkpoint(Path("/dev/full"), params, description)


def test_a_context_whose_mask_would_fill_the_memory_is_refused(tmp_path):
    description, params = open_model(make_model_directory(tmp_path / "model", "text"))
    config = dataclasses.replace(description.config, max_seq_len=LONGEST_CONTEXT + 1)
    with pytest.raises(UserError, match=r"max_seq_len 16,385, above 16,384; convert it --to huggingface$"):
        write(tmp_path / "a.pt", dataclasses.replace(description, config=config), params)
    assert not (tmp_path / "a.pt").exists()
