"""GRPO: its formula in float64, what packing, devices and micro-batches may not change, sampler against trainer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from flax import nnx
from runs import mesh_of, tiny_config
from tiers import slow
from tiny_model import family, random_params

from tinysft_jax.model import GPT
from tinysft_jax.parameters import make_model
from tinysft_jax.rewards.cases import Case
from tinysft_jax.rewards.registry import Answered
from tinysft_jax.sampling.decode import Decoder, Drawn
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sharding import global_batch
from tinysft_jax.training.loss import Softmax
from tinysft_jax.training.objectives import GRPO, token_log_probs
from tinysft_jax.training.rollout import Sampled, advantages, make_training_batch, micro_batches
from tinysft_jax.training.state import make_steps
from tinysft_jax.training.step import make_optimizer, warmup_cosine

SHAPE = family("default")
SOFTMAX = Softmax(SHAPE.vocab_size, 0.7, forbidden=(3, 5))
N, LONGEST = 12, 40


def grpo_config(**changes):
    """Three groups of four answers."""
    small = {"grpo__prompts": 3, "grpo__group_size": 4, "grpo__temperature": 0.7, "data__seq_len": 64}
    return tiny_config("", objective="grpo", **small | {"train__batch_size": 4, **changes})


def log_p_of(params, answer: Sampled) -> np.ndarray:
    """The log-probability of each token that was drawn, by NumPy."""
    ids, given = answer.sequence()
    logits = numpy_gpt.logits(SHAPE, params, np.array(ids))[given - 1 : -1] / SOFTMAX.temperature
    logits[:, list(SOFTMAX.forbidden)] = -np.inf
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.array([row[token] for row, token in zip(log_p, ids[given:], strict=True)])


@functools.cache
def make_answers(own: bool = False) -> tuple[list[Sampled], np.ndarray]:
    """Answers of random tokens, near whose log-probabilities the sampler's and the start's are, and their advantages.

    With `own`, the sampler's are the model's own. Two answers have no advantage, and one of them no reward.
    """
    draws, params, found = np.random.default_rng(0), random_params(SHAPE), []
    allowed = np.setdiff1d(np.arange(SHAPE.vocab_size), SOFTMAX.forbidden)
    for number in range(N):
        prompt, ids = draws.choice(allowed, draws.integers(3, 9)), draws.choice(allowed, draws.integers(2, 20))
        case = Case("story", "?", "", prompt=prompt.tolist())
        reward = None if number == 1 else 0.5
        answer = Sampled(case, Drawn(ids.tolist(), []), np.zeros(0), Answered(case, "", True), reward, {})
        log_p = log_p_of(params, answer)
        noise = 0 if own else draws.normal(0, 0.2, len(ids))
        drawn = Drawn(ids.tolist(), (log_p + noise).tolist())
        found.append(answer._replace(drawn=drawn, start=np.float32(log_p + draws.normal(0, 0.3, len(ids)))))
    worth = draws.normal(size=N)
    worth[[1, 6]] = 0
    return found, worth


def batch_of(config, **changes):
    answers, worth = make_answers(**changes)
    return make_training_batch(config, answers, worth, LONGEST)


@functools.cache
def mean_loss_and_gradient(kl: float = 0.0):
    """Jitted: the gradient of the mean loss, and the sums."""
    objective, graph = GRPO(1, SOFTMAX, 0.2, kl), nnx.graphdef(nnx.eval_shape(lambda: GPT(SHAPE, rngs=nnx.Rngs(0))))

    def mean_loss(params, batch):
        sums = objective.sums(nnx.merge(graph, params), batch)
        return sums["loss"] / sums["normalizer"], sums

    return jax.jit(jax.grad(mean_loss, has_aux=True))


def plain_loss(params, kl: float, normalizer: str) -> float:
    """The formula in float64, each answer computed by itself."""
    answers, worth = make_answers()
    total = 0.0
    for answer, advantage in zip(answers, worth, strict=True):
        log_p = log_p_of(params, answer)
        ratio = np.exp(log_p - np.array(answer.drawn.log_probs))
        total -= np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).sum()
        if answer.reward is not None:
            rest = np.float64(answer.start) - log_p
            total += kl * (np.exp(rest) - rest - 1).sum()
    lengths = [len(answer.drawn.ids) for answer in answers if answer.reward is not None]
    return total / (N * LONGEST if normalizer == "constant" else sum(lengths))


def moved(params, direction, by: float):
    return jax.tree.map(lambda leaf, d: leaf + by * d, params, direction)


def along(gradient, direction) -> float:
    return sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradient, direction)))


@pytest.mark.parametrize("normalizer", ["constant", "tokens"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_loss_and_gradient_are_those_of_the_formula_in_float64(kl, normalizer):
    batch = batch_of(grpo_config(grpo__kl=kl, grpo__normalizer=normalizer))
    params = jax.tree.map(np.float64, random_params(SHAPE))
    gradient, sums = mean_loss_and_gradient(kl)(jax.tree.map(np.float32, params), batch)
    n_trained = sum(len(answer.drawn.ids) for i, answer in enumerate(make_answers()[0]) if i != 1 and (kl or i != 6))
    assert sums["normalizer"] == n_trained and 0 < sums["clip"] < n_trained
    np.testing.assert_allclose(sums["loss"] / n_trained, plain_loss(params, kl, normalizer), rtol=1e-5)
    draws = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape), params)
    ahead, behind = (plain_loss(moved(params, direction, by), kl, normalizer) for by in (1e-6, -1e-6))
    np.testing.assert_allclose(along(gradient, direction), (ahead - behind) / 2e-6, rtol=1e-4)


def test_the_first_gradient_is_that_of_reinforce_with_a_baseline():
    """Of −Σ advantage · log p, where the sampler's probabilities are the model's own."""
    gradient, sums = mean_loss_and_gradient()(random_params(SHAPE), batch_of(grpo_config(), own=True))
    assert sums["clip"] == 0 and sums["gap"] / sums["normalizer"] < 1e-5
    answers, worth = make_answers(own=True)

    def reinforce(params) -> float:
        return -sum(a * log_p_of(params, each).sum() for each, a in zip(answers, worth, strict=True)) / (N * LONGEST)

    draws, params = np.random.default_rng(2), jax.tree.map(np.float64, random_params(SHAPE))
    direction = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape), params)
    ahead, behind = (reinforce(moved(params, direction, by)) for by in (1e-6, -1e-6))
    np.testing.assert_allclose(along(gradient, direction), (ahead - behind) / 2e-6, rtol=1e-4)


def test_another_packing_has_the_same_sums_and_gradients():
    batches = [batch_of(grpo_config(data__seq_len=seq_len)) for seq_len in (64, 32)]
    (gradient, sums), (other, other_sums) = (mean_loss_and_gradient()(random_params(SHAPE), each) for each in batches)
    n_rows = [np.count_nonzero(each["segment_ids"].any(axis=1)) for each in batches]
    assert n_rows[0] < n_rows[1] <= N
    for key in sums:
        np.testing.assert_allclose(sums[key], other_sums[key], rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), gradient, other)


def run_steps(mesh_sizes, batch_size: int, worth=None, n_steps: int = 3):
    """Each step's metrics, and the parameters at the end."""
    config, mesh, found = grpo_config(train__batch_size=batch_size), mesh_of(*mesh_sizes), []
    answers, drawn_worth = make_answers()
    worth = drawn_worth if worth is None else worth
    with jax.set_mesh(mesh):
        schedule = warmup_cosine(1e-3, 2, 40)
        model = nnx.eval_shape(lambda: GPT(SHAPE, rngs=nnx.Rngs(0)))
        optimizer = make_optimizer(schedule, 0.0, 0.9, 0.95, 1.0)
        objective = GRPO(1, SOFTMAX, 0.2, 0.0)
        steps = make_steps(mesh, model, optimizer, schedule, 1, micro_batches(config), objective=objective)
        state = steps.create(random_params(SHAPE), 0)
        for step in range(n_steps):
            batch = make_training_batch(config, answers, np.roll(worth, step), LONGEST)
            state, metrics = steps.train(state, global_batch(mesh, batch))
            found.append(jax.device_get(metrics))
        assert steps.train._cache_size() == 1  # private: nothing public counts the programs
        return found, jax.device_get(state["params"])


