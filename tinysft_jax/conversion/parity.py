"""Does a converted model compute what the other side's file says? A second forward pass tells.

For PyTorch checkpoints it is in NumPy and float64. It reads the PyTorch names itself and shares no code with the model:
an error in either shows as a difference. For Hugging Face folders it is that of transformers.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Complex, Float, Int32

from tinysft_jax.console import UserError
from tinysft_jax.conversion.torch import TorchFile
from tinysft_jax.model import GPT

# Float32 round-off is a few 1e-6 of the largest logit; an error in a layout, an epsilon or a theta is far above this.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far a model's float32 logits are from those of the other side.

    Attributes:
      positions: how many positions were compared.
      largest_difference: over all logits.
      mean_difference: over all logits.
      largest_logit: the largest absolute value of a logit of the other side.
      argmax_agreement: the fraction of positions whose most probable token is the same.
    """

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


def measure_parity(model: GPT, file: TorchFile, rows: int = 2, length: int = 128, seed: int = 0) -> Parity:
    """Compares a float32 model with a checkpoint: the one that it was converted from, or was written as.

    Args:
      model: of this package.
      file: the checkpoint.
      rows: of random tokens.
      length: of a row, unless the model's context is shorter.
      seed: of the tokens.
    """
    tokens = _random_tokens(model, rows, length, seed)
    return _compare(model, tokens, torch_logits(file, tokens, model.config.n_heads, model.config.rope_theta))


def measure_huggingface_parity(model: GPT, directory: Path, rows: int = 2, length: int = 128, seed: int = 0) -> Parity:
    """Compares a float32 model with what transformers computes from a Hugging Face folder; arguments as above.

    Raises:
      UserError: if transformers or torch is not installed.
    """
    tokens = _random_tokens(model, rows, length, seed)
    # Without the pad token's, which only the folder has.
    return _compare(model, tokens, huggingface_logits(directory, tokens)[..., : model.config.vocab_size])


def _random_tokens(model: GPT, rows: int, length: int, seed: int) -> Int32[np.ndarray, "B T"]:
    shape = (rows, min(length, model.config.max_seq_len))
    return np.random.default_rng(seed).integers(model.config.vocab_size, size=shape, dtype=np.int32)


def _compare(model: GPT, tokens: Int32[np.ndarray, "B T"], expected: Float[np.ndarray, "B T vocab"]) -> Parity:
    with jax.default_matmul_precision("highest"):  # accelerators would multiply in less than float32
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
    """The logits that transformers computes from a Hugging Face folder, in float32 on a CPU.

    Raises:
      UserError: if transformers or torch is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError("--check of a Hugging Face folder needs transformers: pip install -e '.[hf,torch]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def torch_logits(
    file: TorchFile, tokens: Int32[np.ndarray, "B T"], n_heads: int, rope_theta: float
) -> Float[np.ndarray, "B T vocab"]:
    """The logits of the checkpoint's model, in float64.

    Args:
      file: the checkpoint.
      tokens: token ids.
      n_heads: the number of attention heads.
      rope_theta: base of the rotary angles, where the file has no rotary table.
    """

    def weight(name: str) -> Float[np.ndarray, "..."]:
        return file.parameters[name].detach().double().numpy()

    def layer_norm(x: Float[np.ndarray, "B T dim"], name: str) -> Float[np.ndarray, "B T dim"]:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * weight(f"{name}.weight") + weight(f"{name}.bias")

    turns = _turns(file, tokens.shape[1], weight("tok_emb.weight").shape[1] // n_heads, rope_theta)
    x = weight("tok_emb.weight")[tokens]
    n_layers = sum(name.endswith(".attn.wq.weight") for name in file.parameters)
    for block in (f"blocks.{layer}" for layer in range(n_layers)):
        normed = layer_norm(x, f"{block}.ln_1")
        q, k, v = (_split_heads(normed @ weight(f"{block}.attn.{w}.weight").T, n_heads) for w in ("wq", "wk", "wv"))
        attended = _attend(_rotate(q, turns), _rotate(k, turns), v)
        x = x + attended.swapaxes(1, 2).reshape(x.shape) @ weight(f"{block}.attn.wo.weight").T
        normed = layer_norm(x, f"{block}.ln_2")
        gate = normed @ weight(f"{block}.mlp.w1.weight").T
        swish = gate * (1 + np.tanh(gate / 2)) / 2  # x sigmoid(x), without overflow
        gated = swish * (normed @ weight(f"{block}.mlp.w3.weight").T)
        x = x + gated @ weight(f"{block}.mlp.w2.weight").T
    return layer_norm(x, "ln_f") @ weight("tok_emb.weight").T


def _turns(file: TorchFile, length: int, head_dim: int, theta: float) -> Complex[np.ndarray, "T half"]:
    """The file's own rotary table if it has one, so that a theta that was read wrongly shows too."""
    table = file.buffer("freqs_cis")
    if table is not None and table.is_complex():
        return table[:length].cfloat().numpy()
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    return np.exp(1j * np.outer(np.arange(length), frequencies))


def _split_heads(x: Float[np.ndarray, "B T dim"], n_heads: int) -> Float[np.ndarray, "B H T D"]:
    return x.reshape(*x.shape[:2], n_heads, -1).swapaxes(1, 2)


def _rotate(x: Float[np.ndarray, "B H T D"], turns: Complex[np.ndarray, "T half"]) -> Float[np.ndarray, "B H T D"]:
    """Interleaved pairs as complex numbers, each turned by its position's angle."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _attend(
    q: Float[np.ndarray, "B H T D"], k: Float[np.ndarray, "B H T D"], v: Float[np.ndarray, "B H T D"]
) -> Float[np.ndarray, "B H T D"]:
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v
