"""Causal attention within segments: the backends, which of them runs, and the proof that it computes what it should."""

import functools
import importlib.util
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from tinysft_jax import accelerator, distributed
from tinysft_jax.attention.blocks import block_attention, static_block_attention
from tinysft_jax.attention.tokamax import tokamax_attention
from tinysft_jax.console import UserError, lacks_memory, reason
from tinysft_jax.sharding import batch_shards, constrain, over_shards

BACKENDS = ("tokamax", "cudnn", "xla")  # the best first
CHOICES = ("auto", *BACKENDS)
# Relative error at which a backend is wrong. Those that are right have up to 0.004, the rounding of bfloat16; one that
# ignores segments has about 1.
TOLERANCE = 0.01
MOST_TOKENS_OF_ALL_HEADS = 2048  # of a row that a proof is made on with as many heads as the model has

Heads = Float[Array, "B T H D"]
KeyHeads = Float[Array, "B T K D"]


def segment_attention(
    q: Heads, k: KeyHeads, v: KeyHeads, segment_ids: Int32[Array, "B T"], backend: str = "auto"
) -> Heads:
    """Softmax(q kᵀ / √D) v over the earlier positions of each query's segment, and itself; padding is a segment, too.

    H / K consecutive query heads share a head of keys and values. A segment's positions are consecutive. No backend
    ignores segments. Raises a UserError if the backend is unknown, can't run here or is wrong.
    """
    # Repeated, every backend takes them, and a mesh divides them as it divides the queries.
    k, v = (jnp.repeat(each, q.shape[2] // each.shape[2], axis=2) for each in (k, v))
    backend = choose_backend(backend, *q.shape[1:], q.dtype)
    return _ATTEND[backend](q, k, v, segment_ids)


def choose_backend(backend: str, seq_len: int, n_heads: int, head_dim: int, dtype) -> str:
    """The backend that will run under the current mesh: of "auto", the best that can run and passes its proof.

    Raises as `segment_attention` does.
    """
    if backend not in CHOICES:
        raise UserError(f"attention backend {backend!r} is not one of {', '.join(CHOICES)}")
    shape = seq_len, n_heads, head_dim, jnp.dtype(dtype), jax.sharding.get_abstract_mesh()
    if backend == "auto":
        return _best_backend(*shape)
    if why := obstacle(backend, dtype, head_dim, seq_len):
        raise UserError(f"attention={backend} can't run here: {why}; use attention=auto or xla")
    if fault := _fault(backend, *shape):
        raise UserError(f"attention={backend} can't be used here: {fault}; use attention=auto or xla")
    return backend


@functools.lru_cache
def _best_backend(seq_len: int, n_heads: int, head_dim: int, dtype: jnp.dtype, mesh) -> str:
    obstacles = {backend: obstacle(backend, dtype, head_dim, seq_len) for backend in BACKENDS}
    distributed.check_same({"what keeps attention backends from running": str(obstacles)})
    for backend in BACKENDS:
        if not obstacles[backend]:
            if not (fault := _fault(backend, seq_len, n_heads, head_dim, dtype, mesh)):
                return backend
            if jax.process_index() == 0:
                print(f"attention={backend} is not used: {fault}", file=sys.stderr)
    raise AssertionError("xla has neither obstacles nor faults")


def obstacle(backend: str, dtype, head_dim: int, seq_len: int) -> str:
    """Why a backend can't run in this process; empty if it can."""
    if backend == "xla":
        return ""
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return "there is no NVIDIA GPU"
    capability = float(device.compute_capability)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {dtype}"
    if backend == "tokamax":
        if not 9 <= capability < 11:
            return f"it needs a Hopper or Blackwell GPU (compute capability 9 or 10), this one has {capability}"
        return "" if importlib.util.find_spec("tokamax") else "it needs tokamax: pip install -e '.[tokamax]'"
    if capability < 8:
        return f"it needs compute capability 8.0, this GPU has {capability}"
    if head_dim > 128 or head_dim % 8:
        return f"it takes heads of a multiple of 8 up to 128, not {head_dim}"
    return f"it takes rows of even length, not {seq_len}" if seq_len % 2 else ""


@functools.lru_cache
def _fault(backend: str, seq_len: int, n_heads: int, head_dim: int, dtype: jnp.dtype, mesh) -> str:
    """What is wrong with a backend under this, the current, mesh; empty if nothing is.

    The blocks in XLA are this project's own: their proof is a test.
    """
    if backend == "xla":
        return ""
    n_rows = 2 * (1 if mesh.empty else batch_shards(mesh))
    if seq_len > MOST_TOKENS_OF_ALL_HEADS:  # where the formula takes gigabytes; heads don't see each other
        n_heads = mesh.shape.get("tensor", 1)
    try:
        errors = relative_errors(backend, n_rows, seq_len, n_heads, head_dim, dtype)
    except Exception as error:  # whatever a library or its compiler raises
        if lacks_memory(error):
            raise
        return f"it fails: {reason(error)}"
    wrong = [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= TOLERANCE]
    return f"it differs from the formula, {', '.join(wrong)} of its norm" if wrong else ""


def relative_errors(backend: str, n_rows: int, seq_len: int, n_heads: int, head_dim: int, dtype) -> dict[str, float]:
    """How far a backend's output and gradients are from those of the formula in float32, on random packed rows.

    ‖difference‖ / ‖formula‖ of "out", "dq", "dk" and "dv".
    """
    # Compiled ahead of the call, because a call of a jitted function in a step that is traced would be traced, too.
    compiled = _relative_errors.lower(backend, n_rows, seq_len, n_heads, head_dim, jnp.dtype(dtype)).compile()
    errors = compiled()
    return dict(zip(("out", "dq", "dk", "dv"), np.asarray(errors).tolist(), strict=True))


@functools.partial(jax.jit, static_argnums=range(6))
def _relative_errors(backend: str, n_rows: int, seq_len: int, n_heads: int, head_dim: int, dtype) -> Float[Array, "4"]:
    segments = constrain(jnp.asarray(_packed_rows(n_rows, seq_len)), "batch", None)
    keys, shape = jax.random.split(jax.random.key(0), 4), (n_rows, seq_len, n_heads, head_dim)
    q, k, v, d_out = (constrain(jax.random.normal(key, shape, dtype), "batch", None, "heads", None) for key in keys)

    def output_and_gradients(attend, dtype):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), *(x.astype(dtype) for x in (q, k, v)))
        return [x.astype(jnp.float32) for x in (out, *pull(d_out.astype(dtype)))]

    found = output_and_gradients(_ATTEND[backend], dtype)
    expected = output_and_gradients(static_block_attention, jnp.float32)
    errors = [jnp.linalg.norm(x - y) / jnp.linalg.norm(y) for x, y in zip(found, expected, strict=True)]
    return constrain(jnp.stack(errors))


