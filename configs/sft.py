"""Supervised fine-tuning of a pretrained model: `--config=configs/sft.py`, or `configs/sft.py:demo`."""

from ml_collections import ConfigDict, config_dict


def get_config(preset: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    # What to fine-tune: a model directory, a work directory (its best model) or a PyTorch .pt. "random": random weights
    # of `model`'s shape; empty is that as well where the data is plain text.
    config.init_from = ""

    # The model's shape, for random weights; otherwise the checkpoint says.
    config.model = ConfigDict()
    config.model.vocab_size = 0  # 0: the data's
    config.model.dim = 768
    config.model.n_layers = 12
    config.model.n_heads = 12
    config.model.max_seq_len = 1024
    config.model.mlp_ratio = 4.0

    config.data = ConfigDict()
    config.data.path = "data"  # what `prepare` wrote
    config.data.seq_len = 1024  # tokens a packed row; at least the data's --max_tokens
    config.data.num_workers = 0  # processes that build batches; 0: a thread, enough for one GPU

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-5  # a tenth of pretraining's
    config.optimizer.warmup_steps = 500  # linear; then a cosine down to 0 at the last step
    config.optimizer.weight_decay = 0.01
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.grad_clip = 1.0  # global norm; 0: off
    config.optimizer.decayed = "all"  # what weight decay shrinks: all, or matrices (not the norms)
    config.optimizer.ema_decay = 0.0  # of the parameters' moving average, then evaluated and kept; 0: none

    config.train = ConfigDict()
    config.train.max_steps = 10_000
    config.train.num_epochs = config_dict.placeholder(int)  # when set, takes the place of max_steps
    config.train.batch_size = 4  # packed rows in one optimizer step, over all devices together
    config.train.grad_accumulation_steps = 1  # micro-batches that a step's rows are divided into
    config.train.log_interval = 10
    config.train.eval_interval = 500  # validation loss before the first step, every so many, and after the last
    config.train.eval_batch_size = 32  # packed rows of an evaluation's batch, over all devices (rounded up to fit them)
    config.train.eval_batches = 0  # of the same sample each time; 0: so many that all take at most 7 % of a run's rows
    config.train.final_eval = "sample"  # of the kept model: sample (at most 3 % of a run's rows) or all (of the split)
    config.train.save_interval = 1000
    config.train.keep_checkpoints = 3
    config.train.max_skipped_steps = 10  # in a row, with a loss or gradient that is no number; then the run stops
    config.train.dtype = "auto"  # of matmuls: bfloat16 on accelerators, float32 on a CPU
    config.train.attention = "auto"  # cudnn where it can run, else xla
    config.train.remat = "none"  # what the backward pass recomputes: none, dots (all but matmuls), full

    # Forms to write the best model in as well when the run ends: huggingface, torch, or both with a comma between.
    config.export = ""

    # START:STOP traces these steps with JAX's profiler into WORKDIR/profile (view with xprof or TensorBoard).
    config.profile = ""

    # Devices a mesh axis; -1: what is left.
    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.wandb = ConfigDict()
    config.wandb.mode = "disabled"  # disabled, offline, online
    config.wandb.project = "tinysft-jax"
    config.wandb.name = ""  # empty: the work directory's name

    if preset == "demo":
        _demo(config)
    elif preset:
        raise ValueError(f"configs/sft.py has no preset {preset!r}; it has: demo")
    return config.lock()


def _demo(config: ConfigDict) -> None:
    """Minutes on two CPU cores, after `configs/pretrain.py:demo`."""
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.train.max_steps = 2000
    config.train.batch_size = 2
    config.train.eval_interval = 500
    config.train.eval_batch_size = 8
    config.train.save_interval = 400
