"""Direct preference optimization of a fine-tuned model, on pairs: `--config=configs/dpo.py`, or `configs/dpo.py:demo`.

The data is prepared with `--format preference-jsonl`. All keys: `python train.py --help`.
"""

from ml_collections import ConfigDict

from tinysft_jax.training.config import make_config

DPO = {
    "objective": "dpo",
    "optimizer.learning_rate": 1e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_steps": 50,
    "train.max_steps": 1000,
    "train.batch_size": 16,
    "train.eval_interval": 100,
}

# Minutes on two CPU cores, from the demo's fine-tuned model.
DEMO = DPO | {
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_steps": 20,
    "train.max_steps": 300,
    "train.batch_size": 4,
    "train.eval_interval": 50,
    "train.eval_batch_size": 8,
    "train.eval_batches": 4,
    "train.save_interval": 100,
}


def get_config(preset: str = "") -> ConfigDict:
    return make_config(preset, {"": DPO, "demo": DEMO})
