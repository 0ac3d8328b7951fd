"""What fits: the memory that training takes on one device, by a formula, as a Markdown table. Measures nothing.

Float32 weights, gradients and AdamW's two moments are 16 bytes a parameter. Activations are what the backward pass
needs, here in bfloat16 (2 bytes). With train.remat=none, for each token and layer:

- 4 dim: the layer's input, what the second norm reads, and both norms' outputs;
- 5 times the width of the queries: queries, keys and values, for each query head its own, and attention's output, as
  attention keeps it and as wo reads it; 4 bytes more a query head, log Σ exp of its scores; and with norms of queries
  and keys what these read;
- 2 hidden: gate and up. Their product is recomputed, as the norms are.

With train.remat=full, only the layer's input. At the end, for each token, three float32 values and one more of the
width dim: the last norm's, and the head's gradient. Then what comes and goes, of which the larger counts: twice a
layer (recomputed, and its gradients); or the head's table in bfloat16 and logits, in float32 and as gradients, of a
quarter of the positions (512 to 4,096), with a second gradient of the table if it is the embedding's.

`python benchmarks/memory.py [--rows 4 --length 1024]`
"""

import argparse

from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.parameters import count_parameters

GIB, CARDS = 2**30, (8, 16, 24, 80)
USABLE = 0.75  # of a card's memory, which is what JAX takes by default


def shape(dim: int, layers: int, heads: int, hidden: int, vocab: int, **more) -> GPTConfig:
    return GPTConfig(vocab, dim, layers, heads, 2048, mlp_ratio=hidden / dim, norm="rms", **more)


MODELS = {
    "the demo's": GPTConfig(8196, 128, 4, 4, 1024),
    "TinyStories, the default": GPTConfig(),
    "stories110M": shape(768, 12, 12, 2048, 32_000),
    "SmolLM2-135M": shape(576, 30, 9, 1536, 49_152, n_kv_heads=3),
    "SmolLM2-360M": shape(960, 32, 15, 2560, 49_152, n_kv_heads=5),
    "Qwen2.5-0.5B": shape(896, 24, 14, 4864, 151_936, n_kv_heads=2, qkv_bias=True),
    "Qwen3-0.6B": shape(1024, 28, 16, 3072, 151_936, n_kv_heads=8, head_dim=128, qk_norm=True),
    "TinyLlama-1.1B": shape(2048, 22, 32, 5632, 32_000, n_kv_heads=4, tied_head=False),
    "Llama-3.2-1B": shape(2048, 16, 32, 8192, 128_256, n_kv_heads=8),
}


def layer_bytes(config: GPTConfig, itemsize: int = 2) -> int:
    """What the backward pass of one layer needs, a token."""
    q_dim, k_dim, _ = config.qkv_dims
    values = 4 * config.dim + 5 * q_dim + 2 * config.hidden_dim + (q_dim + k_dim if config.qk_norm else 0)
    return itemsize * values + 4 * config.n_heads


def kept_bytes(config: GPTConfig, tokens: int, remat: str, itemsize: int = 2) -> int:
    """What is kept of the forward pass for the backward pass, besides weights."""
    layer = layer_bytes(config, itemsize) if remat == "none" else itemsize * config.dim
    return tokens * (config.n_layers * layer + (3 * 4 + itemsize) * config.dim)


def activation_bytes(config: GPTConfig, tokens: int, remat: str, itemsize: int = 2, chunk: int = 0) -> int:
    """All but weights, gradients and moments; `chunk`: positions whose logits exist at a time, 0: as on a GPU."""
    chunk, table = chunk or min(max(512, tokens // 4), 4096), config.padded_vocab_size * config.dim
    head = itemsize * table + (4 + itemsize) * chunk * config.padded_vocab_size + (4 * table if config.tied_head else 0)
    return kept_bytes(config, tokens, remat, itemsize) + max(2 * tokens * layer_bytes(config, itemsize), head)


def fits(total: int, total_remat: int) -> list[str]:
    """For each card "yes", "remat" (with train.remat=full) or "no"."""
    sizes = [USABLE * card * GIB for card in CARDS]
    return ["yes" if total <= size else "remat" if total_remat <= size else "no" for size in sizes]


def table(tokens: int) -> str:
    parts = ["weights", "gradients", "moments", "activations", "with remat", "total", "with remat"]
    lines = [["model", "parameters", *parts, *(f"{card} GB" for card in CARDS)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name, config in MODELS.items():
        n = count_parameters(config)
        none, full = (activation_bytes(config, tokens, remat) for remat in ("none", "full"))
        sizes = (4 * n, 4 * n, 8 * n, none, full, 16 * n + none, 16 * n + full)
        lines.append([name, f"{n:,}", *(f"{size / GIB:.2f}" for size in sizes), *fits(*sizes[-2:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="of a step on one device, or of a micro-batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    flags = parser.parse_args()
    print(f"GiB at {flags.rows} × {flags.length:,} tokens\n\n{table(flags.rows * flags.length)}")


if __name__ == "__main__":
    main()
