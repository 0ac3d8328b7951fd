"""The tokenizer in a GGUF file, as the files of a Hugging Face folder, and the other way."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinysft_jax.bpe import SPACE, TOKENIZER_JSON, FileBpe, Gpt2Bpe
from tinysft_jax.console import UserError, shown
from tinysft_jax.conversion.huggingface_tokenizer import (
    BYTE_LEVEL,
    PAD,
    TOKEN_FLAGS,
    control_template,
    merge_pairs,
    split_steps,
    tokenizer_json,
)
from tinysft_jax.conversion.take_apart import PROBES, probe_conversations
from tinysft_jax.conversion.tokenizer_files import SETTINGS, TEMPLATE, chat_template, special_tokens, to_write
from tinysft_jax.files import TEXTS
from tinysft_jax.tokenizer import ChatTokenizer

_P = "tokenizer.ggml."
_, _is_texts = TEXTS
# What a token is, in `token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Names of special tokens in Hugging Face's files → keys here.
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")
_LONGEST_PIECE = 1000  # SentencePiece's have up to 16 characters; to find merges takes the square of the length


def _split(digits: str) -> dict[str, Any]:
    """How Llama 3 and Qwen 2 split text before merging; they differ in how many digits are one word."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    regex = {"Regex": f"{words}|{digits}|{others}"}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
# llama.cpp's name of a pre-tokenizer → what it is in tokenizer.json. Of two names the first is written.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_PRE = {
    **dict.fromkeys(("gpt-2", "phi-2"), BYTE_LEVEL),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    **dict.fromkeys(_LLAMA3, _split(r"\p{N}{1,3}")),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _split(r"\p{N}")),
}


def to_files(pairs: Mapping[str, Any]) -> tuple[dict[str, bytes], list[int]]:
    """The tokenizer files that a file's key-value pairs stand for, and the ids that end a text; nothing if it has none.

    Raises: UserError, if the tokenizer is damaged, or of a kind that is not read.
    """
    kind, pre, tokens = (pairs.get(f"{_P}{name}") for name in ("model", "pre", "tokens"))
    if not all(isinstance(name, str | None) for name in (kind, pre)):
        raise UserError(f"its {_P}model or {_P}pre is not a name")
    if kind in (None, "no_vocab", "none"):
        return {}, []
    if kind not in ("gpt2", "llama"):
        raise UserError(f"its tokenizer is {shown(kind)}; only BPE is read, which is called 'gpt2' or 'llama'")
    if not _is_texts(tokens) or len(set(tokens)) < len(tokens):
        raise UserError(f"its {_P}tokens are no list of different texts")
    ids = {name: id for name in {*_SPECIAL.values(), *_ENDS} if (id := _id(pairs, name, len(tokens))) is not None}
    types = _numbers(pairs, "token_type", np.full(len(tokens), _NORMAL))
    # As in llama.cpp, whatever they are said to be. Padding may be any token.
    marked = [id for name, id in ids.items() if name != "padding" and types[id] in (_NORMAL, _USER_DEFINED)]
    types[marked] = _CONTROL
    content = _byte_level(pairs) if kind == "gpt2" else _sentencepiece(pairs, tokens, types)
    is_added = np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))
    # A vocabulary need not hold added tokens at its end; and unused ids there have no token.
    size = max(np.flatnonzero(~is_added & (types != _UNUSED)), default=-1) + 1
    content["model"]["vocab"] = {token: id for id, token in enumerate(tokens[:size])}
    content["added_tokens"] = [
        {"id": id, "content": tokens[id], **TOKEN_FLAGS, "special": bool(types[id] != _USER_DEFINED)}
        for id in np.flatnonzero(is_added).tolist()
    ]
    settings = {name: tokens[ids[key]] for name, key in _SPECIAL.items() if key in ids}
    if _flag(pairs, "add_bos_token", kind == "llama" or pre in _LLAMA3) and "bos" in ids:
        content["post_processor"] = _begin_with(tokens[ids["bos"]], ids["bos"])
    kept = {TOKENIZER_JSON: _dump(content), SETTINGS: _dump(settings)}
    if isinstance(template := pairs.get("tokenizer.chat_template"), str) and template:
        kept[TEMPLATE] = template.encode()
    return kept, [ids[name] for name in _ENDS if name in ids]


