import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import mesh_of
from tiers import slow
from tiny_model import OTHERS, family, random_params

from tinysft_jax import accelerator
from tinysft_jax.attention import backends
from tinysft_jax.data.batches import BatchSource
from tinysft_jax.data.packing import Packing, PackingPlan
from tinysft_jax.data.store import PreparedData
from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.model import GPT
from tinysft_jax.sharding import global_batch, state_sharding
from tinysft_jax.training import loss as loss_module
from tinysft_jax.training.loss import supervised_nll
from tinysft_jax.training.state import make_steps
from tinysft_jax.training.step import make_optimizer, make_train_step, warmup_cosine

CONFIG, PARAMS = family("default"), random_params(family("default"))
OPTIMIZER = make_optimizer(1e-3, 0.01, 0.9, 0.95, 1.0)


def graph_of(name: str, **options) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(family(name), rngs=nnx.Rngs(0), **options)))


@pytest.fixture(scope="module")
def split(chat_data):
    return PreparedData(chat_data).split("train")


@functools.cache
def mean_loss_and_gradient(name: str = "default", **options):
    """Jitted: Σ weight · nll and Σ weight of a batch, and the gradient of their quotient."""
    graph = graph_of(name, **options)

    def mean_loss(params, batch):
        model = nnx.merge(graph, params)
        hidden = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
        nll = supervised_nll(hidden, model.head_table(), batch["targets"], batch["weights"], CONFIG.vocab_size)
        weight = jnp.sum(batch["weights"])
        return nll / weight, (nll, weight)

    return jax.jit(jax.grad(mean_loss, has_aux=True))


@functools.cache
def step_of(name="default", accumulation=1, ema_decay=0.0):
    """Jitted, and shared by the tests: compiling it is most of what they cost."""
    return jax.jit(make_train_step(graph_of(name), OPTIMIZER, lambda step: jnp.float32(1e-3), accumulation, ema_decay))


def first_state(name="default", **more):
    params = random_params(family(name))
    return {"params": params, "opt_state": OPTIMIZER.init(params), "step": jnp.int32(0)} | more


def assert_trees_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


@pytest.fixture(scope="module")
def packed_and_alone(split):
    """Four packed rows, and their conversations a row each; both with rows of padding, so that they have one shape."""
    plan = Packing(split.lengths, 128).epoch()
    packed = BatchSource(split, plan, 4, 128)[0]
    members = plan.order[: int(packed["segment_ids"].max(axis=1).sum())]
    alone = BatchSource(split, PackingPlan(members, np.arange(len(members) + 1)), len(members), 128)[0]
    assert 4 < len(members) <= 24

    def padded(batch):
        return {key: np.pad(rows, ((0, 24 - len(rows)), (0, 0))) for key, rows in batch.items()}

    return padded(packed), padded(alone)


@pytest.mark.parametrize("name", ["default", "everything", *slow(*OTHERS)])
def test_a_packed_row_has_the_loss_and_gradients_of_its_conversations_alone(packed_and_alone, name):
    params, gradient_of = random_params(family(name)), mean_loss_and_gradient(name)
    (gradient, sums), (alone_gradient, alone_sums) = (gradient_of(params, batch) for batch in packed_and_alone)
    np.testing.assert_allclose(sums, alone_sums, rtol=1e-5)
    assert_trees_close(gradient, alone_gradient, atol=1e-5)


HOW = [
    ("default", "full", "on"),
    ("everything", "full", "off"),
    *slow(("default", "dots", "on"), ("everything", "dots", "on"), ("everything", "none", "off")),
    *slow(*itertools.product(OTHERS, ("full",), ("on", "off"))),
]


@pytest.mark.parametrize("how", HOW)
def test_layers_recomputed_or_one_by_one_have_the_same_loss_and_gradients(packed_and_alone, how):
    name, remat, scan_layers = how
    batch, params = packed_and_alone[0], random_params(family(name))
    gradient, sums = mean_loss_and_gradient(name)(params, batch)
    found, found_sums = mean_loss_and_gradient(name, remat=remat, scan_layers=scan_layers)(params, batch)
    np.testing.assert_allclose(found_sums, sums, rtol=1e-6)
    assert_trees_close(found, gradient, atol=1e-6)


