"""Products of matrices, in which float32 means float32, and the linear layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

LINEAR_OUTPUT = "linear_output"  # the name of what remat "dots" saves


def product(equation: str, one: Float[Array, "..."], other: Float[Array, "..."], dtype=None) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays of one dtype, in which float32 means float32.

    By default, a GPU would multiply float32 in TF32, and a TPU in bfloat16. `dtype` is that of sums and result.
    """
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jnp.einsum(equation, one, other, precision=precision, preferred_element_type=dtype)


@jax.custom_vjp
def _matmul(x: Float[Array, "N n_in"], kernel: Float[Array, "n_in n_out"]) -> Float[Array, "N n_out"]:
    return product("ni,io->no", x, kernel.astype(x.dtype))


def _matmul_forward(x, kernel):
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, d_out):
    x, kernel = residuals
    # By default, JAX would return the kernel's gradient in x's dtype, and so sum it over devices and micro-batches.
    d_kernel = product("ni,no->io", x, d_out, jnp.float32)
    return product("no,io->ni", d_out, kernel.astype(x.dtype)), d_kernel.astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """x W, or x W + b; multiplies in x's dtype, and sums the parameters' gradients in float32."""

    def __init__(self, n_in: int, n_out: int, *, std: float = 0.02, bias: bool = False, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (n_in, n_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(n_out, jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "N n_in"]) -> Float[Array, "N n_out"]:
        out = checkpoint_name(_matmul(x, self.kernel[...]), LINEAR_OUTPUT)
        return out if self.bias is None else (out.astype(jnp.float32) + self.bias[...][None]).astype(x.dtype)
