"""The GPT: pre-norm blocks, rotary positions on halves of heads, SwiGLU.

By default it is the PyTorch project's model. `GPTConfig` also describes models of the Llama and Qwen families.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from tinysft_jax import accelerator
from tinysft_jax.attention.backends import segment_attention
from tinysft_jax.attention.cached import cached_attention
from tinysft_jax.console import UserError
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.linear import LINEAR_OUTPUT, Linear, product
from tinysft_jax.sharding import constrain

REMAT_POLICIES = ("none", "dots", "full")
SCAN_LAYERS = ("auto", "on", "off")
MOST_UNROLLED = 24  # layers that are compiled one by one: in a prototype on an H100, 12 took 16 s, and a scan 9

Ints = Int32[Array, "B T"]  # token ids, segment ids or positions
Slots = Float[Array, "B K S D"]  # of a cache, for positions 0 to S-1 and heads of keys
Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # cosines and sines
LayerCache = tuple[Slots, Slots]  # keys and values

# Recomputes in the backward pass what costs next to nothing, instead of storing it. A matmul at the end of what is
# wrapped is not computed again: nothing in the backward pass needs its output.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def _norm(config: GPTConfig, dtype, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of blocks and head; its parameters' names in foreign formats are in `conversion/names.py`."""
    kind = nnx.LayerNorm if config.norm == "layer" else nnx.RMSNorm
    options = {"epsilon": config.norm_epsilon, "dtype": dtype, "use_fast_variance": False, "promote_dtype": _unchanged}
    return kind(config.dim, **options, rngs=rngs)


def _head_norm(config: GPTConfig, dtype, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    """The norm of each head's query or key, where the model has one."""
    if not config.qk_norm:
        return lambda x: x
    options = {"epsilon": config.norm_epsilon, "dtype": dtype, "promote_dtype": _unchanged}
    return nnx.RMSNorm(config.head_dim, **options, rngs=rngs)


def _unchanged(arrays: tuple, dtype) -> tuple:
    """A norm's input and parameters; flax would round them all, and so the parameters' gradients, to `dtype`."""
    return arrays


def _residual_std(config: GPTConfig) -> float:
    """Smaller where a layer adds to the residual stream, so that its variance does not grow with depth (GPT-2)."""
    return 0.02 / (2 * config.n_layers) ** 0.5


def rotary_steps(config: GPTConfig) -> Float[Array, " half"]:
    """Positions per radian: theta^(2i / head_dim) (RoFormer, https://arxiv.org/abs/2104.09864, eq. 15).

    Scaled, what turns less than `low_freq_factor` times over the original context turns `factor` times slower, what
    turns more than `high_freq_factor` times is left alone, and the frequencies between are interpolated (Llama 3.1,
    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py).
    """
    steps = config.rope_theta ** (jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return steps
    turns, low = scaling.original_max_seq_len / (2 * math.pi * steps), scaling.low_freq_factor
    kept = jnp.clip((turns - low) / (scaling.high_freq_factor - low), 0, 1)
    return steps / (kept + (1 - kept) / scaling.factor)


def rotary_angles(positions: Ints, config: GPTConfig) -> Rotation:
    """Cosines and sines of each position's angles."""
    angles = positions[..., None].astype(jnp.float32) / rotary_steps(config)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H D"], rotation: Rotation) -> Float[Array, "B T H D"]:
    """Rotates the features i and i + D/2 of each head by their angle, in float32.

    Halves, because they are contiguous, where interleaved pairs need strided access.
    """
    cos, sin = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: GPTConfig, dtype, backend: str, rngs: nnx.Rngs, fused: bool = False):
        linear = functools.partial(Linear, config.dim, bias=config.qkv_bias, rngs=rngs)
        if fused:
            self.wqkv = linear(sum(config.qkv_dims))
        else:
            self.wq, self.wk, self.wv = map(linear, config.qkv_dims)
        self.wo = Linear(config.qkv_dims[0], config.dim, std=_residual_std(config), rngs=rngs)
        self.q_norm, self.k_norm = _head_norm(config, dtype, rngs), _head_norm(config, dtype, rngs)
        self.config, self.backend, self.fused = config, backend, fused

    def __call__(
        self,
        x: Float[Array, "N dim"],
        rotation: Rotation,
        positions: Ints,
        segment_ids: Ints | None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "N dim"], LayerCache | None]:
        q_dim, k_dim, _ = self.config.qkv_dims
        if self.fused:
            qkv = jnp.split(self.wqkv(x), (q_dim, q_dim + k_dim), axis=-1)
        else:
            qkv = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (part.reshape(*positions.shape, -1, self.config.head_dim) for part in qkv)
        q, k = rotate(_recomputed(self.q_norm)(q), rotation), rotate(_recomputed(self.k_norm)(k), rotation)
        if cache is None:
            out = segment_attention(q, k, v, segment_ids, self.backend)
        else:
            cache = _write(cache[0], k, positions), _write(cache[1], v, positions)
            out = cached_attention(q, *cache, positions)
        return self.wo(out.reshape(len(x), -1)), cache


