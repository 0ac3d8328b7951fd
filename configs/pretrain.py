"""Pretraining on plain stories, for those who have no checkpoint: `--config=configs/pretrain.py`.

The data is prepared with `--format text`: every token but the first is supervised.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    config = _sft_config()
    with config.unlocked():
        config.optimizer.learning_rate = 2e-4
        config.optimizer.weight_decay = 0.1
        config.optimizer.warmup_steps = 2000
        config.train.max_steps = 100_000
        config.train.batch_size = 32
        config.train.eval_interval = 2000
        config.train.save_interval = 2000
        if preset == "demo":
            _demo(config)
        elif preset:
            raise ValueError(f"configs/pretrain.py has no preset {preset!r}; it has: demo")
    return config


def _demo(config: ConfigDict) -> None:
    """A small model in minutes on two CPU cores."""
    config.model.dim = 128
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.max_seq_len = 1024
    config.data.seq_len = 1024
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 50
    config.train.max_steps = 600
    config.train.batch_size = 2
    config.train.eval_interval = 150
    config.train.eval_batch_size = 8
    config.train.save_interval = 200


def _sft_config() -> ConfigDict:
    """Fine-tuning's settings; only what differs stands here."""
    path = Path(__file__).with_name("sft.py")
    spec = importlib.util.spec_from_file_location("sft_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
