"""Answers trained on per second by GRPO on a CPU: this project against TRL's GRPOTrainer.

Both start from the same model and ask the same questions of a prepared data set in the same order, as the same token
ids. A step is as many answers for each, of at most the same length, with the same rewards, in one optimizer step in
float32. They take turns, a step each, in one process, so both see the same machine. TRL samples with transformers'
`generate`, not vLLM. What differs:

- answers are random, so their lengths differ: compare tokens a second, too;
- this project asks the model at the start how likely the answers are, and the data's own, at each step (TRL would do
  so for a divergence from it, which neither side has here): its work is counted, its reward, fluency, is left out;
- TRL's trainer computes the entropy, too, and log-probabilities with the tokens that are never drawn;
- this project does not train on answers that have no advantage, those of groups that are all worth the same;
- the constant that the loss is divided by, which Adam cancels but for the clipping of gradients.

`pip install trl`, then `python benchmarks/trl_grpo.py --checkpoint=runs/demo/sft --data=runs/demo/tasks`
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
# Where other programs run, OpenMP's threads that wait actively take the cores from one another: TRL is then far slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import datasets
import jax
import torch
import transformers
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig, GRPOTrainer

from tinysft_jax import console, export
from tinysft_jax.checkpoints import open_model
from tinysft_jax.console import RunError, UserError
from tinysft_jax.data.store import PreparedData
from tinysft_jax.rewards.cases import Case
from tinysft_jax.rewards.registry import Answered, parse_weights, score
from tinysft_jax.sharding import make_mesh
from tinysft_jax.training.config import make_config
from tinysft_jax.training.log import TRAIN
from tinysft_jax.training.loop import first_state, next_batch
from tinysft_jax.training.rollout import Questions
from tinysft_jax.training.run import open_run
from tinysft_jax.training.stop import StopRequest

REWARDS = "words:1,sentence:1,dialogue:1,moral:1,ends:0.3,repetition:0.3,length:0.5"  # what text alone decides
LEARNING_RATE, SEED = 1e-6, 0
WARM_UP = 3  # steps of each side that are not measured: the first compiles, or takes memory for the optimizer


Step = dict[
    str, float
]  # what one took, and what its answers were: seconds, sampling (of these), tokens, cut_off, reward


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="the model: a work directory or what else train.py takes")
    parser.add_argument("--data", required=True, help="a prepared data set")
    parser.add_argument("--task", default="story", help="whose questions are asked")
    parser.add_argument("--prompts", type=int, default=8, help="questions of a step")
    parser.add_argument("--group_size", type=int, default=8, help="answers to each")
    parser.add_argument("--max_answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--micro_batch", type=int, help="answers that TRL trains on at a time (default: all)")
    parser.add_argument("--torch_threads", type=int, default=os.cpu_count(), help="of TRL")
    parser.add_argument("--steps", type=int, default=5, help="of each side to measure")
    flags = parser.parse_args()
    torch.set_num_threads(flags.torch_threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    answers, mesh = flags.prompts * flags.group_size, make_mesh()
    with tempfile.TemporaryDirectory() as directory, jax.set_mesh(mesh), StopRequest(mesh) as stop:
        cases, max_tokens = read_cases(flags)
        ours = OurLoop(our_config(flags, max_tokens), Path(directory, "ours"), mesh, stop, flags.max_answer)
        turns = TakeTurns(ours, cases)
        make_trainer(turns, flags, directory).train()
    results = {side: figures(steps, answers) for side, steps in (("TRL", turns.steps), ("this project", ours.steps))}
    report(results)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, jax)}
    what = vars(flags) | {"versions": versions}
    print(json.dumps({"benchmark": "trl_grpo", **what, "results": results, "TRL": turns.steps, "ours": ours.steps}))


def read_cases(flags) -> tuple[list[Case], int]:
    """The questions of all steps, in the order in which a run asks them, and the data's greatest length."""
    data = PreparedData(flags.data)
    questions, max_tokens = Questions(data, "train", flags.task, SEED), data.description["max_tokens"]
    cases = questions.read(questions.numbers(range((WARM_UP + flags.steps) * flags.prompts)))
    if (longest := max(len(case.prompt) for case in cases)) + flags.max_answer > max_tokens:
        raise UserError(f"a question has {longest} tokens: --max_answer can be up to {max_tokens - longest}")
    return cases, max_tokens


def our_config(flags, max_tokens: int):
    """That of configs/grpo.py but for sizes and rewards; a step's answers are sampled together."""
    settings = {
        "objective": "grpo",
        "seed": SEED,
        "init_from": flags.checkpoint,
        "data.path": flags.data,
        "data.seq_len": max_tokens,
        "rewards": REWARDS,
        "grpo.tasks": flags.task,
        "grpo.prompts": flags.prompts,
        "grpo.group_size": flags.group_size,
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup_steps": 0,
        "train.max_steps": WARM_UP + flags.steps,
        "train.batch_size": min(8, flags.prompts * flags.group_size),
        "train.eval_batch_size": flags.prompts * flags.group_size,
    }
    return make_config("", {"": settings})


