"""The train step that benchmarks compile or run, set up as a run would be."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.parameters import Params
from tinysft_jax.training.state import make_steps
from tinysft_jax.training.step import TrainState, make_optimizer, warmup_cosine


def make_step(
    config: GPTConfig,
    mesh: Mesh,
    dtype,
    remat: str = "none",
    attention: str = "auto",
    scan_layers: str = "auto",
    params: Params | None = None,
) -> tuple[Callable, TrainState, Callable[[], TrainState]]:
    """Within `jax.set_mesh(mesh)`: the jitted step, the shapes of its state, and what creates that state.

    It starts from `params`, by default random ones.
    """
    schedule = warmup_cosine(2e-5, 500, 10_000)
    optimizer = make_optimizer(schedule, 0.01, 0.9, 0.95, 1.0)
    options = {"dtype": dtype, "remat": remat, "attention": attention, "scan_layers": scan_layers}
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), **options))
    steps = make_steps(mesh, model, optimizer, schedule)
    shapes = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), steps.shapes, steps.shardings)
    return steps.train, shapes, lambda: steps.create(params, 0)
