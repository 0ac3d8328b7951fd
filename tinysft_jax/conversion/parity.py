"""Compares the logits of a converted model with those of an independent forward pass.

For PyTorch checkpoints it is written here, in NumPy and float64, and shares no code with the model. For Hugging Face
folders it is that of transformers.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Complex, Float, Int32

from tinysft_jax.console import import_extra
from tinysft_jax.conversion.torch import open_torch_file, shared_buffer
from tinysft_jax.model import GPT

# Float32 round-off is a few 1e-6 of the largest logit; an error in a layout, an epsilon or theta is far above this.
TOLERANCE = 1e-4


class Parity(NamedTuple):
    """How far a model's float32 logits are from the expected ones; the fraction of positions with the same argmax."""

    positions: int
    largest_difference: float
    mean_difference: float
    largest_logit: float
    argmax_agreement: float

    @property
    def holds(self) -> bool:
        return self.largest_difference <= TOLERANCE * self.largest_logit

    def __str__(self) -> str:
        return (
            f"{self.positions} positions: logits differ by at most {self.largest_difference:.1e}, "
            f"on average {self.mean_difference:.1e} (largest logit {self.largest_logit:.3g}); "
            f"the most probable token agrees at {self.argmax_agreement:.1%}"
        )


def measure_parity(model: GPT, path: Path) -> Parity:
    """Compares a float32 model, on random tokens, with the `.pt` or Hugging Face folder it was converted from or to."""
    config = model.config
    shape = (2, min(128, config.max_seq_len))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
    if path.is_dir():
        expected = huggingface_logits(path, tokens)[..., : config.vocab_size]  # without the folder's pad token
    else:
        expected = torch_logits(path, tokens, config.n_heads, config.rope_theta)
    logits = np.asarray(model(jax.numpy.asarray(tokens)))
    difference = np.abs(logits - expected)
    return Parity(
        positions=tokens.size,
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_logit=float(np.abs(expected).max()),
        argmax_agreement=float((logits.argmax(-1) == expected.argmax(-1)).mean()),
    )


def huggingface_logits(directory: Path, tokens: Int32[np.ndarray, "B T"]) -> Float[np.ndarray, "B T vocab"]:
    """The logits that transformers computes from a Hugging Face folder, in float32 on a CPU."""
    torch = import_extra("torch", "torch", "--check of a Hugging Face folder")
    transformers = import_extra("transformers", "hf", "--check of a Hugging Face folder")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def torch_logits(
    path: Path, tokens: Int32[np.ndarray, "B T"], n_heads: int, rope_theta: float
) -> Float[np.ndarray, "B T vocab"]:
    """The logits of a PyTorch checkpoint's model, in float64; `rope_theta` is for a file without `freqs_cis`."""
    tensors, _ = open_torch_file(path)

    def weight(name: str) -> Float[np.ndarray, "..."]:
        return tensors[name].detach().double().numpy()

    embedding = weight("tok_emb.weight")
    head_dim = embedding.shape[1] // n_heads
    heads = (*tokens.shape, n_heads, head_dim)
    rotations = shared_buffer(tensors, "freqs_cis")  # so that a theta that was inferred wrongly shows
    if rotations is not None and rotations.is_complex():
        rotations = rotations[: tokens.shape[1]].cfloat().numpy()
    else:
        frequencies = rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
        rotations = np.exp(1j * np.outer(np.arange(tokens.shape[1]), frequencies))

    def layer_norm(x: Float[np.ndarray, "B T dim"], name: str) -> Float[np.ndarray, "B T dim"]:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * weight(f"{name}.weight") + weight(f"{name}.bias")

    def attention(x: Float[np.ndarray, "B T dim"], name: str) -> Float[np.ndarray, "B T dim"]:
        q, k, v = ((x @ weight(f"{name}.{w}.weight").T).reshape(heads) for w in ("wq", "wk", "wv"))
        scores = np.einsum("bthd,bshd->bhts", _rotate(q, rotations), _rotate(k, rotations)) / np.sqrt(head_dim)
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ weight(f"{name}.wo.weight").T

    def mlp(x: Float[np.ndarray, "B T dim"], name: str) -> Float[np.ndarray, "B T dim"]:
        gate = x @ weight(f"{name}.w1.weight").T
        swish = gate * (1 + np.tanh(gate / 2)) / 2  # x sigmoid(x), without overflow
        return swish * (x @ weight(f"{name}.w3.weight").T) @ weight(f"{name}.w2.weight").T

    x = embedding[tokens]
    for layer in range(sum(name.endswith(".attn.wq.weight") for name in tensors)):
        block = f"blocks.{layer}"
        x = x + attention(layer_norm(x, f"{block}.ln_1"), f"{block}.attn")
        x = x + mlp(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp")
    return layer_norm(x, "ln_f") @ embedding.T


def _rotate(x: Float[np.ndarray, "B T H D"], rotations: Complex[np.ndarray, "T half"]) -> Float[np.ndarray, "B T H D"]:
    """Interleaved pairs as complex numbers, each rotated by its position's angle."""
    rotated = (x[..., 0::2] + 1j * x[..., 1::2]) * rotations[:, None]
    return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)
