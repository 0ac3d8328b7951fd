"""The model once more, in NumPy and float64: nothing here is shared with the package but the shape's numbers."""

import numpy as np

from tinysft_jax.gpt_config import GPTConfig


def logits(config: GPTConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """`[T, vocab]` of one row `[T]`."""
    table = _float64(params["tok_emb" if config.tied_head else "head"]["embedding"])[: config.vocab_size]
    return hidden(config, params, tokens) @ table.T


def hidden(config: GPTConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """The head's input, `[T, dim]`."""
    x = _float64(params["tok_emb"]["embedding"])[tokens]
    for index in range(config.n_layers):
        block = _layer(params["blocks"], index)
        x = x + _attend(config, block["attn"], _norm(config, block["ln_1"], x))
        h, mlp = _norm(config, block["ln_2"], x), block["mlp"]
        gate = h @ mlp["w1"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["w3"]["kernel"])) @ mlp["w2"]["kernel"]
    return _norm(config, params["ln_f"], x)


def frequencies(config: GPTConfig) -> np.ndarray:
    """Radians a position; scaled as in transformers' `_compute_llama3_parameters`, wavelength by wavelength."""
    found = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        if (scaling := config.rope_scaling) is not None:
            wavelength = 2 * np.pi / frequency
            slow = scaling.original_max_seq_len / scaling.low_freq_factor
            fast = scaling.original_max_seq_len / scaling.high_freq_factor
            if wavelength > slow:
                frequency = frequency / scaling.factor
            elif wavelength > fast:
                share = scaling.original_max_seq_len / wavelength - scaling.low_freq_factor
                share /= scaling.high_freq_factor - scaling.low_freq_factor
                frequency = (1 - share) * frequency / scaling.factor + share * frequency
        found.append(frequency)
    return np.array(found)


def rotate(config: GPTConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`[T, D]`: the features i and i + D/2 as real and imaginary part of a number that turns."""
    half = config.head_dim // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(positions, frequencies(config)))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _attend(config: GPTConfig, attn: dict, x: np.ndarray) -> np.ndarray:
    """Head by head."""
    positions, size, out = np.arange(len(x)), config.head_dim, []
    mask = np.where(positions[:, None] >= positions[None, :], 0, -np.inf)
    for head in range(config.n_heads):
        shared = head // (config.n_heads // config.n_kv_heads)
        q, k, v = (
            (x @ attn[name]["kernel"] + attn[name].get("bias", 0))[:, which * size : (which + 1) * size]
            for name, which in (("wq", head), ("wk", shared), ("wv", shared))
        )
        if config.qk_norm:
            q, k = _rms(config, attn["q_norm"], q), _rms(config, attn["k_norm"], k)
        scores = rotate(config, q, positions) @ rotate(config, k, positions).T / size**0.5 + mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    return np.concatenate(out, axis=-1) @ attn["wo"]["kernel"]


def _norm(config: GPTConfig, norm: dict, x: np.ndarray) -> np.ndarray:
    if config.norm == "rms":
        return _rms(config, norm, x)
    x = x - x.mean(axis=-1, keepdims=True)
    return _rms(config, norm, x) + _float64(norm["bias"])


def _rms(config: GPTConfig, norm: dict, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_epsilon) * _float64(norm["scale"])


def _layer(tree: dict, index: int) -> dict:
    return {
        key: _layer(value, index) if isinstance(value, dict) else _float64(value[index]) for key, value in tree.items()
    }


def _float64(array) -> np.ndarray:
    return np.asarray(array, np.float64)
