"""AdamW with clipping, and its learning-rate schedule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jnp.ndarray], jnp.ndarray]

DECAYED = ("all", "matrices")


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Linear up to `peak` over the first steps, then half a cosine down to 0 at `total_steps`.

    Step 0 already learns: its rate is peak / warmup_steps.
    """

    def schedule(step):
        warming = (step + 1) / max(warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0, 1)
        return peak * jnp.where(step < warmup_steps, warming, 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return schedule


def make_optimizer(
    learning_rate: float | Schedule,
    weight_decay: float,
    beta1: float,
    beta2: float,
    grad_clip: float,
    decayed: str = "all",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) on gradients clipped to a global norm.

    Args:
      learning_rate: a constant, or a function of the step.
      weight_decay: how fast parameters shrink, as a multiple of the learning rate.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      grad_clip: the global norm above which gradients are scaled down; 0: never.
      decayed: what shrinks: "all" parameters, or "matrices" only (kernels and the table, not the norms).
    """
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    mask = _matrices if decayed == "matrices" else None
    adamw = optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=1e-8, weight_decay=weight_decay, mask=mask)
    return optax.chain(clip, adamw)


def moving_average(average, params, decay: float, step: jax.Array):
    """The exponential moving average of the parameters, `step` steps done; a short memory at first leaves the start.

    The decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's `ExponentialMovingAverage`.
    """
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, average, params)


def _matrices(params):
    """True at each kernel and at the table. Names tell: stacked over layers, a norm's scale has two axes as well."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
