"""A reward model, from a fine-tuned model and pairs: `--config=configs/reward.py`, or `configs/reward.py:demo`.

The data is prepared with `--format preference-jsonl`. All keys: `python train.py --help`.
"""

from ml_collections import ConfigDict

from tinysft_jax.training.config import make_config

REWARD = {
    "objective": "reward",
    "optimizer.learning_rate": 1e-5,
    "optimizer.warmup_steps": 50,
    "train.max_steps": 1000,
    "train.batch_size": 16,
    "train.eval_interval": 100,
}

# Minutes on two CPU cores, from the demo's fine-tuned model.
DEMO = REWARD | {
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 20,
    "train.max_steps": 400,
    "train.batch_size": 4,
    "train.eval_interval": 50,
    "train.eval_batch_size": 8,
    "train.eval_batches": 4,
    "train.save_interval": 100,
}


def get_config(preset: str = "") -> ConfigDict:
    return make_config(preset, {"": REWARD, "demo": DEMO})
