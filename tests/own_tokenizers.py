"""Tokenizer folders of other models: SmolLM2's, and small ones of each kind with the templates of known families."""

import json
import lzma
import shutil
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tinysft_jax.conversion.tokenizer_files import read_tokenizer
from tinysft_jax.tokenizer import ChatTokenizer

FIXTURE = Path(__file__).parent / "fixtures" / "smollm2"
TEXT = (
    "Once upon a time there was a little cat. It didn't like the 12 dogs, but they'll be friends.\n\n"
    "assistant user system <|user|>\n <|assistant|>\n Tim's mom said: é ß 日本 🐱\tthink"
)
# How Llama 3 and Qwen 2 split text; Qwen has single digits.
SPLIT = "|".join(
    (
        *(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"),
        *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    )
)

LLAMA3 = r"""{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
QWEN3 = r"""{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
TINYLLAMA = r"""{% for message in messages %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
KINDS = ("smollm2", "llama3", "qwen3", "tinyllama")


def write_folder(kind: str, folder: Path, template: str | None = "") -> Path:
    """Writes the tokenizer files of a kind; `template` is another chat template, or None."""
    folder.mkdir(exist_ok=True)
    if kind == "smollm2":
        (folder / "tokenizer.json").write_bytes(lzma.decompress((FIXTURE / "tokenizer.json.xz").read_bytes()))
        shutil.copy(FIXTURE / "tokenizer_config.json", folder)
        own = (FIXTURE / "chat_template.jinja").read_text()
    else:
        tokenizer, names, own = _MAKERS[kind]()
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template or own)
    return folder


def mixed_texts(n: int) -> list[str]:
    """Words, white space, digits, other scripts and spellings of special tokens, in any order; the same each time."""
    draw, other = Random(0), "1234567 3.14 Ünï <s> </s> <|im_end|> ﬁ …"
    parts = [*TEXT.split(" "), *other.split(" "), " ", "  ", "\n", "\n\n", "\t"]
    return ["".join(draw.choice(parts) + draw.choice(("", " ")) for _ in range(draw.randint(1, 12))) for _ in range(n)]


def make_tokenizer(kind: str, folder: Path, template: str | None = "") -> ChatTokenizer:
    return read_tokenizer(write_folder(kind, folder, template), {})


def _byte_level(specials: list[str], split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _llama3() -> tuple[Tokenizer, dict[str, str], str]:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(specials, pre_tokenizers.Split(Regex(SPLIT), "isolated"))
    begin = specials[0], tokenizer.token_to_id(specials[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    return tokenizer, {"bos_token": specials[0], "eos_token": "<|eot_id|>"}, LLAMA3


def _qwen3() -> tuple[Tokenizer, dict[str, str], str]:
    tokenizer = _byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        pre_tokenizers.Split(Regex(SPLIT.replace("{1,3}", "")), "isolated"),
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return tokenizer, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, QWEN3


def _tinyllama() -> tuple[Tokenizer, dict[str, str], str]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, limit_alphabet=40, max_token_length=12, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are tokens of the model
    return Tokenizer.from_str(json.dumps(content)), {"bos_token": "<s>", "eos_token": "</s>"}, TINYLLAMA


_MAKERS = {"llama3": _llama3, "qwen3": _qwen3, "tinyllama": _tinyllama}


_VALUES = [None, True, -1, 0, 1.5, 2**31, 2**63, "", "a", "</s>", "<think>", [], ["a"], {}, {"type": "x"}, "\ud800"]


def hostile(draw: Random, files: dict[str, bytes]) -> dict[str, bytes]:
    """A folder's tokenizer files of which one was cut short, has other bits or other values, or is another template."""
    name = draw.choice(["tokenizer.json"] * 4 + ["tokenizer_config.json", "chat_template.jinja"])
    data = files[name]
    kind = draw.choice(["cut", "bits", "values", "values"])
    if kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "bits":
        changed = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        data = bytes(changed)
    elif name == "chat_template.jinja":
        pieces = data.decode().split(draw.choice([" ", "'", "}", "|"]))
        draw.shuffle(pieces)
        data = " ".join(pieces[: draw.randint(1, len(pieces))]).encode()
    else:
        content = json.loads(data)
        for _ in range(draw.randint(1, 2)):
            inner = content
            while isinstance(inner, dict | list) and inner and draw.random() < 0.7:
                parent, key = inner, draw.choice(sorted(inner) if isinstance(inner, dict) else range(len(inner)))
                inner = parent[key]
            if inner is content:
                parent, key = content, draw.choice(sorted(content) or ["model"])
            parent[key] = draw.choice(_VALUES)
        data = json.dumps(content).encode()
    return files | {name: data}
