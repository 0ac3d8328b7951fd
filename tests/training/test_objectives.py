"""DPO and the reward model: their formulas in float64, and what packing, devices and micro-batches may not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from flax import nnx
from runs import mesh_of
from tiers import slow
from tiny_model import family, random_params

from tinysft_jax.data.batches import BatchSource, by_segment
from tinysft_jax.data.packing import Packing, PackingPlan
from tinysft_jax.data.store import PreparedData
from tinysft_jax.model import GPT
from tinysft_jax.sharding import global_batch
from tinysft_jax.training.objectives import DPO, RewardModel
from tinysft_jax.training.state import make_steps
from tinysft_jax.training.step import make_eval_step, make_likelihood_step, make_optimizer, warmup_cosine

SEQ_LEN, N_SEGMENTS = 128, 12
OBJECTIVES = {
    "dpo": DPO(N_SEGMENTS, beta=0.3),
    "dpo of a token": DPO(N_SEGMENTS, beta=7.0, length_normalized=True),
    "dpo with sft": DPO(N_SEGMENTS, beta=0.3, sft_weight=0.7),
    "reward": RewardModel(N_SEGMENTS),
}


def shape_of(name: str):
    return family("default", scalar_head=name == "reward")


def params_of(name: str):
    """Random ones; those of a reward model with a head that is not 0."""
    params = random_params(shape_of(name))
    if name == "reward":
        params["score"] = np.random.default_rng(1).normal(size=params["score"].shape).astype(np.float32)
    return params


@pytest.fixture(scope="module")
def split(pair_data):
    return PreparedData(pair_data).split("train")


@pytest.fixture(scope="module")
def reference(split):
    """Of each conversation, near its log-likelihood under the random model."""
    return np.random.default_rng(0).normal(-5.6, 0.2, len(split)).astype(np.float32) * split.lengths


def batch_of(split, reference, plan: PackingPlan, n_rows: int, index: int = 0):
    source = BatchSource(split, plan, n_rows, SEQ_LEN)
    values = [reference[source.segments_of(row)] for row in source.rows(index)]
    return source[index] | {"reference": by_segment(values, N_SEGMENTS)}


@pytest.fixture(scope="module")
def packed(split, reference):
    """Four rows, the last one empty."""
    plan = Packing(split.item_lengths, SEQ_LEN).epoch().first(3)
    batch = batch_of(split, reference, plan, 4)
    assert 2 < batch["segment_ids"].max() <= N_SEGMENTS and not batch["segment_ids"][3].any()
    return plan, batch


def graph_of(name: str, **options) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(shape_of(name), rngs=nnx.Rngs(0), **options)))


def scaled(tree, factor: float):
    return jax.tree.map(lambda leaf: factor * leaf, tree)


@functools.cache
def mean_loss_and_gradient(name: str):
    """Jitted: the sums of a batch, and the gradient of the mean loss."""
    graph = graph_of(name)

    def mean_loss(params, batch):
        sums = OBJECTIVES[name].sums(nnx.merge(graph, params), batch)
        return sums["loss"] / sums["normalizer"], sums

    return jax.jit(jax.grad(mean_loss, has_aux=True))


def plain_loss(name: str, params, split, reference, pairs) -> float:
    """The mean loss of pairs in float64, each conversation computed by itself."""
    objective, losses = OBJECTIVES[name], []
    for pair in pairs:
        values, nll = [], []
        for conversation in (2 * pair, 2 * pair + 1):
            ids, supervised = split.conversation(conversation)
            if name == "reward":
                values.append(numpy_gpt.hidden(shape_of(name), params, ids)[-1] @ np.float64(params["score"]))
                continue
            logits = numpy_gpt.logits(shape_of(name), params, ids)
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            answer = [log_p[i - 1, ids[i]] for i in range(1, len(ids)) if supervised[i]]
            ratio = sum(answer) - float(reference[conversation])
            values.append(ratio / len(answer) if objective.length_normalized else ratio)
            nll.append(-np.mean(answer))
        beta = 1 if name == "reward" else objective.beta
        losses.append(-np.log(1 / (1 + np.exp(-beta * (values[0] - values[1])))))
        losses[-1] += 0 if name == "reward" else objective.sft_weight * nll[0]
    return float(np.mean(losses))


@pytest.mark.parametrize("name", [*slow("dpo"), "dpo of a token", "dpo with sft", "reward"])
def test_loss_and_gradient_are_those_of_the_formula_in_float64(split, reference, packed, name):
    """The gradient along a random direction: the formula's difference between two points near by."""
    plan, batch = packed
    params = jax.tree.map(np.float64, params_of(name))
    gradient, sums = mean_loss_and_gradient(name)(jax.tree.map(np.float32, params), batch)
    loss = functools.partial(plain_loss, name, split=split, reference=reference, pairs=plan.order)
    assert sums["normalizer"] == len(plan.order)
    np.testing.assert_allclose(sums["loss"] / sums["normalizer"], loss(params), rtol=1e-5)
    draws = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape), params)
    ahead, behind = (loss(jax.tree.map(np.add, params, scaled(direction, by))) for by in (1e-6, -1e-6))
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradient, direction)))
    np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=1e-4)


