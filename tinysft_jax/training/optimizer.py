"""AdamW with clipping, and its learning-rate schedule."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

Schedule = Callable[[jnp.ndarray], jnp.ndarray]


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
    learning_rate: float | Schedule, weight_decay: float, beta1: float, beta2: float, grad_clip: float
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) on gradients clipped to a global norm.

    Args:
      learning_rate: a constant, or a function of the step.
      weight_decay: of every parameter.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      grad_clip: the global norm above which gradients are scaled down; 0: never.
    """
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return optax.chain(clip, optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=1e-8, weight_decay=weight_decay))