class OurLoop:
    """This project's steps, as `loop.train_steps` has them, without evaluation, checkpoints and log."""

    def __init__(self, config, workdir: Path, mesh, stop: StopRequest, max_answer: int):
        self.run, params = open_run(config, workdir, mesh, stop, accept_changes=False, verify=False)
        self.state = first_state(self.run, params)
        answerer, self.steps = self.run.batches.answerer, []
        answerer.options = dataclasses.replace(answerer.options, max_new_tokens=max_answer)
        self.answers = config.grpo.prompts * config.grpo.group_size

    def step(self) -> None:
        start, status = time.perf_counter(), self.run.status
        batch, failure = next_batch(self.run, self.state)
        if failure is not None:
            raise failure
        self.state, metrics = self.run.steps.train(self.state, batch)
        jax.block_until_ready((self.state, metrics))
        status.step += 1
        seconds, of = time.perf_counter() - start, self.run.batches.metrics(status.step)
        step = {"seconds": seconds, "tokens": round(of[f"{TRAIN}length"] * self.answers)}
        step |= {name: of[f"seconds_{name}"] for name in ("sampling", "scoring")}
        self.steps.append(step | {name: of[TRAIN + name] for name in ("cut_off", "reward")})


class TakeTurns(transformers.TrainerCallback):
    """Measures the steps of TRL's trainer, whose reward function it is; after each the other side has one."""

    def __init__(self, ours: OurLoop, cases: list[Case]):
        self.ours, self.cases, self.weights, self.steps, self.current = ours, cases, parse_weights(REWARDS), [], {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append({"seconds": time.perf_counter() - self.start} | self.current)
        self.ours.step()
        self.start = time.perf_counter()

    def reward(self, completions, completion_ids, number, **kwargs) -> list[float]:
        """As `rollout.Answerer` scores answers."""
        sampling, rewards, eos = time.perf_counter() - self.start, [], self.eos_id
        for messages, ids, which in zip(completions, completion_ids, number, strict=True):
            answered = Answered(self.cases[which], messages[0]["content"], stopped=ids[-1] == eos)
            rewards.append(score(self.weights, answered)[0] if answered.stopped else 0.0)
        cut_off = statistics.fmean(ids[-1] != eos for ids in completion_ids)
        self.current = {"sampling": sampling, "tokens": sum(map(len, completion_ids)), "cut_off": cut_off}
        self.current["reward"] = statistics.fmean(rewards)
        return rewards


def make_trainer(turns: TakeTurns, flags, directory: str) -> GRPOTrainer:
    """With what makes TRL fastest: no gradient checkpointing, fused AdamW, no log."""
    description, params = open_model(flags.checkpoint)
    Path(directory, "model").mkdir()
    export.write("huggingface", Path(directory, "model"), params, description, "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{directory}/model")
    turns.eos_id = tokenizer.eos_token_id
    prompts = [[{"role": "user", "content": case.question}] for case in turns.cases]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
    if ids != [list(case.prompt) for case in turns.cases]:
        raise RunError("the exported tokenizer gives other ids for the questions")
    answers = flags.prompts * flags.group_size
    micro_batch = flags.micro_batch or answers
    if answers % micro_batch:
        raise UserError(f"--micro_batch {micro_batch} does not divide the {answers} answers of a step")
    config = GRPOConfig(
        output_dir=f"{directory}/trl",
        seed=SEED,
        max_steps=WARM_UP + flags.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=answers // micro_batch,  # after sampling all answers together
        num_generations=flags.group_size,
        max_completion_length=flags.max_answer,
        shuffle_dataset=False,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        activation_checkpointing=False,
        use_cpu=True,
        bf16=False,
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype="float32")
    data = datasets.Dataset.from_dict({"prompt": prompts, "number": range(len(prompts))})
    trainer = GRPOTrainer(model, turns.reward, config, data, processing_class=tokenizer, callbacks=[turns])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def figures(steps: list[Step], answers: int) -> dict[str, float]:
    """Of the measured steps: medians and the fastest, and means of what the answers were."""
    steps = steps[WARM_UP:]
    seconds, tokens = [step["seconds"] for step in steps], [step["tokens"] for step in steps]
    return {
        "median_step": statistics.median(seconds),
        "fastest_step": min(seconds),
        "median_sampling": statistics.median(step["sampling"] for step in steps),
        "answers_per_second": answers / statistics.median(seconds),
        "fastest_answers_per_second": answers / min(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "length": statistics.fmean(tokens) / answers,
        "cut_off": statistics.fmean(step["cut_off"] for step in steps),
        "reward": statistics.fmean(step["reward"] for step in steps),
    }


def report(results: dict[str, dict[str, float]]) -> None:
    table = Table("", *results, "ratio")
    for name in results["TRL"]:
        theirs, ours = (results[side][name] for side in results)
        ratio = f"{ours / theirs:.2f}" if name.endswith("per_second") else ""
        table.add_row(name.replace("_", " "), f"{theirs:.4g}", f"{ours:.4g}", ratio)
    Console(width=100).print(table)


if __name__ == "__main__":
    console.run(main)
