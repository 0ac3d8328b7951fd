"""The tokenizer as Hugging Face files: `tokenizer.json`, and `tokenizer_config.json` with the chat template (Jinja).

`tokenizer.json` gives this package's ids: GPT-2's regular expression splits text alike in both libraries, and exactly
one merge produces a BPE token, so merging in the order of GPT-2's list is merging by rank.
"""

import operator
from pathlib import Path
from typing import Any

from tinysft_jax import chat
from tinysft_jax.bpe import GPT2_RANKS, read_merges
from tinysft_jax.tokenizer import ChatTokenizer

# Fills up the rows of a batch. It is not end-of-text, because programs that leave padding out of a loss would leave
# out the end of every answer, too.
PAD = "<|pad|>"

# Conversations as `chat.prompt_pieces` lays them out and refuses them. What is supervised stands between
# `{% generation %}` and `{% endgeneration %}`; transformers and TRL search for exactly this spelling.
_TEMPLATE_FILE = Path(__file__).parents[1] / "assets" / "chat_template.jinja"

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Of an added token that stands for itself, whatever is around it.
TOKEN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# In the template "text", a prompt is one string, and the answer is encoded apart from it, although only text separates
# them. So a text that begins like a conversation is split there; otherwise `>` and a quotation mark, say, would become
# one token. In Oniguruma, (?m:.) matches newlines.
_TEXT_PROMPT = r"\A(?m:<\|system\|>.*?)?<\|user\|>(?m:.*?)<\|assistant\|>"
_TEXT_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _TEXT_PROMPT}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL,
    ],
}
_PRE_TOKENIZERS = {"control": BYTE_LEVEL, "text": _TEXT_PRE_TOKENIZER, None: BYTE_LEVEL}


def added_tokens(tokenizer: ChatTokenizer, vocab_size: int) -> dict[str, int]:
    """Token → id of everything that is not text: control tokens, ids without a meaning, and the pad token.

    The model's `vocab_size` may be above the tokenizer's. The ids between get names, because a Hugging Face tokenizer
    can't leave ids out.
    """
    unused = {f"<|unused{id}|>": id for id in range(tokenizer.vocab_size, vocab_size)}
    return {chat.END_OF_TEXT: tokenizer.eot_id, **tokenizer.control_ids, **unused, PAD: vocab_size}


def tokenizer_json(tokenizer: ChatTokenizer, vocab_size: int) -> dict[str, Any]:
    """The content of `tokenizer.json`; `vocab_size` is the model's."""
    alphabet, merges = read_merges()
    merges = merges[: tokenizer.bpe.ranks - len(alphabet)]
    tokens = [*alphabet, *map("".join, merges)]
    added = added_tokens(tokenizer, vocab_size)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": content, **TOKEN_FLAGS} for content, id in added.items()],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[tokenizer.template],
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: rank for rank, token in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def tokenizer_config(tokenizer: ChatTokenizer, max_length: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`; `max_length` is the number of tokens that the model was trained on."""
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it is
        "bos_token": chat.END_OF_TEXT,
        "eos_token": chat.END_OF_TEXT,
        "pad_token": PAD,
        "padding_side": "left",  # generation continues at the end of a row
        "additional_special_tokens": list(tokenizer.control_ids),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    if tokenizer.template:
        content["chat_template"] = control_template()
    return content


def control_template(eot: str = chat.END_OF_TEXT, bos: str = "") -> str:
    """The project's own template in Jinja, for a vocabulary with these ends and beginnings of a text."""
    template = _TEMPLATE_FILE.read_text(encoding="utf-8").replace("DEFAULT_SYSTEM", chat.DEFAULT_SYSTEM)
    return template.replace(chat.END_OF_TEXT, eot).replace("'<|system|>", f"'{bos}<|system|>")


def recognise(content: Any) -> tuple[ChatTokenizer, int | None] | None:
    """The tokenizer of this package that a `tokenizer.json` holds, and the pad token's id; None if it holds another.

    transformers may have saved it again. Special tokens that were added above our vocabulary are ignored: to our
    tokenizer they are text.
    """
    try:
        what = _what_decides_ids(content)
        added = {token["content"]: operator.index(token["id"]) for token in content["added_tokens"]}
        all_special = all(token["special"] for token in content["added_tokens"])  # others would split our text
    except (AttributeError, KeyError, TypeError):
        return None
    n_ranks = len(what["vocab"])
    if not all_special or not 256 <= n_ranks <= GPT2_RANKS:
        return None
    for template in _PRE_TOKENIZERS:
        tokenizer = ChatTokenizer(template, n_ranks)
        ours = {chat.END_OF_TEXT: tokenizer.eot_id, **tokenizer.control_ids}
        others = {token: id for token, id in added.items() if token not in ours}
        if (
            what == _what_decides_ids(tokenizer_json(tokenizer, tokenizer.vocab_size))
            and ours.items() <= added.items()
            and all(id >= tokenizer.vocab_size for id in others.values())
            and not others.keys() & set(chat.ROLE_MARKERS.values())
        ):
            return tokenizer, added.get(PAD)
    return None


def _what_decides_ids(content: dict[str, Any]) -> dict[str, Any]:
    """The parts of a `tokenizer.json` on which ids depend, except added tokens, in one form whoever wrote it."""
    model = content["model"]
    return {
        "type": model["type"],
        "vocab": {token: id for token, id in model["vocab"].items() if token != chat.END_OF_TEXT},
        "merges": merge_pairs(content),
        "normalizer": content["normalizer"],
        "pre_tokenizer": split_steps(content["pre_tokenizer"]),
    }


def merge_pairs(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """The merges of a `tokenizer.json`, which writes them in two ways."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in content["model"]["merges"]]


def split_steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what decides no ids."""
    part = pre_tokenizer or {}
    steps = part["pretokenizers"] if part.get("type") == "Sequence" else [part]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