@pytest.mark.parametrize("name", ["default", *slow("everything")])
def test_accumulated_micro_batches_equal_one_batch(split, name):
    """With unequal numbers of supervised tokens, and one micro-batch without any."""
    batch = BatchSource(split, Packing(split.lengths, 128).epoch(), 8, 128)[0]
    batch["weights"][1::4] = 0
    batch["weights"][0, 40:] = 0
    whole_state, whole = step_of(name)(first_state(name), batch)
    for accumulation in (2, 4):
        state, metrics = step_of(name, accumulation)(first_state(name), batch)
        assert_trees_close(metrics, whole, rtol=1e-5)
        assert_trees_close(state["opt_state"], whole_state["opt_state"], atol=1e-8)
        # Where a gradient is all but 0, its root mean square that it is divided by is, too.
        assert_trees_close(state["params"], whole_state["params"], atol=2e-6 if name == "default" else 1e-5)


def test_a_batch_without_targets_is_harmless(split):
    batch = BatchSource(split, Packing(split.lengths, 128).epoch(), 8, 128)[0]
    batch["weights"][:] = 0
    state, metrics = step_of()(first_state(), batch)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def losses_on(
    mesh_sizes, split, n_steps: int, evaluates=False, dtype=jnp.float32, name="default", accumulation=1, **options
) -> tuple[list[float], list[int]]:
    """Losses of the first steps of a run on a mesh, and how often the train and evaluation step were compiled."""
    mesh, config = mesh_of(*mesh_sizes), family(name)
    source = BatchSource(split, Packing(split.lengths, 128).epoch(), 8, 128)
    with jax.set_mesh(mesh):
        schedule = warmup_cosine(1e-3, 2, 40)
        optimizer = make_optimizer(schedule, 0.01, 0.9, 0.95, 1.0)
        model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), dtype=dtype, **options))
        steps = make_steps(mesh, model, optimizer, schedule, n_tasks=2, accumulation=accumulation)
        state, losses = steps.create(random_params(config), 0), []
        for index in range(n_steps):
            state, metrics = steps.train(state, global_batch(mesh, source[index % len(source)]))
            losses.append(float(metrics["loss"]))
            if evaluates:
                batch = source[0]
                steps.evaluate(state["params"], global_batch(mesh, batch | {"tasks": np.zeros((8, 1), np.int32)}))
    # Private: nothing public counts the programs that a function was compiled to.
    return losses, [steps.train._cache_size(), steps.evaluate._cache_size()]


@pytest.fixture(scope="module")
def single_losses(split):
    return losses_on((1, 1, 1), split, 50)[0]


MESHES = [
    *[(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)],
    *slow((4, 1, 1), (1, 4, 1), (1, 1, 4), (1, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 1, 2)),
]


@pytest.mark.usefixtures("not_from_disk")
@pytest.mark.parametrize("mesh_sizes", MESHES)
def test_many_devices_give_the_losses_of_one(split, single_losses, mesh_sizes):
    assert single_losses[19] < single_losses[0] - 0.1
    np.testing.assert_allclose(losses_on(mesh_sizes, split, 20)[0], single_losses[:20], rtol=1e-5)


# Where `tensor` divides the heads of keys, and where it does not, and they are whole on each device.
KEY_HEADS = [(2, 2, 2), (2, 1, 4)]


