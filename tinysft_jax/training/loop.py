"""A training run, from its configuration to its best model."""

import contextlib
import itertools
import math
from pathlib import Path

import jax
from ml_collections import ConfigDict

from tinysft_jax import distributed, files
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import Interrupted, RunError, UserError, lacks_memory, shortage
from tinysft_jax.parameters import Params
from tinysft_jax.sharding import batch_shards, global_batch, make_mesh
from tinysft_jax.training import log as logs
from tinysft_jax.training.checkpoints import locked, move_other_run, save_best
from tinysft_jax.training.config import check_batch, check_config, parse_window, resolved
from tinysft_jax.training.log import FINAL, FINAL_ROWS, VAL, VAL_LOSS
from tinysft_jax.training.reference import fingerprint, use_reference, use_start
from tinysft_jax.training.run import Run, open_run
from tinysft_jax.training.step import Metrics, TrainState
from tinysft_jax.training.stop import StopRequest

CHOSEN = f"{VAL}chosen"  # DPO's log-likelihood of chosen answers, against the start
LONG_FALL = 3  # evaluations


def train(config: ConfigDict, workdir: Path, accept_changes: bool = False, verify: bool = False) -> None:
    """Runs the training that `config` describes, or resumes it from the newest sound checkpoint in `workdir`.

    Args:
      accept_changes: resume although the model, the data or the schedule have changed.
      verify: compare the data with the hashes of its manifest first; sizes are always compared.

    Raises a UserError if the configuration, the data or the starting model can't be used; a RunError if the run can't
    continue (disk or memory full, no sound checkpoint, divergence); Interrupted after a signal, with all saved.
    """
    check_config(config)
    mesh = make_mesh(**config.mesh)
    check_batch(config, batch_shards(mesh))
    try:
        with jax.set_mesh(mesh), StopRequest(mesh) as stop, locked(workdir) as note:
            run, params = open_run(config, workdir, mesh, stop, accept_changes, verify)
            state = first_state(run, params)
            run.notes.insert(0, note)
            distributed.on_first(lambda: begin(run))
            with run.log, run.checkpoints:
                for text in filter(None, run.notes):
                    run.log.say(text)
                state = train_steps(run, state)
                finish(run, state)
            distributed.on_first(lambda: logs.print_summary(run.log.lines(), run.status.best_step, config.objective))
    except OSError as error:
        raise RunError(f"can't write {workdir}: {error.strerror or error}") from None
    except jax.errors.JaxRuntimeError as error:
        if not lacks_memory(error):
            raise
        raise RunError(
            f"{shortage(error)}; raise train.grad_accumulation_steps, set train.remat=full or lower "
            "train.eval_batch_size"
        ) from None


def first_state(run: Run, params: Params | None) -> TrainState:
    """The state that training goes on from; of a new run, with these parameters."""
    config, status, steps, is_new = run.config, run.status, run.steps, run.checkpoints.newest < 0
    state = steps.create(params, config.seed) if is_new else None
    if config.objective in ("dpo", "grpo") and is_new:
        status.reference = fingerprint(status.model.config, params, config.seed)
    if config.objective == "dpo":
        use_reference(run, state and state["params"])
    if config.objective == "grpo":
        use_start(run, params)
    return state or run.checkpoints.restore(steps.shapes, steps.shardings)


def begin(run: Run) -> None:
    """In the first process: starts the log, and drops from the work directory what the run will write again."""

    def is_kept(line: logs.MetricLine) -> bool:
        if FINAL_ROWS in line and (run.changes or line[FINAL_ROWS] != run.final_rows):
            return False
        if line["step"] == run.status.step:
            return VAL_LOSS not in line or run.status.evaluated_step == run.status.step
        return line["step"] < run.status.step

    if run.checkpoints.newest < 0:
        run.notes.append(move_other_run(run.workdir, run.status.run))
    settings = resolved(run.config, run.batches.total_steps, run.status.run)
    files.write_json(run.workdir / "config.json", settings)
    run.checkpoints.clear()
    logs.forget_skipped(run.workdir, run.status.step)
    run.log.open(is_kept, settings)


def train_steps(run: Run, state: TrainState) -> TrainState:
    """Trains to the last step.

    Saves a checkpoint and raises an error if the run was asked to stop (Interrupted) or the data can't be read.
    """
    status, stop, train = run.status, run.stop, run.config.train
    total_steps, window = run.batches.total_steps, parse_window(run.config.profile)
    per_sample = run.batches.per_sample  # steps, amid which a run neither stops nor is saved
    first_traced = max(window.start, status.step)  # a run may resume within the window
    pending: tuple[int, Metrics] | None = None  # of the step before, read while the devices compute the next one

    def is_due(interval: int) -> bool:
        return status.step % interval == 0 or status.step == total_steps

    if is_due(train.eval_interval) and status.evaluated_step != status.step:
        evaluate(run, state)
    with contextlib.closing(run.batches), contextlib.ExitStack() as profiler:
        batch, failure = next_batch(run, state)
        while batch is not None and (status.step % per_sample or not stop.agreed()):
            if status.step == first_traced and status.step in window:
                profiler.enter_context(jax.profiler.trace(run.workdir / "profile"))
            if status.step == window.stop:
                profiler.close()
            state, metrics = run.steps.train(state, batch)
            for value in metrics.values():
                value.copy_to_host_async()
            status.step += 1
            batch, failure = next_batch(run, state)  # is sent to the devices while they compute
            if pending:
                log_metrics(run, *pending)
            pending = status.step, metrics
            evaluates, saves = is_due(train.eval_interval), is_due(train.save_interval)
            if evaluates or saves or status.step == 1 or not run.batches.is_ahead:
                log_metrics(run, *pending)
                pending = None
            with run.log.rates.paused():
                if evaluates:
                    evaluate(run, state)
                if saves:
                    run.checkpoints.save(state, status)
        if pending:
            log_metrics(run, *pending)
    if failure:
        stop.agreed()  # a signal may have ended the workers that build batches
    elif stop.exit_code is None:
        return state
    run.checkpoints.save(state, status)
    run.checkpoints.wait()
    if stop.exit_code is None:
        raise type(failure)(f"{failure}; step {status.step:,} is saved, the same command resumes") from None
    message = f"stopped after step {status.step:,} of {total_steps:,}, checkpoint saved; run the same command to resume"
    raise Interrupted(message, stop.exit_code)


