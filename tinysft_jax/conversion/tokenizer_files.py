"""The tokenizer files of a Hugging Face folder, read with the model's own chat template, and written back."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinysft_jax.bpe import TOKENIZER_JSON, FileBpe
from tinysft_jax.console import UserError, import_extra
from tinysft_jax.conversion.huggingface_tokenizer import TOKEN_FLAGS, control_template
from tinysft_jax.conversion.take_apart import prove, take_apart
from tinysft_jax.tokenizer import ChatTokenizer, read_files

SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_SPECIAL_MAP, _GENERATION = "special_tokens_map.json", "generation_config.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer(path: Path, config: Mapping[str, Any]) -> ChatTokenizer:
    """The tokenizer of a folder with a `tokenizer.json`, see `from_files`."""
    return from_files(read_files(path), config, path)


def from_files(kept: Mapping[str, bytes], config: Mapping[str, Any], path: Path) -> ChatTokenizer:
    """The tokenizer of a folder's files, with the model's chat template; `config` is the folder's `config.json`.

    A template that can't be taken apart is named on stderr, with `path`, and the model taken as one without.
    Raises: UserError, if the tokenizer can't be used.
    """
    variables = special_tokens(kept)
    try:
        added = {token["content"]: token["id"] for token in _object(kept, TOKENIZER_JSON)["added_tokens"]}
        spelled = {id: token for token, id in added.items()}
    except (KeyError, TypeError):
        raise UserError(f"{TOKENIZER_JSON} has no sound added_tokens; copy it again") from None
    ends = (spelled.get(id) for id in _end_ids(config, _object(kept, _GENERATION)))
    stops = list(dict.fromkeys(filter(None, (variables.get("eos_token"), *ends))))
    if not stops:
        raise UserError("it names no special token that ends a text: eos_token, in tokenizer_config.json")
    bpe = FileBpe(kept, stops[0], stops)
    if (source := chat_template(kept)) is None:
        return ChatTokenizer(None, bpe=bpe)
    import_extra("jinja2", "hf", "a chat template")
    try:
        template = take_apart(source, variables, added)
        unmarked = set(template.controls) - bpe.special_ids.keys()  # which the file has as ordinary tokens
        tokenizer = ChatTokenizer(template, bpe=FileBpe(kept, bpe.eot, stops, unmarked) if unmarked else bpe)
        prove(tokenizer, source, variables)
        return tokenizer
    except UserError as error:
        print(f"note: {path}: its chat template is not used, and conversations get another: {error}", file=sys.stderr)
        return ChatTokenizer(None, bpe=bpe)


def to_write(tokenizer: ChatTokenizer) -> dict[str, bytes]:
    """The files of a folder: as they came; where the model got the template "control", with it and its tokens."""
    if tokenizer.template != "control":
        return dict(tokenizer.files)
    kept = {name: data for name, data in tokenizer.files.items() if name != "chat_template.json"}
    content, settings = json.loads(kept[TOKENIZER_JSON]), _object(kept, SETTINGS)
    content["added_tokens"] += [
        {"id": id, "content": text, **TOKEN_FLAGS} for text, id in tokenizer.control_ids.items()
    ]
    settings.pop("chat_template", None)
    changed = {TOKENIZER_JSON: content, SETTINGS: settings | {"eos_token": tokenizer.bpe.eot}}
    written = {name: json.dumps(value, ensure_ascii=False, indent=2).encode() for name, value in changed.items()}
    return kept | written | {TEMPLATE: control_template(tokenizer.bpe.eot, "".join(tokenizer.bpe.bos)).encode()}


def token_ids(tokenizer: ChatTokenizer) -> dict[str, int | list[int] | None]:
    """The ids in `config.json`."""
    tokens = special_tokens(tokenizer.files)
    bos, pad = (tokenizer.bpe.special_ids.get(tokens.get(name)) for name in ("bos_token", "pad_token"))
    one, *more = tokenizer.stop_ids
    return {"bos_token_id": bos, "eos_token_id": [one, *more] if more else one, "pad_token_id": pad}


def _object(kept: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The content of a JSON file, empty if there is none."""
    try:
        content = json.loads(kept.get(name, b"{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"its {name} is damaged or cut short; copy it again")
    return content


def special_tokens(kept: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens by name, as text; the first file that has one counts."""
    found: dict[str, str] = {}
    for source in (_object(kept, SETTINGS), _object(kept, _SPECIAL_MAP)):
        for name in _SPECIAL:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                found.setdefault(name, token)
    return found


def _end_ids(*sources: Mapping[str, Any]) -> Iterator[int]:
    for source in sources:
        ids = source.get("eos_token_id")
        yield from (id for id in (ids if isinstance(ids, list) else [ids]) if type(id) is int)


def chat_template(kept: Mapping[str, bytes]) -> str | None:
    """The chat template in Jinja, from where transformers takes it; None if the model has none."""
    if TEMPLATE in kept:
        return kept[TEMPLATE].decode("utf-8", errors="surrogateescape")
    settings = _object(kept, SETTINGS)
    template = _object(kept, "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):  # several by name
        named = {str(each.get("name")): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None
