"""Trains: `python train.py --config=configs/sft.py --workdir=DIR [--config.KEY=VALUE ...]`."""

import ctypes
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tinysft_jax import console
from tinysft_jax.console import UserError
from tinysft_jax.training.config import check_key, reference

CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, and after a colon its preset.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no launcher tells it.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run, where no launcher tells it.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0, where no launcher tells it.")
ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Resume a run although its model, data or schedule have changed."
)
VERIFY = flags.DEFINE_bool("verify", False, "Compare the data with the hashes of its manifest first.")
WORKDIR = flags.DEFINE_string("workdir", None, "Output of the run; an existing one is resumed.")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}\n{flags.FLAGS.main_module_help()}\nKeys of the configuration:\n{reference()}")
        return
    use_few_arenas()
    for argument in sys.argv[1:]:
        if match := re.match(r"--?config\.([^=]+)", argument):
            check_key(match[1])
    try:
        extra = flags.FLAGS(sys.argv)[1:]
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise UserError(f"{error} (see train.py --help)") from None
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; settings are given as --config.KEY=VALUE")
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("--config=FILE and --workdir=DIR are needed, e.g. --config=configs/sft.py --workdir=runs/sft")
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    if not file.is_file():
        raise UserError(f"there is no configuration {file}; this project's are in configs/, such as configs/sft.py")
    from tinysft_jax import accelerator, distributed  # after the flags, because importing JAX takes seconds
    from tinysft_jax.export import export_run, parse_export
    from tinysft_jax.training.loop import train

    config, workdir = CONFIG.value, Path(WORKDIR.value).expanduser()
    parse_export(config.get("export", ""))
    distributed.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    accelerator.keep_compiled()
    train(config, workdir, ACCEPT_CHANGES.value, VERIFY.value)

    def export() -> None:
        for line in export_run(workdir, config.export):
            print(line, file=sys.stderr)

    distributed.on_first(export)


def use_few_arenas() -> bool:
    """Limits glibc's malloc to two arenas, before there are threads; returns whether it could.

    By default each of the dozens of threads of JAX and orbax gets an arena, which keeps what is freed: the memory of a
    long run grew by a tenth, though nothing leaked.
    """
    m_arena_max = -8  # M_ARENA_MAX of malloc.h
    try:
        return ctypes.CDLL(None).mallopt(m_arena_max, 2) == 1
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False


if __name__ == "__main__":
    console.run(main)