def test_figures_are_what_they_are_called(split, reference, packed):
    plan, batch = packed
    _, sums = mean_loss_and_gradient("dpo")(params_of("dpo"), batch)
    n, ratios = len(plan.order), []
    for pair in plan.order:
        for conversation in (2 * pair, 2 * pair + 1):
            ids, supervised = split.conversation(conversation)
            logits = numpy_gpt.logits(shape_of("dpo"), params_of("dpo"), ids)
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            ratios.append(sum(log_p[i - 1, ids[i]] for i in range(1, len(ids)) if supervised[i]))
            ratios[-1] -= reference[conversation]
    chosen, rejected = np.array(ratios[::2]), np.array(ratios[1::2])
    means = {name: value / n for name, value in sums.items()}
    assert means["chosen"] == pytest.approx(chosen.mean(), abs=1e-4)
    assert means["rejected"] == pytest.approx(rejected.mean(), abs=1e-4)
    assert means["margin"] == pytest.approx(0.3 * (chosen - rejected).mean(), abs=1e-4)
    assert means["accuracy"] == (chosen > rejected).mean() and 0 < means["accuracy"] < 1


@pytest.mark.parametrize("name", ["dpo with sft", "reward", *slow("dpo", "dpo of a token")])
def test_packed_pairs_have_the_sums_and_gradients_of_pairs_alone(split, reference, packed, name):
    plan, batch = packed
    alone = PackingPlan(plan.order, np.arange(len(plan.order) + 1))
    rows = batch_of(split, reference, alone, 16)
    (gradient, sums), (alone_gradient, alone_sums) = (
        mean_loss_and_gradient(name)(params_of(name), each) for each in (batch, rows)
    )
    for key in sums:
        np.testing.assert_allclose(sums[key], alone_sums[key], rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradient, alone_gradient)


def test_sums_by_task_are_those_of_the_pairs_of_each_task(split, reference, packed):
    plan, batch = packed
    for name in ("dpo", "reward"):
        eval_step = jax.jit(make_eval_step(graph_of(name), 3, OBJECTIVES[name]))
        tasks = np.full((4, N_SEGMENTS), 2, np.int32)
        tasks[:, :2] = 1
        by_task = eval_step(params_of(name), batch | {"tasks": tasks})
        _, sums = mean_loss_and_gradient(name)(params_of(name), batch)
        for key, of in by_task.items():
            np.testing.assert_allclose(of.sum(), sums[key], rtol=1e-5, atol=1e-4)
        assert by_task["normalizer"].tolist() == [0, 3, len(plan.order) - 3]


def test_against_itself_a_model_has_no_margin(packed):
    _, batch = packed
    found = jax.jit(make_likelihood_step(graph_of("dpo"), N_SEGMENTS))(params_of("dpo"), batch)
    _, sums = mean_loss_and_gradient("dpo")(params_of("dpo"), batch | {"reference": found})
    assert found.shape == (4, N_SEGMENTS) and (found[:3, :2] < 0).all()
    np.testing.assert_allclose(sums["loss"] / sums["normalizer"], np.log(2), rtol=1e-6)
    assert abs(sums["chosen"]) < 1e-3 and abs(sums["rejected"]) < 1e-3


def run_steps(name: str, split, reference, mesh_sizes, accumulation: int = 1, n_steps: int = 10):
    """Each step's metrics, and the last parameters."""
    mesh, plan, found = mesh_of(*mesh_sizes), Packing(split.item_lengths, SEQ_LEN).epoch(), []
    with jax.set_mesh(mesh):
        schedule = warmup_cosine(1e-3, 2, 40)
        model = nnx.eval_shape(lambda: GPT(shape_of(name), rngs=nnx.Rngs(0)))
        optimizer = make_optimizer(schedule, 0.01, 0.9, 0.95, 1.0)
        steps = make_steps(mesh, model, optimizer, schedule, 1, accumulation, objective=OBJECTIVES[name])
        state = steps.create(params_of(name), 0)
        for index in range(n_steps):
            batch = batch_of(split, reference, plan, 8, index % (len(plan) // 8))
            state, metrics = steps.train(state, global_batch(mesh, batch))
            found.append(jax.device_get(metrics))
        assert steps.train._cache_size() == 1  # private: nothing public counts the programs
        return found, jax.device_get(state["params"])


@pytest.fixture(scope="module")
def single_run(split, reference):
    return functools.cache(lambda name: run_steps(name, split, reference, (1, 1, 1)))


@pytest.mark.parametrize("name", ["dpo with sft", *slow("reward")])
@pytest.mark.parametrize("how", [((2, 2, 2), 2), *slow(((8, 1, 1), 1), ((1, 1, 8), 4), ((1, 1, 1), 4))])
def test_devices_and_micro_batches_of_unequal_counts_change_nothing(
    split, reference, single_run, name, how, not_from_disk
):
    single, params = single_run(name)
    assert single[-1]["loss"] < single[0]["loss"] - 0.1 and len({each["tokens"].item() for each in single}) > 1
    many, many_params = run_steps(name, split, reference, *how)
    for one, other in zip(single, many, strict=True):
        for key in one:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-3 if key == "margin" else 1e-4, atol=2e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), many_params, params)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_bfloat16_gives_nearly_the_same(packed, name):
    _, batch = packed
    graph = graph_of(name, dtype=jnp.bfloat16)
    sums = jax.jit(lambda params, batch: OBJECTIVES[name].sums(nnx.merge(graph, params), batch))(params_of(name), batch)
    _, exact = mean_loss_and_gradient(name)(params_of(name), batch)
    np.testing.assert_allclose(sums["loss"], exact["loss"], rtol=0.03)
    assert sums["loss"] != exact["loss"]
