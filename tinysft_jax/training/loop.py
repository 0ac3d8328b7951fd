"""A training run, from its configuration to its best model."""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tinysft_jax import distributed, files
from tinysft_jax.attention import choose_backend
from tinysft_jax.checkpoints import load_params
from tinysft_jax.console import Interrupted, RunError, UserError, reason
from tinysft_jax.data.batches import Batch, BatchSource, epoch_batches
from tinysft_jax.data.packing import Packing
from tinysft_jax.data.store import PreparedData
from tinysft_jax.model import GPT
from tinysft_jax.parameters import ModelDescription, Params
from tinysft_jax.sharding import batch_sharding, batch_shards, global_batch, make_mesh, process_part
from tinysft_jax.tokenizer import ChatTokenizer
from tinysft_jax.training.checkpoints import (
    FORMAT_VERSION,
    TOTAL_STEPS,
    Checkpoints,
    check_progress,
    differences,
    held,
    run_identity,
    save_best,
    set_aside_other_run,
    set_models_aside,
    what_more_steps_do,
)
from tinysft_jax.training.config import (
    check_config,
    check_keys,
    check_model,
    check_run,
    compute_dtype,
    parse_window,
    resolved,
)
from tinysft_jax.training.evaluate import Evaluator, evaluation_rows, n_evaluations
from tinysft_jax.training.log import (
    ALL_TASKS,
    FINAL,
    FINAL_ROWS,
    MetricLine,
    MetricLog,
    Rates,
    SkippedSteps,
    TrainingProgress,
    plot_loss,
    print_summary,
    read_metrics,
)
from tinysft_jax.training.state import check_same_language, create_state, starting_model, state_shapes
from tinysft_jax.training.step import make_eval_step, make_optimizer, make_train_step, warmup_cosine
from tinysft_jax.training.stop import StopRequest


