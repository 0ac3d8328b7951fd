"""Pretraining on plain stories: `--config=configs/pretrain.py`, or `configs/pretrain.py:demo`.

The data is prepared with `--format text`: every token but the first is supervised.
"""

from ml_collections import ConfigDict

from tinysft_jax.training.config import make_config

PRETRAIN = {
    "optimizer.learning_rate": 2e-4,
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_steps": 2000,
    "train.max_steps": 100_000,
    "train.batch_size": 32,
    "train.eval_interval": 2000,
    "train.save_interval": 2000,
}

# A small model in minutes on two CPU cores.
DEMO = PRETRAIN | {
    "model.dim": 128,
    "model.n_layers": 4,
    "model.n_heads": 4,
    "optimizer.learning_rate": 5e-3,
    "optimizer.warmup_steps": 50,
    "train.max_steps": 600,
    "train.batch_size": 2,
    "train.eval_interval": 75,
    "train.eval_batch_size": 8,
    "train.save_interval": 200,
}


def get_config(preset: str = "") -> ConfigDict:
    return make_config(preset, {"": PRETRAIN, "demo": DEMO})