def _byte_level(pairs: Mapping[str, Any]) -> dict[str, Any]:
    pre, merges = pairs.get(f"{_P}pre"), pairs.get(f"{_P}merges", [])
    if pre not in _PRE:
        raise UserError(f"it splits text as {shown(pre)} ({_P}pre); known are {', '.join(_PRE)}")
    if not _is_texts(merges) or not all(merge.count(" ") == 1 for merge in merges):
        raise UserError(f"its {_P}merges are no list of pairs")
    model = {"type": "BPE", "ignore_merges": pre in _LLAMA3, "byte_fallback": False, "merges": merges}
    return {"normalizer": None, "pre_tokenizer": _PRE[pre], "decoder": BYTE_LEVEL, "model": model}


def _sentencepiece(pairs: Mapping[str, Any], tokens: Sequence[str], types: np.ndarray) -> dict[str, Any]:
    scores = _numbers(pairs, "scores", np.zeros(len(tokens)))
    pieces = {tokens[id]: scores[id] for id in np.flatnonzero(types == _NORMAL).tolist()}
    if (longest := max(map(len, pieces), default=0)) > _LONGEST_PIECE:
        raise UserError(f"it has a token of {longest:,} characters; over {_LONGEST_PIECE:,} are not read")
    unknown = [tokens[id] for id in np.flatnonzero(types == _UNKNOWN)[:1]]
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if _flag(pairs, "add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "merges": _merges(pieces)}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}]},
        "model": model | {"unk_token": unknown[0] if unknown else None},
    }


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that give SentencePiece's BPE: of all pairs that make a token first those of the highest score."""
    return [
        (token[:i], token[i:])
        for token in sorted(scores, key=scores.__getitem__, reverse=True)
        for i in range(1, len(token))
        if token[:i] in scores and token[i:] in scores
    ]


def to_pairs(tokenizer: ChatTokenizer, vocab_size: int) -> dict[str, Any]:
    """The key-value pairs of a tokenizer for a model with `vocab_size` ids.

    Raises: UserError, if llama.cpp would give other ids.
    """
    if tokenizer.files:
        kept = to_write(tokenizer)
        content, names, template = json.loads(kept[TOKENIZER_JSON]), special_tokens(kept), chat_template(kept)
    else:
        # The template "text" has no tokens of its own; llama.cpp encodes its prompts as they are.
        plain = tokenizer.with_template(None) if tokenizer.template == "text" else tokenizer
        content = tokenizer_json(plain, plain.vocab_size)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != PAD]
        names = dict.fromkeys(("bos_token", "eos_token"), tokenizer.bpe.eot)
        template = control_template() if tokenizer.template else None
    names["eos_token"] = tokenizer.bpe.eot
    added = {token["content"]: token for token in content["added_tokens"]}
    token_of = {id: token for token, id in content["model"]["vocab"].items()}
    token_of |= {entry["id"]: token for token, entry in added.items()}
    tokens = [token_of.get(id, f"<|unused{id}|>") for id in range(vocab_size)]
    pairs = _model_pairs(content, tokens, bool(tokenizer.bpe.prefix))
    types = [_token_type(token, id in token_of, added, content["model"]) for id, token in enumerate(tokens)]
    pairs |= {f"{_P}tokens": tokens, f"{_P}token_type": np.array(types), f"{_P}add_bos_token": bool(tokenizer.bpe.bos)}
    special = {key: names.get(name) for name, key in _SPECIAL.items()}
    special |= zip(_ENDS[1:], (stop for stop in tokenizer.bpe.stops if stop != tokenizer.bpe.eot), strict=False)
    id_of = {token: id for id, token in enumerate(tokens)}  # a name may be of a token that the vocabulary lacks
    pairs |= {f"{_P}{key}_token_id": id_of[token] for key, token in special.items() if token in id_of}
    if template:
        # Comments in place of transformers' own tags, which mark what is learned; so white space stays as it is.
        pairs["tokenizer.chat_template"] = re.sub(r"{%([-+]?)\s*(?:end)?generation\s*([-+]?)%}", r"{#\1 \2#}", template)
    _check_same(tokenizer.bpe, pairs)
    return pairs


