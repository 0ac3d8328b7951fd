"""Supervised fine-tuning of a pretrained model: `--config=configs/sft.py`, or a preset: `configs/sft.py:demo`.

All keys, their defaults and meanings: tinysft_jax/training/config.py, or `python train.py --help`.
"""

from ml_collections import ConfigDict

from tinysft_jax.training.config import make_config

# Minutes on two CPU cores, after `configs/pretrain.py:demo`.
DEMO = {
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 50,
    "train.max_steps": 2000,
    "train.batch_size": 2,
    "train.eval_interval": 250,
    "train.eval_batch_size": 8,
    "train.save_interval": 400,
}

# A model of 135 M parameters in 20 minutes on two CPU cores: `make demo-real`.
REAL = {
    "data.seq_len": 512,
    "optimizer.learning_rate": 2e-4,
    "optimizer.warmup_steps": 20,
    "train.max_steps": 300,
    "train.batch_size": 2,
    "train.eval_interval": 100,
    "train.eval_batch_size": 2,
    "train.save_interval": 100,
    "train.keep_checkpoints": 1,
}


def get_config(preset: str = "") -> ConfigDict:
    return make_config(preset, {"": {}, "demo": DEMO, "real": REAL})
