"""A linear layer: multiplied in its input's precision, its weights' gradient summed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

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