@pytest.mark.usefixtures("not_from_disk")
@pytest.mark.parametrize("name", ["everything", *slow(*OTHERS)])
def test_many_devices_give_the_gradients_of_one(packed_and_alone, name):
    batch, params, config = packed_and_alone[0], random_params(family(name)), family(name)
    gradient, sums = mean_loss_and_gradient(name)(params, batch)
    for mesh_sizes in KEY_HEADS:
        mesh = mesh_of(*mesh_sizes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, state_sharding(mesh, params, config.n_kv_heads))
            found, found_sums = mean_loss_and_gradient(name)(placed, global_batch(mesh, batch))
        np.testing.assert_allclose(found_sums, sums, rtol=1e-6)
        assert_trees_close(jax.device_get(found), gradient, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("not_from_disk")
@pytest.mark.parametrize("name", ["everything", "qwen3"])
def test_many_devices_and_micro_batches_give_the_losses_of_one(split, name):
    single = losses_on((1, 1, 1), split, 20, name=name)[0]
    assert single[-1] < single[0] - 0.1
    for mesh_sizes, accumulation in zip(KEY_HEADS, (2, 1), strict=True):
        many = losses_on(mesh_sizes, split, 20, name=name, accumulation=accumulation)[0]
        np.testing.assert_allclose(many, single, rtol=1e-5)


def test_bfloat16_gives_the_losses_of_float32_within_a_hundredth(split, single_losses):
    halves = losses_on((1, 1, 1), split, 50, dtype=jnp.bfloat16)[0]
    assert single_losses[-1] < single_losses[0] - 0.5
    assert halves != single_losses
    np.testing.assert_allclose(halves, single_losses, rtol=0.01)


def lowered_step(mesh_sizes, platform: str, accumulation: int = 1, **options) -> str:
    """The train step for a platform that need not be there, up to what its compiler does."""
    mesh, config = mesh_of(*mesh_sizes), GPTConfig(vocab_size=260, dim=128, n_layers=3, n_heads=2, max_seq_len=128)
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), **options))
        steps = make_steps(mesh, model, OPTIMIZER, warmup_cosine(1e-3, 2, 40), accumulation=accumulation)
        kinds = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "targets": jnp.int32}
        kinds["weights"] = jnp.float32
        batch = {key: jax.ShapeDtypeStruct((8, 128), dtype) for key, dtype in kinds.items()}
        return steps.train.trace(steps.shapes, batch).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Choices are made as on a Hopper GPU. The libraries ask private functions, which no GPU answers here."""
    monkeypatch.setattr(accelerator, "is_present", lambda: True)
    monkeypatch.setattr(backends, "obstacle", lambda *_: "")
    monkeypatch.setattr(backends, "_fault", lambda *_: "")
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    with contextlib.suppress(ImportError):
        from tokamax._src import gpu_utils

        monkeypatch.setattr(gpu_utils, "_compute_capability", lambda *_: 9.0)
        monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda *_: True)


@pytest.mark.parametrize(("attention", "kernel"), [("xla", ""), ("cudnn", "cudnn"), ("tokamax", "mosaic_gpu")])
@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_step_on_a_gpu_has_no_loop_but_the_heads(as_on_a_gpu, attention, kernel, mesh_sizes):
    """A loop whose length is data is read by the host at each iteration; the head's has one per chunk."""
    if attention == "tokamax":
        pytest.importorskip("tokamax")
    step = lowered_step(mesh_sizes, "cuda", dtype=jnp.bfloat16, attention=attention, scan_layers="off")
    assert "bf16" in step and re.search(kernel, step)
    assert step.count("stablehlo.while") == 1
    assert not re.search(r"stablehlo\.(case|if)\b", step)


@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_step_lowers_for_a_tpu(mesh_sizes, monkeypatch):
    monkeypatch.setattr(accelerator, "is_present", lambda: True)
    assert "bf16" in lowered_step(mesh_sizes, "tpu", 2, dtype=jnp.bfloat16, attention="xla", remat="full")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_is_multiplied_as_float32_on_a_gpu(as_on_a_gpu, dtype):
    """There, the default is TF32. In bfloat16 all products are, also those of the backward pass."""
    products = re.findall(r"stablehlo\.dot_general .*", lowered_step((1, 1, 1), "cuda", dtype=dtype, attention="xla"))
    assert len(products) > 30
    for product in products:
        assert (re.search(r": \(tensor<\S*xf32>", product) is not None) == (dtype == jnp.float32), product
        assert ("precision = [HIGHEST, HIGHEST]" in product) == (dtype == jnp.float32), product


@pytest.mark.parametrize("remat", ["none", *slow("dots", "full")])
def test_layers_that_are_not_a_loop_give_the_same_losses(split, single_losses, remat):
    losses = losses_on((1, 1, 1), split, 20, scan_layers="off", remat=remat)[0]
    np.testing.assert_allclose(losses, single_losses[:20], rtol=1e-5)


@pytest.mark.usefixtures("not_from_disk")
@pytest.mark.parametrize("mesh_sizes", [(1, 1, 1), *slow((2, 2, 2))])
def test_what_an_accelerator_computes_has_the_same_losses(split, single_losses, monkeypatch, mesh_sizes):
    """Larger chunks in the head, attention blocks without loops, layers one by one."""
    monkeypatch.setattr(accelerator, "is_present", lambda: True)
    monkeypatch.setattr(loss_module, "CHUNK", 64)  # below a quarter of the positions
    np.testing.assert_allclose(losses_on(mesh_sizes, split, 20)[0], single_losses[:20], rtol=1e-5)