def next_batch(run: Run, state: TrainState) -> tuple[dict[str, jax.Array] | None, UserError | RunError | None]:
    """The next step's batch on the devices, None after the last step; or the error, if the data can't be read."""
    if run.status.step == run.batches.total_steps:
        return None, None
    try:
        return global_batch(run.mesh, run.batches(state["params"], run.status.step)), None
    except (UserError, RunError) as error:
        if jax.process_count() > 1:  # the others wait for this process's rows
            raise
        return None, error


def log_metrics(run: Run, step: int, metrics: Metrics) -> None:
    """Fetches the metrics of a finished step from the device, and logs them."""
    values = {key: float(value) for key, value in jax.device_get(metrics).items()}
    (total, in_a_row), most = run.status.skipped_steps, run.config.train.max_skipped_steps
    total, in_a_row = (total + 1, in_a_row + 1) if values["skipped"] else (total, 0)
    run.status.skipped_steps = total, in_a_row
    is_due = step % run.config.train.log_interval == 0 or step in (1, run.batches.total_steps)
    if step % run.batches.per_sample == 1 % run.batches.per_sample and values.get("gap", 0) > run.config.grpo.max_gap:
        raise RunError(
            f"step {step:,}: the log-probabilities of sampler and trainer differ by {values['gap']:.3g} a token, more "
            "than grpo.max_gap; use train.dtype=float32, or raise it"
        )
    run.log.step(step, values, run.batches.metrics(step) if is_due else {}, total, is_due)
    if values["skipped"] and distributed.is_first():
        run.log.say(logs.write_skipped(run.workdir, step, values, run.batches.conversations(step)))
    if in_a_row >= most:
        raise RunError(
            f"the run has diverged: the loss or gradient of {most} steps in a row, up to step {step:,}, was not "
            "finite; lower optimizer.learning_rate or lengthen optimizer.warmup_steps and start again; if it stops at "
            f"the same step, look at the conversations in {run.workdir / logs.SKIPPED}"
        )


def evaluate(run: Run, state: TrainState) -> None:
    """Evaluates the moving average of the parameters, if there is one; the model is kept if it is the best so far."""
    status, params = run.status, state.get("average", state["params"])
    losses = run.evaluator.losses(run.steps.evaluate, params, status.eval_rows, run.stop.agreed)
    if VAL_LOSS not in losses:  # there is no validation data, or the run was asked to stop
        return
    loss, status.evaluated_step = losses[VAL_LOSS], status.step
    run.log.say(f"step {status.step:,}: {_shown(losses)}")
    if status.step and loss < (math.inf if status.best_loss is None else status.best_loss):
        status.best_loss, status.best_step = loss, status.step
        save_best(run.workdir, status.step, params, status.model)
    run.log.write(status.step, losses)
    if distributed.is_first():
        lines = run.log.lines()
        logs.plot_loss(run.workdir, lines, run.config.objective)
        if run.config.objective == "dpo" and is_falling([line[CHOSEN] for line in lines if CHOSEN in line]):
            run.log.say(
                f"the chosen answers are less likely at each evaluation, now by {-losses[CHOSEN]:.1f} nats: DPO asks "
                "for their lead alone; raise dpo.sft_weight or dpo.beta, or lower optimizer.learning_rate"
            )


def _shown(losses: dict[str, float]) -> str:
    """The figure by which the best model is chosen."""
    name = "reward" if f"{VAL}reward" in losses else "loss"
    return f"validation {name} {losses[VAL + name]:.4f}"


def is_falling(values: list[float]) -> bool:
    """Whether the last values fell `LONG_FALL` times in a row, to below 0, that of the start."""
    last = values[-LONG_FALL - 1 :]
    return len(last) > LONG_FALL and last[-1] < 0 and all(a > b for a, b in itertools.pairwise(last))


def finish(run: Run, state: TrainState) -> None:
    """Evaluates the kept model on a larger sample, unless that was done before. Raises: Interrupted."""
    status, params = run.status, state.get("average", state["params"])
    run.checkpoints.wait()
    if not status.best_step:  # without validation data the last model is kept
        status.best_step = status.step
        save_best(run.workdir, status.step, params, status.model)
    run.log.say(f"best model (step {status.best_step:,}): {run.workdir / 'model'}")
    if distributed.first_decides(any(FINAL_ROWS in line for line in run.log.lines())):
        return
    if status.best_step != status.step:
        is_reward = status.model.config.scalar_head
        params = jax.device_put(open_model(run.workdir / "model", reward=is_reward)[1], run.steps.shardings["params"])
    losses = run.evaluator.losses(run.steps.evaluate, params, run.final_rows, run.stop.agreed)
    if run.stop.exit_code is not None:
        message = "stopped during the final evaluation; all steps are saved, run the same command to finish"
        raise Interrupted(message, run.stop.exit_code)
    if VAL_LOSS in losses:
        run.log.say(f"kept model (step {status.best_step:,}): {_shown(losses)}")
        final = {FINAL + key: value for key, value in losses.items()}
        run.log.write(status.step, final | {FINAL_ROWS: run.final_rows})
