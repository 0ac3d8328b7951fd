"""OpenAI's client, and what its answers say."""

from typing import Any

import openai
from serving_model import Running
from tiny_model import make_tokenizer

TOKENIZER = make_tokenizer("control")
SHORT = {"role": "system", "content": "s"}  # the default system message has 66 tokens
WHY = [SHORT, {"role": "user", "content": "why"}]


def make_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def chat(client: openai.OpenAI, messages: Any = WHY, **options):
    return client.chat.completions.create(messages=messages, **{"model": "letters"} | options)


def complete(client: openai.OpenAI, prompt: Any = "once upon", **options):
    return client.completions.create(prompt=prompt, **{"model": "letters"} | options)


def texts(answer: Any) -> list[str]:
    """Of a chat or a completion."""
    return [choice.message.content if hasattr(choice, "message") else choice.text for choice in answer.choices]


def streamed(chunks: Any) -> list[str]:
    """The texts of a stream's choices."""
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            new = (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
            joined[choice.index] = joined.get(choice.index, "") + new
    return [joined[index] for index in sorted(joined)]
