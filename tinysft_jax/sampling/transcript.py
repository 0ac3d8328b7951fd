"""Conversations in files: chat-jsonl with one line, which `tinysft_jax.data.prepare` reads as well."""

import json
import os
from pathlib import Path

from tinysft_jax import chat, files
from tinysft_jax.errors import UserError, reason
from tinysft_jax.sampling.text import Messages


def save_transcript(path: Path, messages: Messages, overwrite: bool = False) -> None:
    """Writes a conversation, whole or not at all.

    Raises:
      UserError: if the file exists (without `overwrite`) or can't be written.
    """
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists; choose another name")
    try:
        files.write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"can't write {path}: {reason(error)}") from None


def load_transcript(path: Path) -> Messages:
    """Reads a conversation.

    Raises:
      UserError: if the file is not chat-jsonl with one conversation.
    """
    try:
        lines = [line for line in files.read_text(path, "utf-8-sig").split("\n") if line.strip()]
        if len(lines) != 1:
            raise UserError(f"{len(lines)} lines; a conversation to go on with is a single one")
        return chat.parse_chat(json.loads(lines[0]))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a conversation in chat-jsonl: {error}") from None
