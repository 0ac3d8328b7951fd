"""Every command in README, docs and Makefile is understood, on as many devices as the text speaks of."""

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags
from ml_collections import config_flags

from tinysft_jax.gpt_config import GPTConfig
from tinysft_jax.sharding import mesh_sizes
from tinysft_jax.training.config import check_batch, check_config, check_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Command(NamedTuple):
    """A command line and the devices that it is for."""

    page: str
    words: list[str]
    devices: int = 1


def lines_of(text: str) -> Iterator[str]:
    """Command lines of code blocks and in running text; with an ellipsis they are none."""
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
        for words in re.findall(r"command: \[(.*?)\]", block, re.DOTALL):  # a Kubernetes manifest
            n_pods, gpus = re.search(r"completions: (\d+)", block)[1], re.search(r"nvidia.com/gpu: (\d+)", block)[1]
            yield f"{' '.join(words.replace(chr(10), ' ').split(','))}  # {int(n_pods) * int(gpus)} GPUs"
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands() -> Iterator[Command]:
    for page in PAGES:
        for line in lines_of(page.read_text(encoding="utf-8")):
            line, _, comment = line.partition(" # ")
            found = re.search(r"(?:^|[ /])(?:(?:make|srun|mpirun|python) .*)", line.strip())
            if not found or "…" in line or "..." in line.replace('"..."', "text"):
                continue
            if "--config=FILE" in line or "train.py --help" in line:  # no commands that start a run
                continue
            words, devices = shlex.split(found[0].strip(" /")), 1
            if words[0] == "srun":
                launcher, words = words[: words.index("python")], words[words.index("python") :]
                count = dict(word.lstrip("-").split("=") for word in launcher[1:])
                devices = int(count["nodes"]) * int(count["gpus-per-node"])
            elif gpus := re.search(r"(\d+) GPUs", comment):
                devices = int(gpus[1])
            yield Command(page.name, words, devices)


def commands_of_make(*targets: str) -> Iterator[Command]:
    """What `make` would run, in a checkout without anything that it makes."""
    make = ["make", "--dry-run", "--always-make", "--no-print-directory", f"PYTHON={sys.executable}", *targets]
    lines = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ")
    for line in lines.splitlines():
        if found := re.match(r"\.venv-[^/]+/bin/(python [^>]*)", line):
            yield Command("Makefile", shlex.split(found[1]))


COMMANDS = [*commands(), *(commands_of_make("demo", "demo-real") if shutil.which("make") else ())]


def kind(command: Command) -> str:
    return command.words[0] if command.words[0] == "make" else next(word for word in command.words[1:] if word != "-m")


def of_kind(*kinds: str) -> list:
    found = [command for command in COMMANDS if kind(command) in kinds]
    return [pytest.param(command, id=f"{command.page}:{' '.join(command.words)[:60]}") for command in found]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_found():
    kinds = {kind(command) for command in COMMANDS}
    assert {"train.py", "sample.py", "convert_torch_weights.py", "tinysft_jax.data.prepare", "make"} <= kinds
    assert {command.devices for command in COMMANDS} >= {1, 8, 16, 32}


@pytest.mark.parametrize("command", of_kind("train.py"))
def test_a_training_command_is_a_run(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command.words[1:])  # which ml_collections looks through
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    for name in ("workdir", "coordinator", "num_processes", "process_id"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("verify", "accept_changes"):
        flags.DEFINE_bool(name, False, "", flag_values=values)
    assert values(command.words[1:])[1:] == []
    sizes = mesh_sizes(command.devices, **config.value.mesh)
    check_config(config.value)
    check_batch(config.value, sizes[0] * sizes[1])
    check_model(config.value.data.seq_len, GPTConfig().max_seq_len, GPTConfig().n_heads, sizes[2])
    assert config.value.init_from or "pretrain" in " ".join(command.words)


@pytest.mark.parametrize("command", of_kind("sample.py", "convert_torch_weights.py"))
def test_a_scripts_command_is_understood(command, monkeypatch, tmp_path):
    script = load_script(kind(command))
    monkeypatch.chdir(tmp_path)
    script._parse(command.words[2:])


@pytest.mark.parametrize(
    "command",
    of_kind(
        *("tinysft_jax.data.prepare", "tinysft_jax.data.inspect", "tinysft_jax.evaluation.run"),
        *("tinysft_jax.preferences",),
    ),
)
def test_a_modules_command_is_understood(command):
    module = importlib.import_module(kind(command))
    module._parse(command.words[3:])


@pytest.mark.parametrize("command", of_kind("make"))
def test_make_has_the_target(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (word for word in command.words[1:] if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
