"""Conversations in files: chat-jsonl with a single one, which `tinysft_jax.data.prepare` reads as well."""

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
    """Reads a conversation that holds an answer, however its JSON is laid out.

    Raises:
      UserError: if the file is not chat-jsonl with one such conversation.
    """
    try:
        found = json.loads(files.read_text(path, "utf-8-sig"))
        if isinstance(found, list) and len(found) == 1:
            found = found[0]
        messages = chat.parse_chat(found, needs_answer=False)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError("nothing is answered in it")
        return messages
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not one conversation in chat-jsonl: {error}") from None
