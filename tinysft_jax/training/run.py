"""What a run needs before its first step: its data, whether it resumes, its state and jitted steps."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinysft_jax import distributed
from tinysft_jax.console import UserError
from tinysft_jax.data.mixture import Part, open_parts
from tinysft_jax.data.store import PreparedData
from tinysft_jax.export import check_exports
from tinysft_jax.parameters import Params
from tinysft_jax.sharding import process_part
from tinysft_jax.training.checkpoints import Checkpoints, RunStatus, run_identity
from tinysft_jax.training.config import check_run
from tinysft_jax.training.evaluate import Evaluator, evaluation_rows, n_evaluations
from tinysft_jax.training.log import RunLog
from tinysft_jax.training.objectives import objective_of
from tinysft_jax.training.rollout import HeldOut, Rollouts, sampling_softmax
from tinysft_jax.training.source import TrainingBatches
from tinysft_jax.training.state import Steps, check_tokenizer, starting_model, steps_of
from tinysft_jax.training.stop import StopRequest


@dataclasses.dataclass
class Run:
    """A run that is ready to begin."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    stop: StopRequest
    parts: list[Part]
    batches: TrainingBatches | Rollouts
    evaluator: Evaluator | HeldOut
    final_rows: int  # of the final evaluation, that of the kept model
    checkpoints: Checkpoints
    status: RunStatus
    steps: Steps
    log: RunLog
    changes: list[str]  # in the settings of a run that resumes
    notes: list[str]  # for the user


def open_run(
    config: ConfigDict, workdir: Path, mesh: Mesh, stop: StopRequest, accept_changes: bool, verify: bool
) -> tuple[Run, Params | None]:
    """Opens the data, decides whether the run resumes, and builds its jitted steps; writes nothing.

    Also returns the parameters that a new run starts from; None: random ones.
    """
    parts = open_parts(config.data.path)
    data = [part.data for part in parts]
    for each in data if verify else ():
        each.verify()
    is_grpo = config.objective == "grpo"
    batches = Rollouts(config, _only(parts)) if is_grpo else TrainingBatches(config, parts, process_part(mesh))
    total_steps = batches.total_steps
    check_run(config, total_steps, max(each.description["max_tokens"] for each in data), data[0].per_item)
    identity = run_identity(config, parts, batches.packings, total_steps)
    distributed.check_same(
        {"the configuration": config.to_json(), "the data": identity["data"], "its packing": identity["packing"]}
    )
    distributed.check_shared(workdir)
    if is_grpo:
        evaluator = HeldOut(config, data[0])
    else:
        evaluator = Evaluator(parts, config, mesh, max(packing.most_items for packing in batches.packings))
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    status, params, changes, notes = _start_or_resume(config, workdir, parts, checkpoints, identity, accept_changes)
    final_rows = _settle_evaluation(config, total_steps, evaluator, status, notes)
    check_exports(config.export, status.model)
    shape = status.model.config
    softmax = sampling_softmax(config, data[0], shape) if is_grpo else None
    objective = objective_of(config, evaluator.n_segments, softmax)
    steps = steps_of(config, shape, total_steps, evaluator.n_tasks, mesh, objective, batches.accumulation)
    log = RunLog(config, workdir, shape, total_steps)
    what = config, workdir, mesh, stop, parts, batches, evaluator, final_rows, checkpoints, status, steps, log
    return Run(*what, changes, notes), params


def _only(parts: list[Part]) -> PreparedData:
    """The data set. Raises: UserError, if there are several."""
    if len(parts) > 1:
        raise UserError("objective grpo asks the questions of one data set; data.path gives several")
    return parts[0].data


def _start_or_resume(
    config: ConfigDict,
    workdir: Path,
    parts: list[Part],
    checkpoints: Checkpoints,
    identity: dict,
    accept_changes: bool,
) -> tuple[RunStatus, Params | None, list[str], list[str]]:
    """The run's status, the parameters of a new one (None: random ones), changes, and notes for the user."""
    damage = checkpoints.find_newest()
    if checkpoints.newest < 0:
        shape, data = config.model.to_dict(), [part.data for part in parts]
        model, params = starting_model(config.init_from, shape, *data, reward=config.objective == "reward")
        return RunStatus(identity, model), params, [], []
    status, changes = checkpoints.resume(config, identity, accept_changes)
    where = f"resuming at step {status.step:,} of {identity['steps']:,} in {workdir}"
    tokenizer = parts[0].data.tokenizer
    check_tokenizer(status.model, tokenizer, str(workdir))
    status.model = dataclasses.replace(status.model, tokenizer_files=tokenizer.files)
    return status, None, changes, [*changes, f"{damage}; {where}" if damage else where]


def _settle_evaluation(
    config: ConfigDict, total_steps: int, evaluator: Evaluator | HeldOut, status: RunStatus, notes: list[str]
) -> int:
    """Sets the rows of the periodic evaluations; returns those of the final one."""
    eval_rows, final_rows = evaluation_rows(config, total_steps, evaluator.n_rows, status.eval_rows)
    if status.step and eval_rows != status.eval_rows:
        status.best_loss = None
        notes.append("the validation sample is not what it was: the search for the best model starts over")
    status.eval_rows = eval_rows
    if n_rows := evaluator.n_rows:
        times = n_evaluations(total_steps, config.train.eval_interval)
        sample = f"{eval_rows:,} of {n_rows:,} {evaluator.noun}, {times:,} times"
        notes.append(f"validation: {sample}; the kept model: {final_rows:,} {evaluator.noun}")
    else:
        notes.append("there is no validation data: the last model is kept")
    return final_rows
