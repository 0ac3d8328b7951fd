"""Own chats, alone and mixed with the old tasks: what a fine-tuned model learns of them, and what it forgets.

`python benchmarks/specialise.py [--demo runs/demo --shares 1,0.5,0.2 --steps 100 --cases 60]`, after `make demo`. The
chats are questions about animals, in five wordings each; a twelfth of them is held out. Each run sees them as often.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinysft_jax import console

# What it says, where it lives, what it eats, what its young is called.
ANIMALS = """cow moo barn grass calf, dog woof kennel bones puppy, cat meow house fish kitten, horse neigh stable hay
foal, sheep baa meadow clover lamb, pig oink sty corn piglet, duck quack pond bread duckling, hen cluck
coop grain chick, goat bleat hill leaves kid, bear growl cave honey cub, lion roar plain meat cub, frog
croak swamp flies tadpole, owl hoot tree mice owlet, bee buzz hive nectar larva, snake hiss hole eggs
snakelet, wolf howl forest deer pup, mouse squeak nest cheese pup, crow caw roof seeds chick, donkey bray
shed carrots foal, fox yelp den berries cub"""
WORDINGS = tuple(
    line.split("; ")
    for line in (
        "What does a {} say?; What sound does a {} make?; How does a {} talk?; Tell me its sound: a {}.; A {} says?",
        "Where does a {} live?; What is the home of a {}?; Where is a {}?; Tell me where a {} sleeps.; A {} lives?",
        "What does a {} eat?; What is the food of a {}?; What does a {} like?; Tell me what a {} eats.; A {} eats?",
        "What is a young {}?; What is the baby of a {}?; What is a little {}?; Name the young of a {}.; A {} child?",
    )
)
METRICS = ("answer_included", "character_correct", "yes_no_correct", "moral_correct", "rouge_l", "all_words_used")


def write_chats(path: Path) -> None:
    """A line of chat-jsonl for each animal, fact and wording, in random order."""
    chats = []
    for animal in ANIMALS.split(","):
        name, *facts = animal.split()
        for fact, wordings in zip(facts, WORDINGS, strict=True):
            chats += [{"prompt": wording.format(name), "completion": f"The {fact}."} for wording in wordings]
    random.Random(0).shuffle(chats)
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = console.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=console.path, default=Path("runs/demo"), help="what `make demo` wrote")
    parser.add_argument("--shares", default="1,0.5,0.2", help="of the rows, that are of the own chats")
    parser.add_argument("--steps", type=int, default=100, help="with the own chats alone; more where they are mixed")
    parser.add_argument("--cases", type=int, default=60, help="of each task")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        own, tasks, sft = f"{directory}/own", flags.demo.resolve() / "tasks", flags.demo.resolve() / "sft"
        write_chats(Path(f"{directory}/own.jsonl"))
        run(
            *f"-m tinysft_jax.data.prepare --input={own}.jsonl --output={own} --tokenizer={sft}".split(),
            "--valid_fraction=0.08",
        )
        models = {"before": str(sft)}
        for share in map(float, flags.shares.split(",")):
            data = own if share == 1 else f"{own}={share},{tasks}={1 - share:.6f}"
            models[f"own {share:.0%}"] = work = f"{directory}/{share}"
            steps = round(flags.steps / share)
            settings = {"max_steps": steps, "eval_interval": steps, "eval_batches": 2, "save_interval": steps}
            changes = [f"--config.train.{key}={value}" for key, value in settings.items()]
            changes += [
                f"--config.data.path={data}",
                f"--config.init_from={sft}",
                "--config.optimizer.learning_rate=1e-3",
            ]
            run("train.py", "--config=configs/sft.py:demo", f"--workdir={work}", *changes)
        results = {
            name: evaluate(model, f"{own}=0.5,{tasks}=0.5", directory, flags.cases) for name, model in models.items()
        }
    rows = [key for key in results["before"] if key.rpartition(" ")[2] in METRICS]
    table = Table("task and metric", *results)
    for key in rows:
        table.add_row(key, *(f"{of[key]:.2f}" for of in results.values()))
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "specialise", **vars(flags), "demo": str(flags.demo), "results": results}))


def evaluate(model: str, data: str, directory: str, cases: int) -> dict[str, float]:
    """Task and metric → the mean over held-out questions."""
    output = f"{directory}/report"
    flags = (f"--checkpoint={model}", f"--data={data}", f"--output={output}", f"--cases={cases}", "--overwrite")
    run("-m", "tinysft_jax.evaluation.run", *flags)
    tasks = json.loads(Path(f"{output}/report.json").read_text())["tasks"]
    return {f"{task} {metric}": of["model"]["value"] for task, each in tasks.items() for metric, of in each.items()}


if __name__ == "__main__":
    console.run(main)
