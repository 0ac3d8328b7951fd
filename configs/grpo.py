"""Group relative policy optimization of a fine-tuned model: `--config=configs/grpo.py`, or `configs/grpo.py:demo`.

The model's own answers to a prepared data set's questions, by what they are worth: `config.rewards`. All keys:
`python train.py --help`.
"""

from ml_collections import ConfigDict

from tinysft_jax.training.config import make_config

GRPO = {
    "objective": "grpo",
    "optimizer.learning_rate": 1e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_steps": 20,
    "train.max_steps": 500,
    "train.batch_size": 8,
    "train.log_interval": 1,
    "train.eval_interval": 50,
    "train.eval_batch_size": 64,
    "train.eval_batches": 2,
    "train.save_interval": 50,
}

# Minutes on two CPU cores, from the demo's fine-tuned model.
DEMO = GRPO | {
    "data.seq_len": 512,
    "grpo.tasks": "story",
    "grpo.kl": 0.02,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_steps": 10,
    "train.max_steps": 40,
    "train.eval_interval": 10,
    "train.save_interval": 10,
}


def get_config(preset: str = "") -> ConfigDict:
    return make_config(preset, {"": GRPO, "demo": DEMO})
