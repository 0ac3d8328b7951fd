"""The GPT: pre-norm blocks, rotary positions on interleaved pairs, SwiGLU, a head tied to the embedding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from tinysft_jax.attention import cached_attention, segment_attention
from tinysft_jax.console import UserError, shown
from tinysft_jax.sharding import constrain

# Rows of the embedding table are padded to a multiple of this, so that any mesh divides it and matmuls tile well.
VOCAB_MULTIPLE = 128

# Positions and ids are 32-bit integers.
LARGEST_SIZE = 2**31 - 1

REMAT_POLICIES = ("none", "dots", "full")

Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
LayerCache = tuple[Float[Array, "B H S D"], Float[Array, "B H S D"]]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Raises:
      UserError: if the numbers can't be a model.
    """

    vocab_size: int = 50257
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    max_seq_len: int = 1024
    mlp_ratio: float = 4.0
    rope_theta: float = 10000.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= LARGEST_SIZE:
                raise UserError(
                    f"model.{field.name} is {shown(value)}; it must be a positive {field.type.__name__} below 2^31"
                )
        if self.dim % self.n_heads:
            raise UserError(f"model.dim {self.dim} is not divisible by model.n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise UserError(f"head size {self.head_dim} (dim / n_heads) is odd; rotary positions need an even one")
        if not 1 <= self.hidden_dim <= LARGEST_SIZE:
            raise UserError(f"model.mlp_ratio {self.mlp_ratio} makes {self.hidden_dim} hidden units at dim {self.dim}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table in memory."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Attention(nnx.Module):
    def __init__(self, config: GPTConfig, backend: str, rngs: nnx.Rngs):
        linear = functools.partial(Linear, config.dim, config.dim, rngs=rngs)
        self.wq, self.wk, self.wv = linear(), linear(), linear()
        self.wo = linear(std=_residual_std(config))
        self.n_heads, self.backend = config.n_heads, backend

    def __call__(
        self,
        x: Float[Array, "N dim"],
        rotation: Rotation,
        positions: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"] | None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "N dim"], LayerCache | None]:
        q, k, v = (w(x).reshape(*positions.shape, self.n_heads, -1) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is None:
            out = segment_attention(q, k, v, segment_ids, self.backend)
        else:
            rows = jnp.arange(positions.shape[0])[:, None]
            cache = tuple(
                c.at[rows, :, positions].set(new.astype(c.dtype)) for c, new in zip(cache, (k, v), strict=True)
            )
            out = cached_attention(q, *cache, positions)
        return self.wo(out.reshape(x.shape)), cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.w1 = Linear(config.dim, config.hidden_dim, rngs=rngs)
        self.w3 = Linear(config.dim, config.hidden_dim, rngs=rngs)
        self.w2 = Linear(config.hidden_dim, config.dim, std=_residual_std(config), rngs=rngs)

    def __call__(self, x: Float[Array, "N dim"]) -> Float[Array, "N dim"]:
        # Of the four values of this width, the backward pass keeps two and makes the others again.
        return _recomputed(lambda gate, up: self.w2(nnx.silu(gate) * up))(self.w1(x), self.w3(x))


class Block(nnx.Module):
    """One layer; its activations are `[N, dim]` with N = B × T.

    On a CPU, XLA contracts one axis of positions much faster than rows and columns as two (the weights' gradients).
    """

    def __init__(self, config: GPTConfig, dtype, backend: str, rngs: nnx.Rngs):
        self.ln_1, self.ln_2 = _layer_norm(config, dtype, rngs), _layer_norm(config, dtype, rngs)
        self.attn = Attention(config, backend, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, rotation, positions, segment_ids, cache=None):
        """`[N, dim]` → the same shape, and the layer's cache with these positions written (None without one)."""
        attended, cache = self.attn(_recomputed(self.ln_1)(x), rotation, positions, segment_ids, cache)
        x = constrain(x + attended, "batch", None)
        x = constrain(x + self.mlp(_recomputed(self.ln_2)(x)), "batch", None)
        return x, cache


class GPT(nnx.Module):
    """A decoder-only transformer with float32 parameters.

    The blocks' parameters are stacked along a leading layer axis: training scans over it. `unstacked()` gives the
    same model with one block a layer, which is what decoding runs.

    Args:
      config: the shape.
      rngs: with a `params` stream.
      dtype: of matmuls and activations; norms, softmax and logits are float32 all the same.
      attention: "auto", "xla" or "cudnn"; see `attention.segment_attention`.
      remat: what the backward pass recomputes of each block: "none"; "dots": all but matmuls; "full": all.
      trained_length: tokens of the longest sequence that it was trained on, where generation stops; None: its context.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        attention: str = "auto",
        remat: str = "none",
        trained_length: int | None = None,
    ):
        if jax.config.jax_enable_x64:
            raise UserError("JAX's 64-bit mode (JAX_ENABLE_X64) is on: this model computes in 32 bits; turn it off")
        if remat not in REMAT_POLICIES:
            raise UserError(f"train.remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.trained_length = trained_length or config.max_seq_len
        self.tok_emb = nnx.Embed(
            config.padded_vocab_size,
            config.dim,
            embedding_init=functools.partial(_embedding_init, vocab_size=config.vocab_size),
            rngs=rngs,
        )
        create_blocks = nnx.vmap(lambda rngs: Block(config, self.dtype, attention, rngs))
        self.blocks = create_blocks(rngs.split(config.n_layers))
        self.ln_f = _layer_norm(config, self.dtype, rngs)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"] | None = None,
        positions: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Next-token logits, float32.

        Args:
          tokens: token ids.
          segment_ids: which segment each position belongs to; None: one segment a row.
          positions: each token's position in its segment; None: 0..T-1.
        """
        return self.logits(self.hidden(tokens, segment_ids, positions))[..., : self.config.vocab_size]

    def hidden(
        self,
        tokens: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"] | None = None,
        positions: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T dim"]:
        """What the head reads; arguments as in `__call__`."""
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} positions, but the model's context is {self.config.max_seq_len}")
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        rotation = rotary_angles(positions, self.config)
        x = constrain(self._embed(tokens), "batch", None)

        def apply(block: Block, x):
            return block(x, rotation, positions, segment_ids)[0]

        if isinstance(self.blocks, nnx.List):
            for block in self.blocks:
                x = apply(block, x)
        else:
            graph, layers = nnx.split(self.blocks)
            body = _remat(lambda x, layer: (apply(nnx.merge(graph, layer), x), None), self.remat)
            x, _ = jax.lax.scan(body, x, layers)
        return self.ln_f(x).reshape(*tokens.shape, -1)

    def hidden_cached(
        self, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"], cache: list[LayerCache]
    ) -> tuple[Float[Array, "B T dim"], list[LayerCache]]:
        """What the head reads, where earlier positions' keys and values are in a cache.

        Each row writes its tokens at their positions' slots and sees the slots up to its own: what lies in later
        slots (a prompt's padding, say) is never seen, and overwritten when its position comes.

        Args:
          tokens: token ids.
          positions: their positions, any for each row.
          cache: of `init_cache`; one pair of keys and values a layer.
        """
        rotation = rotary_angles(positions, self.config)
        x, updated = self._embed(tokens), []
        for block, layer_cache in zip(self.unstacked().blocks, cache, strict=True):
            x, layer_cache = block(x, rotation, positions, None, layer_cache)
            updated.append(layer_cache)
        return self.ln_f(x).reshape(*tokens.shape, -1), updated

    def init_cache(
        self, batch_size: int, length: int, sharding: jax.sharding.Sharding | None = None
    ) -> list[LayerCache]:
        """An empty cache with slots for positions 0..length-1, one pair `[B, H, length, D]` a layer."""
        shape = (batch_size, self.config.n_heads, length, self.config.head_dim)
        empty = functools.partial(jnp.zeros, shape, self.dtype, device=sharding)
        return [(empty(), empty()) for _ in range(self.config.n_layers)]

    def _embed(self, tokens: Int32[Array, "B T"]) -> Float[Array, "N dim"]:
        """Rows of the float32 table, rounded after they were taken: so their gradients are summed in float32."""
        return self.tok_emb(tokens.reshape(-1)).astype(self.dtype)

    def logits(self, hidden: Float[Array, "*N dim"]) -> Float[Array, "*N padded_vocab"]:
        """Logits of all rows of the table, float32; -inf at padding rows."""
        return head_logits(hidden, self.tok_emb.embedding[...], self.config.vocab_size)

    def unstacked(self) -> "GPT":
        """The same model with one block a layer, in a list."""
        if isinstance(self.blocks, nnx.List):
            return self
        twin = nnx.merge(*nnx.split(self))
        graph, layers = nnx.split(self.blocks)
        leaves, structure = jax.tree.flatten(layers)
        columns = zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)
        twin.blocks = nnx.List([nnx.merge(graph, jax.tree.unflatten(structure, column)) for column in columns])
        return twin


def default_dtype() -> jnp.dtype:
    """bfloat16 on accelerators; float32 on a CPU, which has no faster arithmetic for less."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def head_logits(
    hidden: Float[Array, "*N dim"], embedding: Float[Array, "padded_vocab dim"], vocab_size: int
) -> Float[Array, "*N padded_vocab"]:
    """The tied head: float32 logits, in `hidden`'s precision of multiplication; -inf at padding rows."""
    logits = jnp.einsum("...d,vd->...v", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    is_padding = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) >= vocab_size
    return jnp.where(is_padding, -jnp.inf, logits)


def rotary_angles(positions: Int32[Array, "B T"], config: GPTConfig) -> Rotation:
    """Cosines and sines of position × theta^(-2i / head_dim) (RoFormer, https://arxiv.org/abs/2104.09864, eq. 15)."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) / (config.rope_theta**exponents)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H D"], rotation: Rotation) -> Float[Array, "B T H D"]:
    """Rotates the interleaved pairs (x[2i], x[2i+1]) by their angles."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _remat(body, policy: str):
    if policy == "none":
        return body
    saved = jax.checkpoint_policies.save_only_these_names(PRODUCT) if policy == "dots" else None
    return jax.checkpoint(body, policy=saved, prevent_cse=False)  # scan already keeps XLA from merging the two passes


# Makes again in the backward pass what costs next to nothing, instead of keeping it. A product at the end of what is
# wrapped is not computed again: nothing in the backward pass asks for it.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def _layer_norm(config: GPTConfig, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.dim, epsilon=1e-5, dtype=dtype, use_fast_variance=False, rngs=rngs)


def _residual_std(config: GPTConfig) -> float:
    """Smaller where a layer adds to the residual stream, so that its variance does not grow with depth (GPT-2)."""
    return 0.02 / (2 * config.n_layers) ** 0.5


def _embedding_init(key, shape, dtype, *, vocab_size: int):
    rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where(rows < vocab_size, 0.02 * jax.random.normal(key, shape, dtype), 0)


PRODUCT = "product"  # names a layer's output, so that rematerialisation can choose to keep it


class Linear(nnx.Module):
    """x W, without a bias.

    Args:
      n_in: of an input.
      n_out: of an output.
      std: of the weights at first, which are normal.
      rngs: with a `params` stream.
    """

    def __init__(self, n_in: int, n_out: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (n_in, n_out), jnp.float32))

    def __call__(self, x: Float[Array, "N n_in"]) -> Float[Array, "N n_out"]:
        return checkpoint_name(_product(x, self.kernel[...]), PRODUCT)


@jax.custom_vjp
def _product(x: Float[Array, "N n_in"], kernel: Float[Array, "n_in n_out"]) -> Float[Array, "N n_out"]:
    return x @ kernel.astype(x.dtype)


def _forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _backward(residuals, d_out):
    x, kernel = residuals
    # By itself, JAX would give the weights' gradient in x's type, and so sum it over devices and micro-batches.
    d_kernel = jnp.einsum("ni,no->io", x, d_out, preferred_element_type=jnp.float32)
    return d_out @ kernel.astype(x.dtype).T, d_kernel.astype(kernel.dtype)


_product.defvjp(_forward, _backward)