@pytest.mark.parametrize("how", [((2, 2, 2), 4), ((1, 1, 1), 1), *slow(((8, 1, 1), 8), ((1, 1, 8), 2))])
def test_devices_and_empty_micro_batches_change_nothing(how, not_from_disk):
    single, params = run_steps((1, 1, 1), 12)
    many, many_params = run_steps(*how)
    assert len({each["tokens"].item() for each in single}) > 1
    if how[1] == 1:
        assert many[0]["positions"] < single[0]["positions"] == N * 64, "empty ones are not computed"
    for one, other in zip(single, many, strict=True):
        for key in one.keys() - {"positions"}:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), many_params, params)


def test_empty_micro_batches_are_not_computed():
    computed = []

    class Counting(GRPO):
        def sums(self, model, batch):
            jax.debug.callback(lambda: computed.append(1))
            return super().sums(model, batch)

    config, mesh = grpo_config(train__batch_size=2), mesh_of(1, 1, 1)
    batch = batch_of(config)
    n_rows = int(batch["segment_ids"].any(axis=1).sum())
    with jax.set_mesh(mesh):
        model, optimizer = (
            nnx.eval_shape(lambda: GPT(SHAPE, rngs=nnx.Rngs(0))),
            make_optimizer(1e-3, 0.0, 0.9, 0.95, 1.0),
        )
        options = {"accumulation": micro_batches(config), "objective": Counting(1, SOFTMAX)}
        steps = make_steps(mesh, model, optimizer, lambda _: jnp.float32(1e-3), **options)
        steps.train(steps.create(random_params(SHAPE), 0), global_batch(mesh, batch))
        jax.effects_barrier()
    assert len(computed) == -(-n_rows // 2) < micro_batches(config)


def test_answers_that_are_worth_the_same_change_nothing():
    metrics, params = run_steps((1, 1, 1), 4, worth=np.zeros(N), n_steps=1)
    assert metrics[0]["positions"] == 0 and metrics[0]["grad_norm"] == 0 and not metrics[0]["skipped"]
    jax.tree.map(np.testing.assert_array_equal, params, random_params(SHAPE))


def test_advantages():
    rewards = [1.0, 0.0, 0.5, 0.5, 0.3, 0.3 + 1e-12, 0.3, 0.3, None, 1.0, 0.0, None, None, None, None, None]
    expected = [0.5, -0.5, 0, 0, 0, 0, 0, 0, 0, 0.5, -0.5, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(advantages(rewards, 4, by_deviation=False), expected, atol=1e-15)
    deviations = np.repeat([np.sqrt(1 / 8), 1, 0.5, 1], 4) + 1e-4
    np.testing.assert_allclose(advantages(rewards, 4, by_deviation=True), expected / deviations, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_log_probabilities_are_the_trainers(temperature):
    """Over rows that end at different times, with ids that are forbidden in both."""
    params, draws = random_params(SHAPE), np.random.default_rng(0)
    forbidden, stop = tuple(range(200, 260)), tuple(range(10))
    options = SamplingOptions(60, temperature, top_k=0, seed=3, stop_ids=stop, forbidden_ids=forbidden)
    prompts = [draws.integers(0, 200, n) for n in draws.integers(3, 30, 24)]
    drawn = Decoder(SHAPE, params, np.dtype("float32")).sample(prompts, options)
    assert len({len(answer.ids) for answer in drawn}) > 5 and max(len(answer.ids) for answer in drawn) > 20
    answers = [
        Sampled(case := Case("", "", "", prompt=prompt.tolist()), each, np.zeros(0), Answered(case, "", True), 1.0, {})
        for prompt, each in zip(prompts, drawn, strict=True)
    ]
    config = grpo_config(grpo__prompts=24, data__seq_len=128)
    batch = make_training_batch(config, answers, np.ones(24), LONGEST)
    softmax = Softmax(SHAPE.vocab_size, temperature, forbidden)
    log_p = token_log_probs(make_model(SHAPE, params), {key: jnp.asarray(of) for key, of in batch.items()}, softmax)
    is_trained = batch["weights"] > 0
    assert is_trained.sum() == sum(len(answer.ids) for answer in drawn)
    np.testing.assert_allclose(np.asarray(log_p)[is_trained], batch["log_probs"][is_trained], atol=1e-4)