def _write(slots: Slots, new: Float[Array, "B T K D"], positions: Ints) -> Slots:
    """A cache with the slots at `positions`, which follow each other in a row, set."""
    if len(positions) == 1:  # a slice is faster than a scatter, which each row of several needs for its own positions
        return jax.lax.dynamic_update_slice(slots, new.swapaxes(1, 2), (0, 0, positions[0, 0], 0))
    rows = jnp.arange(len(positions))[:, None]
    return slots.at[rows, :, positions].set(new, unique_indices=True)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs, fused: bool = False):
        linear = functools.partial(Linear, config.dim, rngs=rngs)
        if fused:
            self.w13 = linear(2 * config.hidden_dim)
        else:
            self.w1, self.w3 = linear(config.hidden_dim), linear(config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim, std=_residual_std(config), rngs=rngs)
        self.fused = fused

    def __call__(self, x: Float[Array, "N dim"]) -> Float[Array, "N dim"]:
        gate, up = jnp.split(self.w13(x), 2, axis=-1) if self.fused else (self.w1(x), self.w3(x))
        # Of the four activations of the hidden width, two are stored and two recomputed.
        return _recomputed(lambda gate, up: self.w2(nnx.silu(gate) * up))(gate, up)


class Block(nnx.Module):
    """One layer; its activations are `[N, dim]` with N = B × T.

    On a CPU, XLA contracts one axis of positions much faster than rows and columns as two (the weights' gradients).
    With `fused`, matrices that multiply the same input are stored side by side, as `fuse_projections` lays them.
    """

    def __init__(self, config: GPTConfig, dtype, backend: str, rngs: nnx.Rngs, fused: bool = False):
        self.ln_1, self.ln_2 = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.attn = Attention(config, dtype, backend, rngs, fused)
        self.mlp = MLP(config, rngs, fused)

    def __call__(self, x, rotation, positions, segment_ids, cache=None):
        """`[N, dim]` → the same shape, and the layer's cache with these positions written (None without one)."""
        attended, cache = self.attn(_recomputed(self.ln_1)(x), rotation, positions, segment_ids, cache)
        x = constrain(x + attended, "batch", None)
        x = constrain(x + self.mlp(_recomputed(self.ln_2)(x)), "batch", None)
        return x, cache


def fuse_projections(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's parameters for decoding: wq, wk, wv and w1, w3 side by side, as one matrix each.

    A step of one token multiplies a vector by each matrix: on a GPU fewer and larger products take less time.
    """

    def side_by_side(part: dict[str, Any], fused: str, *names: str) -> dict[str, Any]:
        joined = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-1), *(part[name] for name in names))
        return {fused: joined} | {name: rest for name, rest in part.items() if name not in names}

    attn, mlp = side_by_side(layer["attn"], "wqkv", "wq", "wk", "wv"), side_by_side(layer["mlp"], "w13", "w1", "w3")
    return layer | {"attn": attn, "mlp": mlp}


def scans_layers(scan_layers: str, remat: str, n_layers: int) -> bool:
    """Whether training loops over the layers, or compiles them one by one; `scan_layers` is "auto", "on" or "off".

    On a GPU a loop copies all that the backward pass needs of each layer into stacks (a prototype on an H100: 11 of 102
    ms a step). On a CPU it costs nothing and compiles faster. And outside of a loop XLA largely undoes
    rematerialisation, and keeps all layers' gradients before it divides them over the mesh's `fsdp`.
    """
    if scan_layers == "auto":
        saves_memory = remat != "none" or jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1
        return not accelerator.is_present() or saves_memory or n_layers > MOST_UNROLLED
    return scan_layers == "on"


class GPT(nnx.Module):
    """A decoder-only transformer with float32 parameters; those of the blocks are stacked along a leading layer axis.

    Args:
      config: the shape.
      rngs: with a `params` stream.
      dtype: of matmuls and activations; norms, softmax and logits are float32 all the same.
      attention: "auto" or a backend; see `attention.backends`.
      remat: what the backward pass recomputes of each block: "none"; "dots": all but matmuls; "full": all.
      scan_layers: "auto", "on" or "off"; see `scans_layers`.
      trained_length: tokens of the longest training sequence, where generation stops; None: the context.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        attention: str = "auto",
        remat: str = "none",
        scan_layers: str = "auto",
        trained_length: int | None = None,
    ):
        if jax.config.jax_enable_x64:
            raise UserError("JAX's 64-bit mode (JAX_ENABLE_X64) is on: this model computes in 32 bits; turn it off")
        if remat not in REMAT_POLICIES:
            raise UserError(f"train.remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        if scan_layers not in SCAN_LAYERS:
            raise UserError(f"train.scan_layers {scan_layers!r} is not one of {', '.join(SCAN_LAYERS)}")
        self.config, self.dtype, self.remat, self.scan_layers = config, jnp.dtype(dtype), remat, scan_layers
        self.trained_length = trained_length or config.max_seq_len
        init = functools.partial(_embedding_init, vocab_size=config.vocab_size)
        table = functools.partial(nnx.Embed, config.padded_vocab_size, config.dim, embedding_init=init, rngs=rngs)
        self.tok_emb = table()
        if config.scalar_head:
            self.score = nnx.Param(jnp.zeros(config.dim, jnp.float32))
        elif not config.tied_head:
            self.head = table()
        create_blocks = nnx.vmap(lambda rngs: Block(config, self.dtype, attention, rngs))
        self.blocks = create_blocks(rngs.split(config.n_layers))
        self.ln_f = _norm(config, self.dtype, rngs)

    def __call__(
        self, tokens: Ints, segment_ids: Ints | None = None, positions: Ints | None = None
    ) -> Float[Array, "B T vocab"]:
        """Next-token logits, float32.

        By default, a row is one segment, with positions 0..T-1. Positions only attend within their segment.
        """
        hidden = self.hidden(tokens, segment_ids, positions)
        return head_logits(hidden, self.head_table(), self.config.vocab_size)[..., : self.config.vocab_size]

    def head_table(self) -> Float[Array, "V dim"]:
        """The rows with which the head compares its input: those of the embedding if the head is tied."""
        return (self.tok_emb if self.config.tied_head else self.head).embedding[...]

    def scores(
        self, tokens: Ints, segment_ids: Ints | None = None, positions: Ints | None = None
    ) -> Float[Array, "B T"]:
        """A reward model's score of what each position and those before it in its segment say, float32."""
        hidden = self.hidden(tokens, segment_ids, positions)
        return product("btd,d->bt", hidden.astype(jnp.float32), self.score[...])

    def hidden(
        self, tokens: Ints, segment_ids: Ints | None = None, positions: Ints | None = None
    ) -> Float[Array, "B T dim"]:
        """The head's input; arguments as in `__call__`."""
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} positions, but the model's context is {self.config.max_seq_len}")
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        rotation = rotary_angles(positions, self.config)
        graph, layers = nnx.split(self.blocks)

        def apply(x, layer):
            x, _ = nnx.merge(graph, layer)(x, rotation, positions, segment_ids)
            return x, None

        scans = scans_layers(self.scan_layers, self.remat, self.config.n_layers)
        if self.remat != "none":
            saved = jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT) if self.remat == "dots" else None
            # A scan already keeps XLA from merging the recomputation with the forward pass.
            apply = jax.checkpoint(apply, policy=saved, prevent_cse=not scans)
        x = constrain(embed(tokens, self.tok_emb.embedding[...], self.dtype), "batch", None)
        x, _ = jax.lax.scan(apply, x, layers, unroll=1 if scans else self.config.n_layers)
        return self.ln_f(x).reshape(*tokens.shape, -1)


