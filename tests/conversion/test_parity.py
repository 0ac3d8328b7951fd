"""The model computes, learns and continues exactly as the PyTorch project's does."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from torch_twin import TorchTwin, save, without_buffers

from tinysft_jax.conversion.names import TORCH
from tinysft_jax.conversion.parity import measure_parity, torch_logits
from tinysft_jax.conversion.torch import read_torch_checkpoint
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import make_model
from tinysft_jax.training.loss import supervised_nll
from tinysft_jax.training.step import make_optimizer, make_train_step


class Golden(NamedTuple):
    """A checkpoint, as read, and what the PyTorch project computes from it in float32."""

    path: Path
    config: GPTConfig
    params: dict[str, Any]
    arrays: Any

    @property
    def model(self):
        return make_model(self.config, self.params, dtype=jnp.float32, attention="xla")

    @property
    def batch(self) -> dict[str, jax.Array]:
        ids, labels = self.arrays["input_ids"], self.arrays["labels"]
        targets = np.full_like(labels, -100)
        targets[:, :-1] = labels[:, 1:]
        rows = {
            "tokens": ids,
            "segment_ids": np.ones_like(ids),
            "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape),
            "targets": np.maximum(targets, 0),
            "weights": (targets >= 0).astype(np.float32),
        }
        return jax.tree.map(jnp.asarray, rows)

    def tensors(self, params) -> dict[str, np.ndarray]:
        """Parameters or gradients under PyTorch's names."""
        return TORCH.export_tensors(params, self.config)


@pytest.fixture(scope="module", params=["pretrained_small", "pretrained_compiled", "sft_small"])
def golden(request, fixtures) -> Golden:
    path = fixtures / f"{request.param}.pt"
    description, params = read_torch_checkpoint(path)
    return Golden(path, description.config, params, np.load(path.with_suffix(".golden.npz")))


def test_logits(golden):
    logits = golden.model(jnp.asarray(golden.arrays["input_ids"]))
    np.testing.assert_allclose(logits, golden.arrays["logits"], rtol=0, atol=2e-5)


def test_float64_logits(golden):
    """The pass that `--check` compares with is right by itself."""
    logits = torch_logits(golden.path, golden.arrays["input_ids"], golden.config.n_heads, golden.config.rope_theta)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, golden.arrays["logits"], rtol=0, atol=2e-5)


def test_loss_and_gradients(golden):
    graph, _ = nnx.split(golden.model)

    def loss(params, batch):
        model = nnx.merge(graph, params)
        hidden = model.hidden(batch["tokens"])
        table = model.tok_emb.embedding[...]
        nll = supervised_nll(hidden, table, batch["targets"], batch["weights"], golden.config.vocab_size)
        return nll / batch["weights"].sum()

    params = jax.tree.map(jnp.asarray, golden.params)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, golden.batch)
    assert value == pytest.approx(golden.arrays["loss"], abs=1e-5)
    for name, grad in golden.tensors(grads).items():
        expected = golden.arrays[f"grad.{name}"]
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_three_adamw_steps(golden):
    """Losses, gradient norms and parameters of the project's own train step."""
    optimizer = make_optimizer(learning_rate=1e-3, weight_decay=0.01, beta1=0.9, beta2=0.95, grad_clip=1.0)
    graph, _ = nnx.split(golden.model)
    train_step = jax.jit(make_train_step(graph, optimizer, optax.constant_schedule(1e-3)))
    params = jax.tree.map(jnp.asarray, golden.params)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    for expected_loss, expected_norm in golden.arrays["adamw_losses"]:
        state, metrics = train_step(state, golden.batch)
        assert metrics["loss"] == pytest.approx(expected_loss, abs=1e-4)
        assert metrics["grad_norm"] == pytest.approx(expected_norm, rel=1e-4)
    differences = [
        np.abs(tensor - golden.arrays[f"after.{name}"]).ravel()
        for name, tensor in golden.tensors(state["params"]).items()
    ]
    # Adam divides by the gradient's own size: where that is round-off, so is the step's direction.
    assert np.mean(np.concatenate(differences) <= 1e-5) >= 0.999


def test_greedy_continuation(golden):
    """The whole prefix at each step; the sampler with its cache has tests of its own."""
    expected = golden.arrays["greedy"]
    forward = jax.jit(lambda tokens, model=golden.model: model(tokens))
    tokens = np.zeros_like(expected)  # the model is causal: what stands behind a position does not matter
    tokens[:, :8] = expected[:, :8]
    for at in range(8, expected.shape[1]):
        tokens[:, at] = np.asarray(forward(jnp.asarray(tokens)))[:, at - 1].argmax(-1)
    np.testing.assert_array_equal(tokens, expected)


def test_parity_holds(golden):
    parity = measure_parity(golden.model, golden.path)
    assert parity.holds
    assert parity.largest_difference < 1e-5
    assert parity.argmax_agreement == 1.0
    assert parity.positions == 2 * min(128, golden.config.max_seq_len)


def test_parity_without_a_rotary_table(tmp_path):
    twin = TorchTwin()
    state = without_buffers(twin.state_dict())
    path = save({"model_state_dict": state, "config": twin.config}, tmp_path / "a.pt")
    description, params = read_torch_checkpoint(path)
    assert measure_parity(make_model(description.config, params, dtype=jnp.float32), path).holds


CONVERSION_ERRORS = {
    "q and k swapped": lambda p: p["attn"].update(wq=p["attn"]["wk"], wk=p["attn"]["wq"]),
    "a kernel not transposed": lambda p: p["attn"]["wo"].update(kernel=p["attn"]["wo"]["kernel"].swapaxes(1, 2)),
    "gate and value swapped": lambda p: p["mlp"].update(w1=p["mlp"]["w3"], w3=p["mlp"]["w1"]),
    "norms swapped": lambda p: p.update(ln_1=p["ln_2"], ln_2=p["ln_1"]),
    "layers reversed": lambda p: p["mlp"]["w2"].update(kernel=p["mlp"]["w2"]["kernel"][::-1]),
    "one value": lambda p: p["ln_1"]["scale"].__setitem__((0, 0), p["ln_1"]["scale"][0, 0] + 0.05),
}


@pytest.mark.parametrize("error", CONVERSION_ERRORS)
def test_parity_notices(fixtures, error):
    path = fixtures / "sft_small.pt"
    description, params = read_torch_checkpoint(path)
    CONVERSION_ERRORS[error](params["blocks"])
    parity = measure_parity(make_model(description.config, params, dtype=jnp.float32), path)
    assert not parity.holds


def test_parity_notices_a_wrong_theta(fixtures):
    path = fixtures / "sft_small.pt"
    description, params = read_torch_checkpoint(path)
    config = dataclasses.replace(description.config, rope_theta=10100.0)
    assert not measure_parity(make_model(config, params, dtype=jnp.float32), path).holds
