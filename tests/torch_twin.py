"""A PyTorch model of the same architecture: tests make checkpoints from it, benchmarks train it.

Where torch is not installed, tests that import this are skipped.
"""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, max_seq_len: int, theta: float):
        super().__init__()
        self.n_heads = n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        head_dim = dim // n_heads
        frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.arange(max_seq_len).float()[:, None] * frequencies
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("mask", torch.ones(max_seq_len, max_seq_len).tril())
        # Files hold the complex table. What computes is real: torch.compile and bfloat16 can't do complex numbers.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: x.shape[-2]].float(), self.sin[: x.shape[-2]].float()
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2).type_as(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, max_seq_len: int, hidden: int, theta: float):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), Attention(dim, n_heads, max_seq_len, theta)
        self.ln_2, self.mlp = nn.LayerNorm(dim), MLP(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchTwin(nn.Module):
    """The model, with random parameters that are all of some weight."""

    def __init__(
        self,
        vocab_size: int = 70,
        dim: int = 16,
        n_layers: int = 2,
        n_heads: int = 2,
        max_seq_len: int = 12,
        hidden: int | None = None,
        theta: float = 10000.0,
        seed: int = 0,
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.config = {
            "vocab_size": vocab_size,
            "dim": dim,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "max_seq_len": max_seq_len,
        }
        self.tok_emb = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            [Block(dim, n_heads, max_seq_len, hidden or 4 * dim, theta) for _ in range(n_layers)]
        )
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.tok_emb.weight
        for name, parameter in self.named_parameters():
            is_scale = "ln_" in name and name.endswith("weight")
            nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_emb(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))

    def checkpoint(self) -> dict[str, Any]:
        """What the PyTorch project would save."""
        return {
            "model_state_dict": dict(self.state_dict()),
            "optimizer_state_dict": {},
            "step": 7,
            "loss": 2.5,
            "config": dict(self.config),
        }


def without_buffers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if not key.endswith(("freqs_cis", "mask"))}


def save(content: Any, path: Path, **options) -> Path:
    torch.save(content, path, **options)
    return path