def _packed_rows(n_rows: int, seq_len: int) -> Int32[np.ndarray, "B T"]:
    """Segment ids of rows of 1 to 12 segments, and padding in every second row."""
    rng, rows = np.random.default_rng(0), []
    for row in range(n_rows):
        starts = np.sort(rng.integers(0, seq_len, size=rng.integers(12)))
        ids = 1 + np.searchsorted(starts, np.arange(seq_len), side="right")
        rows.append(np.where(ids == ids[-1], 0, ids) if row % 2 else ids)
    return np.array(rows, np.int32)


def _cudnn_attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"]) -> Heads:
    """Segments go in as a mask: with the causal flag alone, conversations in a row would see each other.

    The flag lets cuDNN skip what lies above the diagonal, which a mask alone does not.
    """
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _by_shards(attend: Callable) -> Callable:
    """Each shard attends on its own rows and heads: so what depends on the rows needs no communication."""

    def attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"]) -> Heads:
        divides = q.shape[2] % jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 0
        heads = "batch", None, "heads" if divides else None, None
        return over_shards(attend, (heads, heads, heads, ("batch", None)), heads)(q, k, v, segment_ids)

    return attention


def _xla_attention(q: Heads, k: Heads, v: Heads, segment_ids: Int32[Array, "B T"]) -> Heads:
    """On an accelerator the host would read, at each iteration, whether a loop whose length is data goes on."""
    return (static_block_attention if accelerator.is_present() else block_attention)(q, k, v, segment_ids)


_ATTEND = {
    "tokamax": _by_shards(tokamax_attention),
    "cudnn": _by_shards(_cudnn_attention),
    "xla": _by_shards(_xla_attention),
}
