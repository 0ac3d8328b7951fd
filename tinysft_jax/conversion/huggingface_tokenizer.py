"""The tokenizer as Hugging Face files: `tokenizer.json`, `tokenizer_config.json`, and the chat template in Jinja.

`tokenizer.json` gives this package's ids: GPT-2's regular expression cuts text alike in both libraries, and a BPE token
has one merge that makes it, so merging by GPT-2's list is merging by rank.
"""

import operator
from typing import Any, NamedTuple

from tinysft_jax import chat
from tinysft_jax.tokenizer import GPT2_RANKS, ChatTokenizer, read_merges

# What fills up the rows of a batch. A token of its own: programs that leave padding out of a loss would leave out the
# end of every answer, too, if end-of-text were used.
PAD = "<|pad|>"

# The turns of a conversation, as `chat.prompt_pieces` lays them out and refuses them. Between the marks of a generation
# is what is supervised, for programs that ask transformers for it; they look for the marks in this spelling.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
    {{- '<|system|>' + messages[0]['content'] -}}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {{- '<|system|>DEFAULT_SYSTEM' -}}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('an optional system message, then user and assistant in turn') -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{- message['content'] + '<|endoftext|>' -}}{% endgeneration %}
    {%- else -%}
        {{- message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
""".replace("DEFAULT_SYSTEM", chat.DEFAULT_SYSTEM)

# In the template "text" an answer is encoded apart from the marker before it (`chat._join_prompts`), although nothing
# but text lies between them; so text that begins as a conversation does is cut there. `>` and a quotation mark, say,
# would otherwise become one token.
_TEXT_PROMPT = r"\A(?m:<\|system\|>.*?)?<\|user\|>(?m:.*?)<\|assistant\|>"  # (?m:.) matches newlines in Oniguruma
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_TEXT_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _TEXT_PROMPT}, "behavior": "Isolated", "invert": False},
        _BYTE_LEVEL,
    ],
}


def added_tokens(tokenizer: ChatTokenizer, vocab_size: int) -> dict[str, int]:
    """Token → id of all that is not text: control tokens, ids without a meaning, and last the pad token.

    Args:
      tokenizer: the model's.
      vocab_size: the model's. Ids from the tokenizer's to this one get names, as a tokenizer of Hugging Face's can't
        leave ids out.
    """
    unused = {f"<|unused{id}|>": id for id in range(tokenizer.vocab_size, vocab_size)}
    return {chat.END_OF_TEXT: tokenizer.eot_id, **tokenizer.control_ids, **unused, PAD: vocab_size}


def tokenizer_json(tokenizer: ChatTokenizer, vocab_size: int) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Args:
      tokenizer: the model's.
      vocab_size: the model's.
    """
    vocab, merges = _vocabulary(tokenizer.bpe_ranks)
    added = added_tokens(tokenizer, vocab_size)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": content, **flags} for content, id in added.items()],
        "normalizer": None,
        "pre_tokenizer": _TEXT_PRE_TOKENIZER if tokenizer.template == "text" else _BYTE_LEVEL,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def tokenizer_config(tokenizer: ChatTokenizer, max_length: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`.

    Args:
      tokenizer: the model's.
      max_length: tokens that the model was trained to.
    """
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
        "bos_token": chat.END_OF_TEXT,
        "eos_token": chat.END_OF_TEXT,
        "pad_token": PAD,
        "padding_side": "left",  # an answer goes on where its prompt ends
        "additional_special_tokens": list(tokenizer.control_ids),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    return content | ({"chat_template": CHAT_TEMPLATE} if tokenizer.template else {})


class Recognised(NamedTuple):
    """What a `tokenizer.json` is.

    Attributes:
      tokenizer: of this package.
      pad_id: the id of the pad token, or None if there is none.
    """

    tokenizer: ChatTokenizer
    pad_id: int | None


def recognise(content: Any) -> Recognised | None:
    """The tokenizer of this package that a `tokenizer.json` is, or None if it is another.

    Special tokens that somebody added above ours are passed over: to our tokenizer their spellings are text.

    Args:
      content: of the file, as `tokenizer_json` or transformers wrote it.
    """
    try:
        model = content["model"]
        vocab = {token: id for token, id in model["vocab"].items() if token != chat.END_OF_TEXT}
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        added = {token["content"]: operator.index(token["id"]) for token in content["added_tokens"]}
        all_special = all(token["special"] for token in content["added_tokens"])  # others would cut our text
        cut, normalizer = _cut(content["pre_tokenizer"]), content["normalizer"]
    except (AttributeError, KeyError, TypeError):
        return None
    n_ranks = len(vocab)
    if model.get("type") != "BPE" or normalizer is not None or not 256 <= n_ranks <= GPT2_RANKS or not all_special:
        return None
    for template, pre_tokenizer in (("control", _BYTE_LEVEL), ("text", _TEXT_PRE_TOKENIZER), (None, _BYTE_LEVEL)):
        tokenizer = ChatTokenizer(template, n_ranks)
        if cut == _cut(pre_tokenizer) and _extends(added, tokenizer):
            is_ours = (vocab, merges) == _vocabulary(n_ranks)
            return Recognised(tokenizer, added.get(PAD)) if is_ours else None
    return None


def _extends(added: dict[str, int], tokenizer: ChatTokenizer) -> bool:
    """Whether these are a tokenizer's control tokens, and perhaps others above its vocabulary, none a role's marker."""
    ours = {chat.END_OF_TEXT: tokenizer.eot_id, **tokenizer.control_ids}
    others = {token: id for token, id in added.items() if token not in ours}
    return (
        ours.items() <= added.items()
        and all(id >= tokenizer.vocab_size for id in others.values())
        and not others.keys() & set(chat.ROLE_MARKERS.values())
    )


def _cut(pre_tokenizer: dict[str, Any]) -> list[Any]:
    """What a pre-tokenizer does, without what has to do with offsets."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _vocabulary(n_ranks: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token → id, and the merges in their order."""
    alphabet, merges = read_merges()
    tokens = [*alphabet, *map("".join, merges)][:n_ranks]
    return {token: rank for rank, token in enumerate(tokens)}, merges[: n_ranks - len(alphabet)]
