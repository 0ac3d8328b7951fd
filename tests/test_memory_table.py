"""The formula of benchmarks/memory.py against what JAX keeps, and against what XLA takes."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiers import slow
from tiny_model import OTHERS, family

from tinysft_jax.model import GPT
from tinysft_jax.parameters import count_parameters
from tinysft_jax.training.loss import supervised_nll

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import memory

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
ROWS, LENGTH = 4, 256
SHAPE = {"dim": 64, "n_layers": 6, "vocab_size": 2048, "max_seq_len": LENGTH}
KINDS = dict.fromkeys(("tokens", "segment_ids", "positions", "targets"), jnp.int32) | {"weights": jnp.float32}
BATCH = {key: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for key, dtype in KINDS.items()}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("SmolLM2-360M", 361_821_120),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen3-0.6B", 596_049_920),
        ("TinyLlama-1.1B", 1_100_048_384),
        ("Llama-3.2-1B", 1_235_814_400),
    ],
)
def test_models_have_as_many_parameters_as_published(name, published):
    assert count_parameters(memory.MODELS[name]) == published


def loss_and_parameters(config, dtype, remat: str):
    graph, params = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat)))

    def loss(params, batch):
        model = nnx.merge(graph, params)
        hidden = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
        return supervised_nll(hidden, model.head_table(), batch["targets"], batch["weights"], config.vocab_size)

    return loss, nnx.to_pure_dict(params)


def residual_bytes(config, dtype, remat: str) -> int:
    """Of the arrays that the gradient's program takes over from the loss's, without those that went in."""
    loss, params = loss_and_parameters(config, dtype, remat)
    program = jax.make_jaxpr(lambda params, batch: jax.vjp(loss, params, batch)[1])(params, BATCH).jaxpr
    went_in = set(map(id, program.invars))
    kept = {id(each): each.aval for each in program.outvars if id(each) not in went_in}
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ["default", "everything", *slow(*OTHERS)])
def test_the_formula_counts_what_jax_keeps(name, remat):
    config = family(name, **SHAPE)
    for dtype in (jnp.bfloat16, *([jnp.float32] if name == "everything" else [])):
        # Without the gradient by the head's table, which is computed with the loss.
        found = residual_bytes(config, dtype, remat) - 4 * config.padded_vocab_size * config.dim
        expected = memory.kept_bytes(config, ROWS * LENGTH, remat, jnp.dtype(dtype).itemsize)
        assert expected == pytest.approx(found, rel=0.1 if remat == "full" else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ["default", "llama", "everything"])
def test_the_formula_is_near_what_xla_takes(name, remat):
    """For gradients and activations, on a CPU in float32."""
    config = family(name, **SHAPE | {"dim": 128})
    loss, params = loss_and_parameters(config, jnp.float32, remat)
    analysis = jax.jit(jax.value_and_grad(loss)).lower(params, BATCH).compile().memory_analysis()
    taken = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    expected = 4 * count_parameters(config) + memory.activation_bytes(config, ROWS * LENGTH, remat, 4, chunk=512)
    assert expected == pytest.approx(taken, rel=0.1)


def test_the_page_has_the_table():
    assert memory.table(4 * 1024) in PAGE.read_text(encoding="utf-8")


def test_what_fits_follows_the_totals():
    gib = memory.GIB
    assert memory.fits(6 * gib, 1 * gib) == ["yes"] * 4
    assert memory.fits(13 * gib, 7 * gib) == ["no", "remat", "yes", "yes"]
    assert memory.fits(61 * gib, 60 * gib) == ["no", "no", "no", "remat"]
