"""llama.cpp, which opens a GGUF file and runs it."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

xllamacpp = pytest.importorskip("xllamacpp")


class LlamaCpp:
    """A model in llama.cpp, with float32 activations and one thread."""

    def __init__(self, path: Path, context: int):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = 1
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def greedy(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """The most probable tokens, up to one that ends the text."""
        return self._complete(prompt, n_tokens, return_tokens=True)["tokens"]

    def log_probabilities(self, prompt: Sequence[int], vocab_size: int) -> dict[int, float]:
        """Token → log-probability after the prompt; there is none if the likeliest token is no whole character."""
        (step,) = self._complete(prompt, 1, n_probs=vocab_size)["completion_probabilities"]
        return {token["id"]: token["logprob"] for token in step["top_logprobs"]}

    def _complete(self, prompt: Sequence[int], n_tokens: int, **options: Any) -> dict[str, Any]:
        request = {"prompt": list(prompt), "n_predict": n_tokens, "temperature": 0, "cache_prompt": False}
        return self._ask("completion", request | options)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; with `special`, of a prompt: special tokens are spelled in it, and begins with BOS."""
        return self._ask("tokenize", {"content": text, "parse_special": special, "add_special": special})["tokens"]

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """A conversation up to where the assistant starts, as the file's chat template has it."""
        return self._ask("apply-template", {"messages": messages})["prompt"]

    def _ask(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        url = f"{self._server.listening_address}/{what}"
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode(), headers)) as reply:
            return json.loads(reply.read())