def embed(tokens: Ints, embedding: Float[Array, "V dim"], dtype) -> Float[Array, "N dim"]:
    """The tokens' rows, cast after the look-up: so their gradients are summed in float32."""
    return jnp.take(embedding, tokens.reshape(-1), axis=0).astype(dtype)


def head_logits(hidden: Float[Array, "*N dim"], table: Float[Array, "V dim"], vocab_size: int) -> Float[Array, "*N V"]:
    """The head: float32 logits of matmuls in `hidden`'s dtype; -inf at padding rows."""
    logits = product("...d,vd->...v", hidden, table.astype(hidden.dtype), jnp.float32)
    is_padding = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) >= vocab_size
    return jnp.where(is_padding, -jnp.inf, logits)


def _embedding_init(key, shape, dtype, *, vocab_size: int):
    rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where(rows < vocab_size, 0.02 * jax.random.normal(key, shape, dtype), 0)


def cached_hidden(
    params: dict[str, Any], tokens: Ints, positions: Ints, cache: list[LayerCache], config: GPTConfig
) -> tuple[Float[Array, "B T dim"], list[LayerCache]]:
    """`GPT.hidden` for decoding, where a cache holds the keys and values of earlier positions; also the new cache.

    Each row writes its tokens to their positions' slots, and attends to the slots up to its own: what is in later ones
    (of a prompt's padding, say) is never read, and is overwritten when its position comes.

    Parameters and cache are a list with one entry per layer, where training has stacked layers: a cache carried
    through a scan would be copied at each step. A layer's parameters are laid out by `fuse_projections`. The cache's
    dtype is that of matmuls and activations.
    """
    dtype = cache[0][0].dtype
    block, _ = nnx.split(nnx.eval_shape(lambda: Block(config, dtype, "auto", nnx.Rngs(0), fused=True)))
    norm, _ = nnx.split(nnx.eval_shape(lambda: _norm(config, dtype, nnx.Rngs(0))))
    rotation = rotary_angles(positions, config)
    x, updated = embed(tokens, params["tok_emb"]["embedding"], dtype), []
    for layer, layer_cache in zip(params["blocks"], cache, strict=True):
        x, layer_cache = nnx.merge(block, layer)(x, rotation, positions, None, layer_cache)
        updated.append(layer_cache)
    return nnx.merge(norm, params["ln_f"])(x).reshape(*tokens.shape, -1), updated