def train(config: ConfigDict, workdir: Path, accept_changes: bool = False, verify: bool = False) -> None:
    """Runs, or continues, the training that `config` describes.

    Args:
      config: of `configs/`.
      workdir: what the run writes; if it holds checkpoints, the run continues from the newest sound one.
      accept_changes: continue though the model, the data or the schedule are not what they were.
      verify: compare the data's hashes with its manifest first; sizes are compared always.

    Raises:
      UserError: if the configuration, the data or the starting model can't be worked with.
      RunError: if the run can't go on: a full disk, too little memory, no sound checkpoint, a loss that is no number.
      Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    check_keys(config)
    mesh = make_mesh(**config.mesh)
    check_config(config, batch_shards(mesh))
    try:
        with jax.set_mesh(mesh), StopRequest() as stop, held(workdir) as note:
            _Run(config, workdir, mesh, stop, accept_changes, verify, [note] if note else []).to_the_end()
    except OSError as error:
        raise RunError(f"can't write {workdir}: {error.strerror or error}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"not enough memory: {reason(error)}; raise train.grad_accumulation_steps, set train.remat=full or lower "
            "train.eval_batch_size"
        ) from None


class _Run:
    """Everything is checked and built before anything is written."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        mesh: Mesh,
        stop: StopRequest,
        accept_changes: bool,
        verify: bool,
        notes: list[str],
    ):
        self.config, self.workdir, self.mesh, self.stop = config, workdir, mesh, stop
        self.part = process_part(mesh)
        self.data = PreparedData(config.data.path)
        if verify:
            self.data.verify()
        self.split = self.data.split("train")
        if not len(self.split):
            raise UserError(f"{config.data.path} has no training conversation")
        self.packing = Packing(self.split.lengths, config.data.seq_len)
        self.total_steps = total_steps(config, self.packing)
        check_run(config, self.total_steps, self.data.description["max_tokens"])
        self.identity = run_identity(config, self.data, self.packing, self.total_steps)
        distributed.check_same(
            {
                "the configuration": config.to_json(),
                "the data": self.identity["data"],
                "how it is packed": self.packing.fingerprint,
            }
        )
        distributed.check_shared(workdir)
        self.evaluator = Evaluator(self.data, config.data.seq_len, config.train.eval_batch_size, config.seed, mesh)
        self.eval_rows, self.final_rows = evaluation_rows(config, self.total_steps, self.evaluator.n_rows)
        self.step, self.best_loss, self.best_step, self.evaluated_step = 0, math.inf, 0, -1
        self.skipped = SkippedSteps(workdir, config.train.max_skipped_steps)
        self.notes = notes  # to be said once the run has begun
        self.is_changed = False
        self.checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        damage = self.checkpoints.find_newest()
        if self.checkpoints.newest is None:
            self.description, params = starting_model(config.init_from, config.model.to_dict(), self.data)
        else:
            self.step, params = self.checkpoints.newest, None
            self.description = self._continue_from(self.checkpoints.progress(self.step), accept_changes)
            where = f"continuing at step {self.step:,} of {self.total_steps:,} in {workdir}"
            self.notes.append(f"{damage}; {where}" if damage else where)
        self._build(params)

    def _continue_from(self, progress: Any, accept_changes: bool) -> ModelDescription:
        """Takes over what a checkpoint says, once it is sure that this is the same run."""
        where = self.workdir / "checkpoints" / str(self.step)
        check_progress(progress, where)
        before = progress["run"]
        changes = differences(before, self.identity)
        if changes and not accept_changes:
            raise UserError(
                f"{self.workdir} is another run: {'; '.join(changes)}; choose another --workdir, or add "
                "--accept_changes to continue it so"
            )
        if self.step > self.total_steps:
            raise UserError(f"{self.workdir} has done {self.step} steps already, more than {self.total_steps}")
        if changes:
            self.notes.append(f"continuing another run than it was: {'; '.join(changes)}")
        if before[TOTAL_STEPS] < self.total_steps:
            self.notes.append(what_more_steps_do(self.config, before[TOTAL_STEPS], self.total_steps, self.step))
        self.is_changed = bool(changes) or before[TOTAL_STEPS] != self.total_steps
        self.evaluated_step, self.best_step = progress["evaluated_step"], progress["best_step"]
        self.best_loss = math.inf if progress["best_loss"] is None else progress["best_loss"]
        self._keep_sample(progress.get("eval_rows", 0))
        self.skipped.total, self.skipped.in_a_row = progress["skipped_steps"]
        description = ModelDescription.from_json(progress["model"], where)
        check_same_language(description, ChatTokenizer.from_description(self.data.description), str(where))
        return description

    def _keep_sample(self, rows_before: int) -> None:
        """Goes on with the validation sample of before, unless another is asked for."""
        split_rows = self.evaluator.n_rows
        self.eval_rows, self.final_rows = evaluation_rows(self.config, self.total_steps, split_rows, rows_before)
        if self.eval_rows != rows_before:
            self.best_loss = math.inf
            self.notes.append("the validation sample is not what it was: the best model is looked for anew")

    def _build(self, params: Params | None) -> None:
        """The state and the compiled functions."""
        config, shape = self.config, self.description.config
        check_model(shape, config.data.seq_len, self.mesh.shape["tensor"])
        dtype = compute_dtype(config)
        choose_backend(config.train.attention, dtype, shape.head_dim, config.data.seq_len)
        options = {"dtype": dtype, "attention": config.train.attention, "remat": config.train.remat}
        model = nnx.eval_shape(lambda: GPT(shape, rngs=nnx.Rngs(0), **options))
        settings = config.optimizer.to_dict()
        ema_decay = settings.pop("ema_decay")
        schedule = warmup_cosine(settings.pop("learning_rate"), settings.pop("warmup_steps"), self.total_steps)
        optimizer = make_optimizer(schedule, **settings)
        shapes, self.shardings = state_shapes(self.mesh, model, optimizer, averaged=ema_decay > 0)
        if self.checkpoints.newest is not None:
            self.state = self.checkpoints.restore(self.step, shapes, self.shardings)
        else:
            self.state = create_state(self.shardings, model, params, optimizer, config.seed)
        graph = nnx.graphdef(model)
        everywhere, rows = NamedSharding(self.mesh, PartitionSpec()), batch_sharding(self.mesh)
        # Shardings are pinned, or the second call, whose state comes from the first, would be compiled anew.
        self.train_step = jax.jit(
            make_train_step(graph, optimizer, schedule, config.train.grad_accumulation_steps, ema_decay),
            in_shardings=(self.shardings, rows),
            out_shardings=(self.shardings, everywhere),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            make_eval_step(graph, len(self.data.tasks)),
            in_shardings=(self.shardings["params"], rows),
            out_shardings=everywhere,
        )

    @property
    def model_params(self) -> Params:
        """What is evaluated and kept as the model: the moving average, where there is one."""
        return self.state.get("average", self.state["params"])

    def to_the_end(self) -> None:
        seq_len = self.config.data.seq_len
        self.rates = Rates(self.description.config, self.config.train.batch_size * seq_len, seq_len)
        self.log: MetricLog | None = None
        distributed.on_first(self._begin)
        self.progress = TrainingProgress(self.total_steps, quiet=not distributed.is_first())
        exit_code = 1
        try:
            for note in self.notes:
                self.progress.say(note)
            times = n_evaluations(self.total_steps, self.config.train.eval_interval)
            self.progress.say(self.evaluator.describe(self.eval_rows, self.final_rows, times))
            # A stop may have cut it short.
            if self._is_time_to_evaluate() and self.evaluated_step != self.step:
                self._evaluate()
            self._train()
            self.checkpoints.wait()
            if not self.best_step:  # without validation data nothing tells which model is best: the last one is
                self.best_step = self.step
                self._save_model()
            self._evaluate_kept()
            exit_code = 0
        except Interrupted as interruption:
            exit_code = interruption.exit_code
            raise
        finally:
            self.progress.close()
            self.checkpoints.close()
            if self.log:
                self.log.close(exit_code)
        self._finish()

    def _begin(self) -> None:
        """Takes over the work directory: what the first process does before the first step."""
        if self.checkpoints.newest is None and (note := set_aside_other_run(self.workdir, self.identity)):
            self.notes.append(note)
        settings = resolved(self.config, self.total_steps, self.identity)
        files.write_json(self.workdir / "config.json", settings)
        self.checkpoints.clear()
        set_models_aside(self.workdir, self.step)
        self.skipped.forget_after(self.step)
        self.log = MetricLog(self.workdir, self._kept_metrics(), self.config.wandb.to_dict(), settings)

    def _train(self) -> None:
        profile = ProfileWindow(self.config.profile, self.workdir / "profile")
        with contextlib.closing(self._batches()) as batches:
            pending = None  # metrics of the step before: fetched while the device works on the next one
            while self.step < self.total_steps and not self.stop.agreed(self.mesh):
                profile.before(self.step)
                if (rows := self._next_rows(batches)) is None:
                    break
                self.state, metrics = self.train_step(self.state, global_batch(self.mesh, rows))
                if pending:
                    self._account(*pending)
                self.step += 1
                pending = (self.step, metrics)
                evaluates, saves = self._is_time_to_evaluate(), self._is_time_to_save()
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
        profile.close()
        if self.stop.exit_code is not None:
            self._save()
            self.checkpoints.wait()
            raise Interrupted(
                f"stopped after step {self.step:,} of {self.total_steps:,}, checkpoint saved; "
                "run the same command to continue",
                self.stop.exit_code,
            )

    def _next_rows(self, batches: Iterator[Batch]) -> Batch | None:
        """This process's rows of the next step; None if they can't be read because the run is being stopped.

        Raises:
          RunError, UserError: if they can't be read. The state is that of the last step, and is saved.
        """
        try:
            return next(batches)
        except (RunError, UserError) as error:
            if jax.process_count() > 1:  # the others are waiting for this process's rows
                raise
            # What asks this program to stop may have ended its workers.
            if self.stop.agreed(self.mesh):
                return None
            self._save()
            self.checkpoints.wait()
            raise type(error)(f"{error}; step {self.step:,} is saved, the same command continues") from None

    def _is_time_to_evaluate(self) -> bool:
        return self.step % self.config.train.eval_interval == 0 or self.step == self.total_steps

    def _is_time_to_save(self) -> bool:
        return self.step % self.config.train.save_interval == 0 or self.step == self.total_steps

    def _batches(self) -> Iterator[Batch]:
        """The batches from the current step on, epoch after epoch."""
        config = self.config
        first, start = divmod(self.step, steps_an_epoch(config, self.packing))
        for epoch in itertools.count(first):
            plan = self.packing.epoch(config.seed, epoch)
            source = BatchSource(self.split, plan, config.train.batch_size, config.data.seq_len, self.part)
            yield from epoch_batches(source, start, config.data.num_workers)
            start = 0
            del plan, source  # or there would be two epochs' plans while the next is made

    def _account(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes a finished step's metrics from the device, and logs them if it is time."""
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        self.skipped.count(bool(values["skipped"]))
        self.rates.count(values["tokens"], values["supervised_tokens"])
        self.progress.step(step)
        if values["skipped"]:
            self._say_skipped(step, values["loss"], values["grad_norm"])
        elif step % self.config.train.log_interval == 0 or step in (1, self.total_steps):
            logged = {
                "sft/train_loss": values["loss"],
                "sft/grad_norm": values["grad_norm"],
                "sft/lr": values["lr"],
                "sft/skipped_steps": self.skipped.total,
                **self.rates.report(),
            }
            self.progress.log(step, logged)
            self._write(step, logged)

    def _say_skipped(self, step: int, loss: float, grad_norm: float) -> None:
        if self.log:
            self.progress.say(self.skipped.write(step, loss, grad_norm, self._conversations(step)))
            self._write(step, {"sft/skipped_steps": self.skipped.total})
        self.skipped.check(step)

    def _conversations(self, step: int) -> list[int]:
        """The conversations of a step's batch, as indices of the training split."""
        size = self.config.train.batch_size
        epoch, batch = divmod(step - 1, steps_an_epoch(self.config, self.packing))
        plan = self.packing.epoch(self.config.seed, epoch)  # made again: it is rarely asked for
        starts = plan.row_starts[batch * size :][: size + 1]
        return plan.order[starts[0] : starts[-1]].tolist()

    def _kept_metrics(self) -> list[MetricLine]:
        """The lines of steps that are done; an evaluation's only if the checkpoint knows of it.

        That of the final evaluation only if it is of this run and its sample.
        """

        def is_kept(line: MetricLine) -> bool:
            is_known = ALL_TASKS not in line or self.evaluated_step == self.step
            if FINAL_ROWS in line and (self.is_changed or line[FINAL_ROWS] != self.final_rows):
                return False
            return line["step"] < self.step or (line["step"] == self.step and is_known)

        return [line for line in read_metrics(self.workdir) if is_kept(line)]

    def _evaluate(self) -> None:
        losses = self._losses(self.model_params, self.eval_rows)
        if ALL_TASKS not in losses:
            return
        self.evaluated_step = self.step
        self.progress.say(f"step {self.step:,}: validation loss {losses[ALL_TASKS]:.4f}")
        if self.step and losses[ALL_TASKS] < self.best_loss:
            self.best_loss, self.best_step = losses[ALL_TASKS], self.step
            self._save_model()
        self._write(self.step, {key: loss for key, loss in losses.items() if math.isfinite(loss)})
        if self.log:
            plot_loss(read_metrics(self.workdir), self.workdir / "loss.png")

    def _evaluate_kept(self) -> None:
        """Evaluates the model that was kept on a larger sample, if no start of this run before has done it."""
        if distributed.first_decides(any(FINAL_ROWS in line for line in read_metrics(self.workdir))):
            return
        params = self.model_params
        if self.best_step != self.step:
            params = load_params(self.workdir / "model", self.description.config)
            params = jax.device_put(params, self.shardings["params"])
        losses = self._losses(params, self.final_rows)
        if self.stop.exit_code is not None:
            raise Interrupted(
                f"stopped amid the final evaluation; all {self.step:,} steps are done and saved, "
                "run the same command to finish",
                self.stop.exit_code,
            )
        if ALL_TASKS not in losses:
            return
        self.progress.say(f"kept model (step {self.best_step:,}): validation loss {losses[ALL_TASKS]:.4f}")
        final = {key.replace(ALL_TASKS, FINAL): loss for key, loss in losses.items() if math.isfinite(loss)}
        self._write(self.step, final | {FINAL_ROWS: self.final_rows})

    def _losses(self, params: Params, n_rows: int) -> dict[str, float]:
        return self.evaluator.losses(self.eval_step, params, n_rows, functools.partial(self.stop.agreed, self.mesh))

    def _save(self) -> None:
        progress = {
            "format_version": FORMAT_VERSION,
            "run": self.identity,
            "rows": self.step * self.config.train.batch_size,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "evaluated_step": self.evaluated_step,
            "eval_rows": self.eval_rows,
            "skipped_steps": [self.skipped.total, self.skipped.in_a_row],
            "model": self.description.to_json(),
        }
        self.checkpoints.save(self.step, self.state, progress)

    def _save_model(self) -> None:
        save_best(self.workdir, self.step, self.model_params, self.description)

    def _write(self, step: int, metrics: MetricLine) -> None:
        if self.log:
            self.log.write(step, metrics)

    def _finish(self) -> None:
        distributed.on_first(self._report)

    def _report(self) -> None:
        print_summary(read_metrics(self.workdir), self.best_step)
        self.progress.say(f"best model (step {self.best_step:,}): {self.workdir / 'model'}")


def total_steps(config: ConfigDict, packing: Packing) -> int:
    """`max_steps`, or the batches of `num_epochs` epochs."""
    if config.train.num_epochs is None:
        return config.train.max_steps
    return config.train.num_epochs * steps_an_epoch(config, packing)


def steps_an_epoch(config: ConfigDict, packing: Packing) -> int:
    return -(-packing.n_rows // config.train.batch_size)


class ProfileWindow:
    """Traces the steps START to STOP (the first inclusive, the last not) into `directory`.

    Args:
      window: "START:STOP", or empty for none.
      directory: where the trace goes.

    Raises:
      UserError: if `window` is neither.
    """

    def __init__(self, window: str, directory: Path):
        self._start, self._stop = parse_window(window)
        self._directory, self._running = directory, False

    def before(self, step: int) -> None:
        """Call with the number of steps done, before the next one."""
        if not self._running and self._start <= step < self._stop:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif self._running and step >= self._stop:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
