"""What a request's body asks for: OpenAI's fields, checked."""

import dataclasses
import functools
import json
import math
import secrets
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from tinysft_jax import chat
from tinysft_jax.console import UserError, explained, shown
from tinysft_jax.sampling.decode import Decoder, check_prompt
from tinysft_jax.sampling.filters import SamplingOptions
from tinysft_jax.sampling.steps import N_RANKED
from tinysft_jax.tokenizer import ChatTokenizer

MAX_MESSAGES = 1_000
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1_000


class ApiError(Exception):
    """A request that can't be answered; the response has the form of OpenAI's."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


@dataclasses.dataclass(frozen=True)
class Call:
    """Prompts to answer, and how."""

    is_chat: bool
    prompts: list[list[int]]
    texts: list[str]  # of the prompts, to be repeated before their answers; empty if that is not wanted
    options: SamplingOptions
    n: int  # answers to each prompt
    stops: tuple[str, ...]
    n_ranked: int | None  # most likely tokens to tell beside each; None: no log-probabilities at all
    streams: bool
    counts: bool  # whether a stream ends with the usage


Field = tuple[str, Callable[[Any], bool], Any]  # what a value must be, whether it is, and what is meant without one


def _number(low: float, high: float, default: float | None = None, kinds: Any = (int, float)) -> Field:
    what = f"a {'whole ' if kinds is int else ''}number from {low} to {high}"
    return (
        what,
        lambda value: isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high,
        default,
    )


_whole = functools.partial(_number, kinds=int)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_STOP_CHARACTERS


def _are_stops(value: Any) -> bool:
    return _is_stop(value) or (isinstance(value, list) and len(value) <= MAX_STOPS and all(map(_is_stop, value)))


def _are_stream_options(value: Any) -> bool:
    known = isinstance(value, dict) and value.keys() <= {"include_usage", "include_obfuscation"}
    return known and all(isinstance(each, bool) for each in value.values())


_BOOL = ("true or false", lambda value: isinstance(value, bool), False)
_MOST = 2**31 - 1
# The last three are no fields of OpenAI's: what `sample.py` can do besides.
_COMMON = {
    "model": ("a text", lambda value: isinstance(value, str), None),
    "n": _whole(1, 128, 1),
    "temperature": _number(0, 2, 1),
    "top_p": _number(0, 1, 1),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": (f"a text, or up to {MAX_STOPS} of them, none empty", _are_stops, ()),
    "stream": _BOOL,
    "stream_options": ('{"include_usage": true or false}', _are_stream_options, {}),
    "top_k": _whole(0, _MOST, 0),
    "min_p": _number(0, 1, 0),
    "repetition_penalty": _number(0.01, 100, 1),
}
_CHAT = _COMMON | {
    "messages": ("a list of messages", lambda value: isinstance(value, list), None),
    "max_tokens": _whole(1, _MOST),
    "max_completion_tokens": _whole(1, _MOST),
    "logprobs": _BOOL,
    "top_logprobs": _whole(0, N_RANKED, 0),
}
_COMPLETION = _COMMON | {
    "prompt": ("", lambda value: True, None),  # see Reader
    "max_tokens": _whole(0, _MOST, 16),
    "logprobs": _whole(0, N_RANKED),
    "echo": _BOOL,
}
# What OpenAI's server takes and this one can't do, with the values that ask for nothing.
_NOTHING = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "suffix": ("",)}
_NOTHING |= {"response_format": ({"type": "text"},), "modalities": (["text"],), "tools": ([],), "functions": ([],)}
_NOTHING |= dict.fromkeys(("tool_choice", "function_call"), ("none", "auto"))
_NOTHING |= dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ())
# What says nothing about the answer.
_IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
# Of a message; those after the first two only without a value.
_MESSAGE_FIELDS = ("role", "content", "name", "refusal", "audio", "tool_calls", "function_call", "annotations")


class Reader:
    """Reads bodies for a model. `name` is the model's; nothing here touches a device."""

    def __init__(self, decoder: Decoder, tokenizer: ChatTokenizer, options: SamplingOptions, name: str, most: int):
        self._config, self._tokenizer, self._options, self._name = decoder.config, tokenizer, options, name
        self.length, self._most = decoder.max_length(options), most

    def read(self, body: bytes, is_chat: bool) -> Call:
        """Raises: ApiError or UserError."""
        fields = _check_fields(_parse(body), _CHAT if is_chat else _COMPLETION)
        if fields["model"] not in (None, self._name):
            message = f"there is no model {shown(fields['model'])}; this server has {self._name}"
            raise ApiError(404, message, "model", "model_not_found")
        if is_chat and self._tokenizer.template is None:
            raise ApiError(400, "this model has no chat template; it continues text: use /v1/completions", "messages")
        most = _most_tokens(fields) if is_chat else fields["max_tokens"]
        given, n = [fields["messages"]] if is_chat else _several(fields["prompt"]), fields["n"]
        if n * len(given) > self._most:
            raise ApiError(400, f"{n * len(given)} answers at a time; at most {self._most} fit (see --queue)", "n")
        prompts = [self._encode_chat(given[0])] if is_chat else self._encode(given)
        for prompt in prompts:
            self._check_length(len(prompt), most)
            check_prompt(prompt, "the prompt", self._config, self.length + (most == 0))  # it may fill the context then
        seed = secrets.randbits(32) if fields["seed"] is None else fields["seed"] % 2**32
        numbers = {name: fields[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        options = dataclasses.replace(self._options, max_new_tokens=most, seed=seed, **numbers)
        stops = (fields["stop"],) if isinstance(fields["stop"], str) else tuple(fields["stop"])
        streams, counts = fields["stream"], fields["stream_options"].get("include_usage", False)
        decode, is_echo = self._tokenizer.decode, fields.get("echo", False)
        texts = [each if isinstance(each, str) else decode(each) for each in given if is_echo]
        return Call(is_chat, prompts, texts, options, n, stops, _n_ranked(fields, is_chat), streams, counts)

    def _encode_chat(self, messages: list[Any]) -> list[int]:
        if len(messages) > MAX_MESSAGES:
            raise ApiError(413, f"{len(messages)} messages; at most {MAX_MESSAGES} are read", "messages")
        messages = chat.read_messages([_check_message(each, index) for index, each in enumerate(messages)])
        self._check_text(*(message["content"] for message in messages))
        return self._tokenizer.encode_prompt(messages).tolist()

    def _encode(self, given: list[str] | list[list[int]]) -> list[list[int]]:
        for text in filter(lambda each: isinstance(each, str), given):
            self._check_text(text)
        return [self._tokenizer.encode_opening(each) if isinstance(each, str) else each for each in given]

    def _check_text(self, *texts: str) -> None:
        """Refuses what is far too long before it is encoded, which takes time."""
        n_bytes = sum(len(text.encode(errors="replace")) for text in texts)
        self._check_length(math.ceil(n_bytes / self._tokenizer.longest_token), 0, " or more")

    def _check_length(self, n_tokens: int, n_new: int, or_more: str = "") -> None:
        if n_tokens + min(n_new, 1) > self.length:
            message = f"the prompt has {n_tokens}{or_more} tokens, and prompt and answer have room for {self.length}"
            raise ApiError(400, message, code="context_length_exceeded")


def _several(prompt: Any) -> list[str] | list[list[int]]:
    """One text or list of ids, or several ones, as a list of them."""
    several = prompt if isinstance(prompt, list) and not all(map(_is_id, prompt)) else [prompt]
    lists = all(isinstance(each, list) and all(map(_is_id, each)) for each in several)
    if lists or all(isinstance(each, str) for each in several):
        return several
    raise ApiError(400, "prompt must be a text, a list of texts, token ids or a list of token ids", "prompt")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _parse(body: bytes) -> dict[str, Any]:
    with explained("the body is not valid JSON", causes=(ValueError, RecursionError)):
        fields = json.loads(body)
    if not isinstance(fields, dict):
        raise UserError("the body must be a JSON object")
    return fields


def _check_fields(given: dict[str, Any], known: dict[str, Field]) -> dict[str, Any]:
    """The known fields, with defaults in place of those that are missing or null."""
    for name, value in given.items():
        if value is None or name in _IGNORED:
            continue
        if name in _NOTHING and name not in known:
            if value not in _NOTHING[name] or isinstance(value, bool):  # False == 0
                raise ApiError(400, f"{name} is not supported by this server", name, "unsupported_parameter")
        elif name not in known:
            raise ApiError(400, f"unrecognized request argument: {shown(name)}", shown(name), "unknown_parameter")
        elif not known[name][1](value):
            raise ApiError(400, f"{name} is {shown(value)}; it must be {known[name][0]}", name, "invalid_value")
    values = {name: given.get(name) for name in known}
    for needed in ("messages", "prompt"):
        if needed in known and values[needed] is None:
            raise ApiError(400, f"{needed} is missing", needed, "missing_required_parameter")
    return {name: known[name][2] if value is None else value for name, value in values.items()}


def _most_tokens(fields: dict[str, Any]) -> int:
    """The most tokens of a chat's answer; by default all that there is room for."""
    given = [fields[name] for name in ("max_tokens", "max_completion_tokens") if fields[name] is not None]
    if len(given) == 2:
        raise ApiError(400, "max_tokens and max_completion_tokens are the same; give one", "max_tokens")
    return given[0] if given else _MOST


def _n_ranked(fields: dict[str, Any], is_chat: bool) -> int | None:
    if not is_chat:
        return fields["logprobs"]
    if fields["top_logprobs"] and not fields["logprobs"]:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return fields["top_logprobs"] if fields["logprobs"] else None


def _check_message(message: Any, index: int) -> Any:
    """The message, with the newer name of its role as the older one; the rest is for `chat.read_messages` to check."""
    if not isinstance(message, dict):
        return message
    for field, value in message.items():
        if field not in _MESSAGE_FIELDS[:2] and (value or field not in _MESSAGE_FIELDS):
            where = f"messages[{index}].{shown(field)[1:-1]}"
            raise ApiError(400, f"{where} is not supported by this server", where, "unsupported_parameter")
    return message | {"role": "system"} if message.get("role") == "developer" else message
