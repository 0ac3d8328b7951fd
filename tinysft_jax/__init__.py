"""Supervised fine-tuning of small GPTs in JAX: the names that programs use."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported when first used: JAX takes seconds to import, and preparing data, say, does without.
_MODULES = {
    "GPT": "model",
    "GPTConfig": "gpt_config",
    "load_model": "checkpoints",
    "ChatTokenizer": "tokenizer",
    "load_tokenizer": "checkpoints",
    "StoryRecord": "tasks.records",
    "parse_records": "tasks.records",
    "Conversation": "tasks.make",
    "make_tasks": "tasks.make",
    "batches": "data.batches",
    "generate": "sampling.decode",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
