"""A training run, from its configuration to its best model."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tinysft_jax import files
from tinysft_jax.data.dataset import PreparedData, Split
from tinysft_jax.data.packing import plan_epoch
from tinysft_jax.data.pipeline import Batch, BatchSource, epoch_batches
from tinysft_jax.errors import Interrupted, UserError
from tinysft_jax.model import GPT
from tinysft_jax.sharding import batch_sharding, batch_shards, global_batch, make_mesh
from tinysft_jax.training.checkpoint import Checkpoints, save_best
from tinysft_jax.training.config import check_config, compute_dtype, resolved
from tinysft_jax.training.evaluate import ALL_TASKS, Evaluator
from tinysft_jax.training.interrupt import StopRequest
from tinysft_jax.training.metrics import MetricLog, Rates, read_metrics
from tinysft_jax.training.optimizer import make_optimizer, warmup_cosine
from tinysft_jax.training.plot import plot_loss
from tinysft_jax.training.progress import TrainingProgress, print_summary
from tinysft_jax.training.state import create_state, starting_model
from tinysft_jax.training.step import make_eval_step, make_train_step


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs, or continues, the training that `config` describes.

    Args:
      config: of `configs/`.
      workdir: what the run writes; if it holds checkpoints, the run continues from the newest.

    Raises:
      UserError: if the configuration, the data or the starting model can't be worked with.
      Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    mesh = make_mesh(**config.mesh)
    check_config(config, batch_shards(mesh))
    with jax.set_mesh(mesh), StopRequest() as stop:
        _Run(config, workdir, mesh).to_the_end(stop)


class _Run:
    def __init__(self, config: ConfigDict, workdir: Path, mesh: jax.sharding.Mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.part = (jax.process_index(), jax.process_count())
        data = PreparedData(config.data.path)
        self.split = data.split("train")
        if not len(self.split):
            raise UserError(f"{config.data.path} has no training conversation")
        self.total_steps = total_steps(config, self.split)
        self.evaluator = Evaluator(
            data, config.train.batch_size, config.data.seq_len, config.train.eval_batches, self.part
        )
        self.description, params = starting_model(config.init_from, config.model.to_dict(), data)
        if config.data.seq_len > self.description.config.max_seq_len:
            raise UserError(
                f"data.seq_len {config.data.seq_len} is longer than the model's context "
                f"{self.description.config.max_seq_len}"
            )
        self._create_state(params)
        self._open_workdir()

    def _create_state(self, params) -> None:
        config = self.config
        options = {
            "dtype": compute_dtype(config),
            "attention": config.train.attention,
            "remat": config.train.remat,
        }
        model = nnx.eval_shape(lambda: GPT(self.description.config, rngs=nnx.Rngs(0), **options))
        settings = config.optimizer.to_dict()
        schedule = warmup_cosine(settings.pop("learning_rate"), settings.pop("warmup_steps"), self.total_steps)
        optimizer = make_optimizer(schedule, **settings)
        self.state, self.shardings = create_state(self.mesh, model, params, optimizer, config.seed)
        graph = nnx.graphdef(model)
        everywhere, rows = NamedSharding(self.mesh, PartitionSpec()), batch_sharding(self.mesh)
        # Shardings are pinned, or the second call, whose state comes from the first, would be compiled anew.
        self.train_step = jax.jit(
            make_train_step(graph, optimizer, schedule, config.train.grad_accumulation_steps),
            in_shardings=(self.shardings, rows),
            out_shardings=(self.shardings, everywhere),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            make_eval_step(graph), in_shardings=(self.shardings["params"], rows), out_shardings=everywhere
        )

    def _open_workdir(self) -> None:
        config = self.config
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't write --workdir {self.workdir}: {error.strerror}") from None
        self.checkpoints = Checkpoints(self.workdir, config.train.keep_checkpoints)
        self.step, self.best_loss, self.best_step = 0, float("inf"), 0
        if (latest := self.checkpoints.latest_step) is not None:
            self.state, progress = self.checkpoints.restore(latest, self.state, self.shardings)
            self.step, self.best_step = latest, progress["best_step"]
            self.best_loss = progress["best_loss"] if progress["best_loss"] is not None else float("inf")
        first = jax.process_index() == 0
        self.progress = TrainingProgress(self.step, self.total_steps, quiet=not first)
        self.rates = Rates(self.description.config, config.train.batch_size * config.data.seq_len, config.data.seq_len)
        self.log = None
        if first:
            settings = resolved(config, self.total_steps)
            files.write_json(self.workdir / "config.json", settings)
            self.log = MetricLog(self.workdir, self.step, config.wandb.to_dict(), settings)

    def to_the_end(self, stop: StopRequest) -> None:
        config = self.config.train
        if self.step:
            self.progress.say(f"continuing at step {self.step:,} of {self.total_steps:,} in {self.workdir}")
        try:
            if not self.step:
                self._evaluate()
            self._train(stop)
            if stop.exit_code is not None:
                self._save()
                self.checkpoints.wait()
                raise Interrupted(
                    f"stopped after step {self.step:,} of {self.total_steps:,}, checkpoint saved; "
                    "run the same command to continue",
                    stop.exit_code,
                )
            self.checkpoints.wait()
        finally:
            self.progress.close()
            self.checkpoints.close()
            if self.log:
                self.log.close()
        self._finish()

    def _train(self, stop: StopRequest) -> None:
        config = self.config.train
        pending = None  # metrics of the step before: fetched while the device works on the next one
        for batch in self._batches():
            if self.step == self.total_steps or stop.exit_code is not None:
                break
            self.state, metrics = self.train_step(self.state, global_batch(self.mesh, batch))
            if pending:
                self._account(*pending)
            self.step += 1
            pending = (self.step, metrics)
            evaluates = self.step % config.eval_interval == 0 or self.step == self.total_steps
            saves = self.step % config.save_interval == 0 or self.step == self.total_steps
            if evaluates or saves or self.step == 1:
                self._account(*pending)
                pending = None
            with self.rates.paused():
                if evaluates:
                    self._evaluate()
                if saves:
                    self._save()
        if pending:
            self._account(*pending)

    def _batches(self) -> Iterator[Batch]:
        """The batches from the current step on, epoch after epoch."""
        config, to_skip = self.config, self.step
        for epoch in itertools.count():
            source = epoch_source(config, self.split, epoch, self.part)
            if to_skip >= len(source):
                to_skip -= len(source)
                continue
            yield from epoch_batches(source, to_skip, config.data.num_workers)
            to_skip = 0

    def _account(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes a finished step's metrics from the device, and logs them if it is time."""
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        self.rates.count(values["tokens"], values["supervised_tokens"])
        self.progress.step(step)
        if step % self.config.train.log_interval == 0 or step in (1, self.total_steps):
            logged = {
                "sft/train_loss": values["loss"],
                "sft/grad_norm": values["grad_norm"],
                "sft/lr": values["lr"],
                **self.rates.report(),
            }
            self.progress.log(step, logged)
            self._write(step, logged)

    def _evaluate(self) -> None:
        if not self.evaluator:
            return
        losses = self.evaluator.losses(self.eval_step, self.state["params"], self.mesh)
        self.progress.say(f"step {self.step:,}: validation loss {losses[ALL_TASKS]:.4f}")
        self._write(self.step, losses)
        if self.step and losses[ALL_TASKS] < self.best_loss:
            self.best_loss, self.best_step = losses[ALL_TASKS], self.step
            self._save_model()
        if self.log:
            plot_loss(read_metrics(self.workdir), self.workdir / "loss.png")

    def _save(self) -> None:
        progress = {
            "rows": self.step * self.config.train.batch_size,
            "best_loss": self.best_loss if self.best_step else None,
            "best_step": self.best_step,
            "model": self.description.to_json(),
        }
        self.checkpoints.save(self.step, self.state, progress)

    def _save_model(self) -> None:
        save_best(self.workdir, self.step, self.state["params"], self.description)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self.log:
            self.log.write(step, metrics)

    def _finish(self) -> None:
        if not self.evaluator:  # nothing tells which model is best: the last one is
            self.best_step = self.step
            self._save_model()
        if jax.process_index() == 0:
            print_summary(read_metrics(self.workdir), self.best_step)
            self.progress.say(f"best model (step {self.best_step:,}): {self.workdir / 'model'}")


def total_steps(config: ConfigDict, split: Split) -> int:
    """`max_steps`, or the batches of `num_epochs` epochs."""
    if config.train.num_epochs is None:
        return config.train.max_steps
    return sum(len(epoch_source(config, split, epoch)) for epoch in range(config.train.num_epochs))


def epoch_source(config: ConfigDict, split: Split, epoch: int, part: tuple[int, int] = (0, 1)) -> BatchSource:
    """The batches of one training epoch."""
    plan = plan_epoch(split.lengths, config.data.seq_len, config.seed, epoch)
    return BatchSource(split, plan, config.train.batch_size, config.data.seq_len, part)
