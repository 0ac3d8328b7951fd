"""DPO against TRL's trainer, from the same exported model on the same pairs."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from runs import mesh_of
from tiny_model import family, random_params

from tinysft_jax import export
from tinysft_jax.checkpoints import open_model
from tinysft_jax.data.batches import make_batch
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription
from tinysft_jax.sharding import global_batch
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.objectives import DPO
from tinysft_jax.training.state import make_steps
from tinysft_jax.training.step import make_likelihood_step, make_optimizer

PAIRS, BETA = 4, 0.5
RATE = 1e-4  # a weight whose gradient is all but 0 takes its first step of Adam in either direction


@pytest.mark.slow
def test_the_first_losses_are_those_of_trl(tmp_path, pair_data):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizer, config = ChatTokenizer(bpe_ranks=256), family("default")
    description = ModelDescription(config, **tokenizer.description(), source={})
    (tmp_path / "model").mkdir()
    export.write("huggingface", tmp_path / "model", random_params(config), description, "model")
    lines = [json.loads(line) for line in (pair_data.parent / "pairs.jsonl").read_text().splitlines()[: 3 * PAIRS]]
    for line in lines:
        for side in ("chosen", "rejected"):
            line[side] = [{"role": "assistant", "content": line[side]}]
    theirs, batches = [], []

    class Trainer(trl.DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            found = super()._compute_loss(model, inputs, return_outputs)
            batches.append({key: inputs[key].numpy() for key in ("input_ids", "attention_mask", "completion_mask")})
            theirs.append(float(found[0] if isinstance(found, tuple) else found))
            return found

    options = {
        "beta": BETA,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": PAIRS,
    }
    options |= {"adam_beta2": 0.95, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_steps": 3, "use_cpu": True}
    options |= {"bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no"}
    Trainer(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32"),
        args=trl.DPOConfig(str(tmp_path / "trl"), **options),
        train_dataset=datasets.Dataset.from_list(lines),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
    ).train()
    ours = our_losses(open_model(tmp_path / "model"), batches, [tokenizer.encode_chat(whole(line)) for line in lines])
    assert theirs[0] == pytest.approx(np.log(2), abs=1e-6) and theirs[2] < theirs[0] - 0.02
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def whole(line):
    return line["prompt"] + line["chosen"]


def our_losses(model, batches, encoded) -> list[float]:
    """Of two packed rows with the pairs of TRL's batches, whose chosen conversations must be encoded as here."""
    (description, params), losses = model, []
    shape, mesh, objective = description.config, mesh_of(1, 1, 1), DPO(PAIRS, BETA)
    known = {tuple(ids.tolist()): supervised for ids, supervised in encoded}
    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(lambda: GPT(shape, rngs=nnx.Rngs(0)))
        optimizer = make_optimizer(RATE, 0.0, 0.9, 0.95, 1.0)
        steps = make_steps(mesh, abstract, optimizer, lambda _: np.float32(RATE), objective=objective)
        reference = jax.jit(make_likelihood_step(nnx.graphdef(abstract), PAIRS))
        state = steps.create(params, 0)
        for each in batches:
            row = []
            for pair in range(PAIRS):
                for index in (pair, PAIRS + pair):
                    here = each["attention_mask"][index] > 0
                    row.append((each["input_ids"][index][here], each["completion_mask"][index][here] > 0))
                np.testing.assert_array_equal(row[-2][1], known[tuple(row[-2][0].tolist())])
            batch = make_batch([row[:PAIRS], row[PAIRS:]], 128)
            batch["reference"] = np.asarray(reference(params, batch))
            state, metrics = steps.train(state, global_batch(mesh, batch))
            losses.append(float(metrics["loss"]))
    return losses