def _model_pairs(content: Mapping[str, Any], tokens: Sequence[str], prefix: bool) -> dict[str, Any]:
    """What says how text is split and merged."""
    pairs = merge_pairs(content)
    if content["model"].get("byte_fallback") is True:
        made = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(pairs)))}
        scores = [made.get(token, -float(len(pairs))) for token in tokens]
        return {f"{_P}model": "llama", f"{_P}scores": np.array(scores), f"{_P}add_space_prefix": prefix}
    pre = [name for name, part in _PRE.items() if split_steps(part) == split_steps(content["pre_tokenizer"])]
    if not pre:
        raise UserError(f"llama.cpp has no name for how its tokenizer splits text: {shown(content['pre_tokenizer'])}")
    if not pairs:
        raise UserError("llama.cpp needs a tokenizer with merges, and this one has none")
    return {f"{_P}model": "gpt2", f"{_P}pre": pre[0], f"{_P}merges": [" ".join(pair) for pair in pairs]}


def _check_same(bpe: Gpt2Bpe | FileBpe, pairs: Mapping[str, Any]) -> None:
    """Raises: UserError, if the BPE that `to_files` reads from the pairs gives other ids."""
    kept, _ = to_files(pairs)
    theirs = FileBpe(kept, bpe.eot, bpe.stops)
    differing = []
    if (bpe.prefix, bpe.bos) != (theirs.prefix, theirs.bos):
        differing += ["beginning of a text"]
    if bpe.prefix and not bpe.prefixes_sections:
        differing += ["text after a special token"]
    if bpe.files and set(_merges_of(bpe.files)) != set(_merges_of(kept)):
        differing += ["merges"]
    if differing:
        raise UserError(f"llama.cpp can't have this tokenizer: the {' and the '.join(differing)} would be others")
    for messages in itertools.islice(probe_conversations(with_system=False), PROBES):
        for text in (message["content"] for message in messages):
            for continues in (False, True):
                if bpe.encode(text, continues) != theirs.encode(text, continues):
                    raise UserError(f"llama.cpp can't have this tokenizer: it would give other ids for {shown(text)}")


def _merges_of(kept: Mapping[str, bytes]) -> list[tuple[str, ...]]:
    return merge_pairs(json.loads(kept[TOKENIZER_JSON]))


def _token_type(token: str, is_known: bool, added: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    if not is_known:
        return _UNUSED
    if token in added:
        special = _UNKNOWN if token == model.get("unk_token") else _CONTROL
        return special if added[token].get("special") is True else _USER_DEFINED
    is_byte = model.get("byte_fallback") is True and re.fullmatch("<0x[0-9A-F]{2}>", token)
    return _BYTE if is_byte else _NORMAL


def _begin_with(token: str, id: int) -> dict[str, Any]:
    """A post-processor that puts this token before a text."""
    begin, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {token: {"id": token, "ids": [id], "tokens": [token]}}
    pair = [begin, text, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": [begin, text], "pair": pair, "special_tokens": special}


def _id(pairs: Mapping[str, Any], name: str, n_ids: int) -> int | None:
    id = pairs.get(key := f"{_P}{name}_token_id")
    if name == "padding" and id == 2**32 - 1:  # llama.cpp's converter of llama2.c writes -1 for none
        return None
    if id is not None and (type(id) is not int or not 0 <= id < n_ids):
        raise UserError(f"its {key} is {shown(id)}, and the vocabulary has {n_ids:,} ids")
    return id


def _numbers(pairs: Mapping[str, Any], name: str, default: np.ndarray) -> np.ndarray:
    """A number for each id."""
    values = pairs.get(f"{_P}{name}", default)
    if not isinstance(values, np.ndarray) or values.shape != default.shape or not np.isfinite(values).all():
        raise UserError(f"its {_P}{name} are not {len(default):,} numbers, one for each id")
    return np.array(values)


def _flag(pairs: Mapping[str, Any], name: str, default: bool) -> bool:
    value = pairs.get(f"{_P}{name}", default)
    if type(value) is not bool:
        raise UserError(f"its {_P}{name} is {shown(value)}, not true or false")
    return value


def _dump(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
