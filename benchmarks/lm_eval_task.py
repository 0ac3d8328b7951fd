"""A task for lm-eval of questions that have been asked by `tinysft_jax.evaluation.run`: does a story end happily?

`python benchmarks/lm_eval_task.py --answers=EVALUATION/answers.jsonl --output=DIR` writes `happy_ending.yaml` and its
questions; docs/serving.md has the rest.
"""

import json
from pathlib import Path

from tinysft_jax import console
from tinysft_jax.console import UserError, explained

CHOICES = ["Yes, this story has a happy ending.", "No, this story does not have a happy ending."]
TASK = """\
task: happy_ending
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {choices}
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", required=True, type=console.path, help="answers.jsonl of an evaluation")
    parser.add_argument("--output", required=True, type=console.path, metavar="DIR")
    parser.add_argument("--questions", type=int, default=50)
    flags = parser.parse_args()
    with explained(f"can't read {flags.answers}"):
        cases = [json.loads(line) for line in flags.answers.read_text(encoding="utf-8").splitlines()]
    lines = [
        {"question": case["question"], "label": 0 if case["ground_truth"].startswith("Yes") else 1}
        for case in cases
        if case["task"] == "happy_ending"
    ]
    if len(lines) < flags.questions:
        raise UserError(f"{flags.answers} has {len(lines)} such questions; evaluate with --cases={flags.questions}")
    flags.output.mkdir(parents=True, exist_ok=True)
    questions = Path(flags.output, "questions.jsonl").resolve()
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines[: flags.questions]), encoding="utf-8")
    task = TASK.format(questions=questions, choices=json.dumps(CHOICES))
    Path(flags.output, "happy_ending.yaml").write_text(task, encoding="utf-8")
    print(f"{flags.questions} questions in {flags.output}")


if __name__ == "__main__":
    console.run(main)