def test_the_step_compiles_once(split):
    """Over 30 steps, with evaluation in between."""
    assert losses_on((8, 1, 1), split, 30, evaluates=True)[1] == [1, 1]


def test_the_schedule_warms_up_and_comes_down_to_zero():
    schedule = warmup_cosine(2e-5, 500, 10_000)
    np.testing.assert_allclose(
        schedule(jnp.array([0, 249, 499, 500])), np.array([1 / 500, 0.5, 1, 1]) * 2e-5, rtol=1e-6
    )
    np.testing.assert_allclose(schedule(jnp.int32(5250)), 1e-5, rtol=1e-5)
    assert schedule(jnp.int32(10_000)) < 1e-12
    assert warmup_cosine(1.0, 0, 10)(jnp.int32(0)) == 1


@pytest.mark.parametrize("name", ["everything", *slow("default", *OTHERS)])
def test_weight_decay_may_be_for_matrices_only(name):
    """A norm's scale or a bias, stacked over layers, has two axes like a matrix, and is none. An untied head is one."""
    params = random_params(family(name))
    optimizers = {decayed: make_optimizer(1e-3, 0.1, 0.9, 0.95, 1.0, decayed) for decayed in ("all", "matrices")}

    @jax.jit
    def updates(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {decayed: of.update(zeros, of.init(params), params)[0] for decayed, of in optimizers.items()}

    for decayed, changes in updates(params).items():
        for path, change in jax.tree.leaves_with_path(changes):
            leaf, is_matrix = get(params, path), path[-1].key in ("kernel", "embedding")
            assert is_matrix == (leaf.size > 256), path
            np.testing.assert_allclose(change, -1e-4 * leaf * (decayed == "all" or is_matrix), rtol=1e-6)


def get(tree, path):
    return functools.reduce(lambda tree, entry: tree[entry.key], path, tree)


def test_the_average_follows_the_parameters(split):
    """By the formula, with a growing memory first and then the decay asked for."""
    batch = BatchSource(split, Packing(split.lengths, 128).epoch(), 8, 128)[0]
    state, step = first_state(average=PARAMS), step_of(ema_decay=0.25)
    expected = np.asarray(PARAMS["ln_f"]["scale"])
    for decay in (2 / 11, 0.25, 0.25):
        state, _ = step(state, batch)
        expected = decay * expected + (1 - decay) * np.asarray(state["params"]["ln_f"]["scale"])
        np.testing.assert_allclose(state["average"]["ln_f"]["scale"], expected, rtol=1e-6)
    assert not np.allclose(expected, state["params"]["ln_f"]["scale"], rtol=1e-6)


def poisoned(batch):
    """The batch with a weight that is no number, on one token of its last row."""
    weights = batch["weights"].copy()
    weights[-1, np.flatnonzero(weights[-1])[0]] = np.nan
    return batch | {"weights": weights}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_without_a_finite_loss_changes_nothing(split, accumulation):
    """Neither parameters, moments, counts nor the average; the next one is as if it had not been."""
    source = BatchSource(split, Packing(split.lengths, 128).epoch(), 8, 128)
    step = step_of(accumulation=accumulation, ema_decay=0.25)
    before, metrics = step(first_state(average=PARAMS), source[0])
    assert not metrics["skipped"]
    after, metrics = step(before, poisoned(source[1]))
    assert metrics["skipped"] and np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after, before)
    jax.tree.map(np.testing.assert_array_equal, step(after, source[2]), step(before, source[2]))


def test_a_gradient_beyond_float32_changes_nothing(split):
    """With a finite loss, and on several devices, whose state is donated."""
    source = BatchSource(split, Packing(split.lengths, 128).epoch(), 8, 128)
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: GPT(CONFIG, rngs=nnx.Rngs(0)))
        params = jax.tree.map(np.array, PARAMS)
        # The logits are as large as ever, but the embedding's gradient is what it is multiplied by.
        params["tok_emb"]["embedding"] *= np.float32(1e-21)
        params["ln_f"]["bias"] += np.float32(1e21)
        steps = make_steps(mesh, model, OPTIMIZER, lambda step: jnp.float32(1e-3))
        state = steps.create(params, 0)
        before = jax.tree.map(np.asarray, state)
        state, metrics = steps.train(state, global_batch(mesh, source[0]))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"]) and metrics["skipped"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)
