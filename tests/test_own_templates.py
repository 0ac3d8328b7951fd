"""Tokenizers of other models with their own chat templates: what encoding a conversation promises, and the proof."""

import functools
import json
import os
import pickle
import random
import re
import sys
import unicodedata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask a server

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_tokenizers import KINDS, hostile, make_tokenizer, write_folder

from tinysft_jax import chat
from tinysft_jax.chat_template import ChatTemplate
from tinysft_jax.checkpoints import load_tokenizer
from tinysft_jax.console import UserError
from tinysft_jax.conversion import take_apart
from tinysft_jax.conversion.tokenizer_files import read_tokenizer, to_write
from tinysft_jax.tokenizer import ChatTokenizer, write_files

SPELLED = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<|eot_id|>",
    "<think>",
    "</think>",
    "<|user|>",
]
SPELLED += ["<|begin_of_text|>", "<|start_header_id|>", "<0x0A>", "<unk>"]
# Without characters that a vocabulary has no bytes for, or cannot tell from a space.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF, exclude_characters="▁"))
OTHERS = ["\n", "\n\n", " ", "\t", "  ", "a", " cat", "Tim's", "assistant", "123", "é", "e\u0301", "🐱", '"']
FRAGMENTS = SPELLED + OTHERS
CONTENT = st.lists(st.sampled_from(FRAGMENTS) | TEXT, min_size=1).map("".join)
CONTENT = CONTENT.filter(lambda text: not chat.is_blank(text))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return functools.cache(lambda kind: make_tokenizer(kind, tmp_path_factory.mktemp(kind)))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": role, "content": draw(CONTENT)} for role in ("user", "assistant")]
    return messages


def mixed_conversations(n: int, seed: int = 0, spells: bool = False) -> list[list[dict[str, str]]]:
    """Conversations of one to three turns; an answer's first white space is at most one character."""
    rng = random.Random(seed)
    words = (FRAGMENTS if spells else OTHERS) + ["Hello", "world.", "3,141", "日本"]

    def content(role: str) -> str:
        text = "".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
        text = rng.choice(["", " ", "\n", "\t"]) + (text.lstrip() if role == "assistant" else text)
        return text if text.strip() else text + "x"

    result = []
    for _ in range(n):
        roles = ["system"] * (rng.random() < 0.5) + ["user", "assistant"] * rng.randint(1, 3)
        result.append([{"role": role, "content": content(role)} for role in roles])
    return result


def as_taken(kind: str, text: str, role: str = "user", is_last: bool = True) -> str:
    """A content as the kind's template takes it."""
    if kind == "llama3":
        return text.strip()
    if kind == "qwen3":
        return unicodedata.normalize("NFC", text.lstrip("\n") if role == "assistant" and is_last else text)
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_supervised_ids_are_the_answers_and_what_ends_them(own, kind):
    tok = own(kind)
    special = set(tok.bpe.special_ids.values())

    def specials(messages: list[dict[str, str]]) -> list[int]:
        return [i for i in tok.encode_chat(messages)[0].tolist() if i in special]

    @given(messages=conversations())
    def check(messages):
        ids, supervised = tok.encode_chat(messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        taken = [as_taken(kind, text, "assistant", i == len(answers) - 1) for i, text in enumerate(answers)]
        assert tok.decode(ids[supervised]) == "".join(text + tok.decode(tok.stop_ids) for text in taken)
        # Special tokens are the template's, whatever contents spell.
        assert specials(messages) == specials([message | {"content": "x"} for message in messages])

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_a_prefix_of_its_conversation_and_holds_the_question(own, kind):
    tok = own(kind)

    @given(messages=conversations())
    def check(messages):
        prompt = tok.encode_prompt(messages[:-1])
        ids, supervised = tok.encode_chat(messages)
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert supervised[len(prompt)] and not supervised[len(prompt) - 1]
        assert tok.question(prompt) == as_taken(kind, messages[-2]["content"])

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(own, kind, tmp_path):
    """Of `apply_chat_template` with and without a generation prompt, and of its tokenizer with special tokens split."""
    from transformers import PreTrainedTokenizerFast

    tok, folder = own(kind), write_folder(kind, tmp_path / "folder")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(theirs) == tok.vocab_size
    for messages in mixed_conversations(200):
        parts = [(messages, False), (messages[:-1], True)] + [(messages[:-1], False)] * (len(messages) > 3)
        for part, prompt in parts:
            expected = theirs.apply_chat_template(part, add_generation_prompt=prompt, enable_thinking=False)
            found = tok.encode_prompt(part) if prompt else tok.encode_chat(part)[0]
            assert found.tolist() == expected["input_ids"], part
    texts = ["".join(message["content"] for message in messages) for messages in mixed_conversations(1000, 1, True)]
    for text in texts:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        added = {"<think>", "</think>"} if kind == "qwen3" else set()  # the template's; not special to transformers
        if not any(token in text for token in added):
            assert tok.encode_text(text) == expected, text


def test_ids_of_10000_texts_are_smollm2s(own, tmp_path):
    from tokenizers import Tokenizer

    tok = own("smollm2")
    theirs = Tokenizer.from_file(str(write_folder("smollm2", tmp_path) / "tokenizer.json"))
    theirs.encode_special_tokens = True
    rng = random.Random(2)
    ranges = [(32, 127)] * 6 + [(9, 14), (0xA0, 0x250), (0x370, 0x530), (0x4E00, 0x4F00), (0x1F300, 0x1F650)]
    for _ in range(10_000):
        parts = [
            rng.choice(FRAGMENTS) if rng.random() < 0.3 else chr(rng.randrange(*rng.choice(ranges))) for _ in range(20)
        ]
        text = "".join(parts)
        assert tok.encode_text(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_travels(own, kind, tmp_path):
    """To other processes, and through its description and files."""
    tok, messages = own(kind), mixed_conversations(1)[0]
    write_files(tmp_path / "tokenizer", tok.files)
    content = json.loads(json.dumps({"format_version": 3, **tok.description()}))
    (tmp_path / "data.json").write_text(json.dumps(content))
    for other in (pickle.loads(pickle.dumps(tok)), load_tokenizer(tmp_path)):
        assert other.encode_chat(messages)[0].tolist() == tok.encode_chat(messages)[0].tolist()
        assert (other.fingerprint(), other.stop_ids, other.vocab_size) == (
            tok.fingerprint(),
            tok.stop_ids,
            tok.vocab_size,
        )
    assert to_write(tok) == tok.files
    fingerprints = {own(each).fingerprint() for each in KINDS}
    assert len(fingerprints) == len(KINDS)


def test_a_base_model_gets_controls_markers_at_the_end(tmp_path):
    tok = make_tokenizer("llama3", tmp_path / "base", template=None)
    assert tok.template is None and tok.control_ids == {}
    chat_tok = tok.with_template("control")
    size = tok.vocab_size
    assert chat_tok.control_ids == {"<|system|>": size, "<|user|>": size + 1, "<|assistant|>": size + 2}
    ids, supervised = chat_tok.encode_chat(
        [{"role": "user", "content": "Hi<|user|>"}, {"role": "assistant", "content": "A"}]
    )
    assert chat_tok.decode(ids[supervised]) == "A<|eot_id|>" and chat_tok.decode(ids[:1]) == "<|begin_of_text|>"
    assert (ids == size + 1).sum() == 1 and chat_tok.stop_ids == (tok.eot_id,)
    # As a Hugging Face folder, transformers and this package read it alike.
    write_files(tmp_path / "out", to_write(chat_tok))
    again = take_apart_folder(tmp_path / "out")
    for messages in mixed_conversations(50):
        assert again.encode_chat(messages)[0].tolist() == chat_tok.encode_chat(messages)[0].tolist()


def take_apart_folder(folder: Path) -> ChatTokenizer:
    tokenizer = read_tokenizer(folder, {})
    assert isinstance(tokenizer.template, ChatTemplate)
    return tokenizer


def test_a_document_begins_and_ends_as_the_tokenizer_has_it(own):
    assert own("llama3").decode(own("llama3").encode_document("Hi")) == "<|begin_of_text|>Hi<|eot_id|>"
    assert own("smollm2").decode(own("smollm2").encode_document("Hi")) == "Hi<|im_end|>"


@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_an_answer_of_weight_0_has_the_same_ids(own, kind):
    (messages,) = mixed_conversations(1, seed=3)
    messages = [*messages, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    tok, unlearned = own(kind), [m | ({"weight": 0} if m["role"] == "assistant" else {}) for m in messages[:-1]]
    ids, supervised = tok.encode_chat([*unlearned, messages[-1]])
    assert ids.tolist() == tok.encode_chat(messages)[0].tolist()
    assert tok.decode(ids[supervised]) == "So." + tok.decode(tok.stop_ids)


TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
UNUSABLE = {
    "never ends": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "does not end",
    ),
    "takes all memory": ("{% set x = 'ab' * 9999999999 %}{{ x }}", "MemoryError"),
    "is no template": ("{% for m in %}", "TemplateSyntaxError"),
    "reaches for Python": ("{{ messages.__class__.__mro__ }}", "refuses|leaves contents out|SecurityError"),
    "raises": ("{{ raise_exception('not this') }}", "not this"),
    "leaves contents out": (TURNS.replace("m.content", "'x'") + PROMPT, "leaves contents out"),
    "repeats contents": (TURNS.replace("m.content", "m.content + m.content") + PROMPT, "repeats"),
    "turns messages round": (TURNS.replace("in messages", "in messages[::-1]") + PROMPT, "another order"),
    "has no prompt": (TURNS, "add_generation_prompt"),
    "has no end of turn": (TURNS.replace("<|im_end|>", "") + PROMPT, "no special token that ends"),
    "counts": ("{{ messages|length }}" + TURNS + PROMPT, "depends on"),
    "strips spaces alone": (TURNS.replace("m.content", "m.content.strip(' ')") + PROMPT, "strips something else"),
    "changes contents": (TURNS.replace("m.content", "m.content.replace('Hello', 'Bye')") + PROMPT, "another text"),
    "has upper case": (TURNS.replace("m.content", "m.content.upper()") + PROMPT, "leaves contents out"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_template_that_cant_be_proved_is_named_and_left_out(tmp_path, capsys, monkeypatch, kind):
    source, complaint = UNUSABLE[kind]
    monkeypatch.setattr(take_apart.render_template, "SECONDS", 1)
    monkeypatch.setattr(take_apart, "SECONDS", 2)
    tok = make_tokenizer("qwen3", tmp_path, source)
    assert tok.template is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "its chat template is not used" in error
    assert re.search(complaint, error), error


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_a_template_reaches_nothing_but_its_variables(source):
    (refused,) = take_apart.render(source, {}, [([{"role": "user", "content": "U"}], False)])
    assert isinstance(refused, UserError) and "SecurityError" in str(refused)


def test_an_added_token_with_an_id_that_the_library_does_not_give_it_is_refused(tmp_path):
    folder = write_folder("qwen3", tmp_path / "folder")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] += 7
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="an id that it can't have"):
        read_tokenizer(folder, {})


def test_a_question_may_spell_what_is_before_questions(own):
    for kind, text in (("tinyllama", "a </s>\n<|user|>\nb"), ("smollm2", "user\nuser\na"), ("llama3", "user b")):
        prompt = own(kind).encode_prompt([{"role": "system", "content": text}, {"role": "user", "content": text}])
        assert own(kind).question(prompt) == text


def test_a_template_without_a_place_for_a_system_message(tmp_path):
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS + PROMPT
    tok = make_tokenizer("qwen3", tmp_path, source)
    assert tok.template is not None and tok.template.begin_system is None
    turn = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    assert tok.decode(tok.encode_chat(turn)[0]) == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    with pytest.raises(UserError, match="takes no system message"):
        tok.encode_chat([{"role": "system", "content": "S"}, *turn])


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives(own, kind):
    tok = own(kind)
    for text in (" Hi", "Hi", "  Hi \n", "\n\n", " " * 100_000):
        assert tok.decode(tok.encode_text(text)) == (" " if kind == "tinyllama" else "") + text
        assert tok.decode(tok.bpe.encode(text, continues=True)) == text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen3", "tinyllama"])
def test_hostile_files(own, tmp_path, capfd, kind):
    """Seventy of each kind are refused in one line, lose their template with a line, or encode what they should."""
    refused = 0
    for seed in range(70):
        write_files(tmp_path / str(seed), hostile(random.Random(f"{kind} {seed}"), own(kind).files))
        try:
            check_usable(read_tokenizer(tmp_path / str(seed), {}))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
        assert "panicked" not in (noise := capfd.readouterr().err) and noise.count("\n") <= 1
    assert 20 < refused < 70


def check_usable(tok: ChatTokenizer) -> None:
    """That a tokenizer does what it promises, on a conversation."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a cat"}]
    json.dumps(tok.description(), ensure_ascii=False).encode()
    if tok.template is not None:
        ids, supervised = tok.encode_chat(messages)
        assert ids.max() < tok.vocab_size and supervised.any()
        assert ids[: len(tok.encode_prompt(messages[:1]))].tolist() == tok.encode_prompt(messages[:1]).tolist()
    tok.decode(tok.encode_document("Hi"))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
REMOVE = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}
TO_X = {"type": "Replace", "pattern": {"String": "e"}, "content": "x"}
# Kind, change to tokenizer.json, complaint.
CHANGED = {
    "replaces letters": ("qwen3", lambda c: c.update(normalizer=TO_X), "changes the text"),
    "lower case": ("qwen3", lambda c: c.update(normalizer={"type": "Lowercase"}), "changes the text"),
    "removes letters": (
        "qwen3",
        lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [REMOVE, BYTES]}),
        "changes the text",
    ),
    "draws at random": ("qwen3", lambda c: c["model"].update(dropout=0.5), "only BPE is read"),
    "takes what is spelled": ("tinyllama", lambda c: c["model"].update(ignore_merges=True), "makes a special token"),
    "is a unigram": ("qwen3", lambda c: c["model"].update(type="Unigram"), "only BPE is read"),
    "has no bytes": ("tinyllama", lambda c: c["model"].update(byte_fallback=False), "can't spell every text"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_tokenizer_that_changes_text_is_refused(tmp_path, change):
    kind, alter, complaint = CHANGED[change]
    folder = write_folder(kind, tmp_path / "folder")
    content = json.loads((folder / "tokenizer.json").read_text())
    alter(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=complaint):
        read_tokenizer(folder, {})


def test_an_end_that_is_an_ordinary_token_is_refused(tmp_path):
    folder = write_folder("qwen3", tmp_path / "folder")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "e"}))
    with pytest.raises(UserError, match="has no added token 'e'"):
        read_tokenizer(folder, {})


def test_metaspace_puts_a_space_before_the_first_text_alone(tmp_path):
    """As transformers 5 builds SentencePiece tokenizers."""
    from transformers import PreTrainedTokenizerFast

    folder = write_folder("tinyllama", tmp_path / "folder")
    content = json.loads((folder / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    content |= {"normalizer": None, "pre_tokenizer": metaspace}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tok, theirs = read_tokenizer(folder, {}), PreTrainedTokenizerFast.from_pretrained(folder)
    assert tok.template is not None
    for messages in mixed_conversations(50):
        assert tok.encode_chat(messages)[0].tolist() == theirs.apply_chat_template(messages)["input_ids"]


def test_a_text_that_the_library_fails_at_is_refused(tmp_path):
    folder = write_folder("tinyllama", tmp_path / "folder")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "nope"
    del content["model"]["vocab"]["<0x01>"]
    content["model"]["vocab"] = {t: i for i, t in enumerate(content["model"]["vocab"])}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json can't encode this text"):
        read_tokenizer(folder, {}).encode_text("a\x01b")


def test_a_missing_package_is_said_and_no_template_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"a chat template needs jinja2: pip install -e '\.\[hf\]'"):
        make_tokenizer("qwen3", tmp_path)


def test_a_named_template_may_have_any_name(tmp_path, capsys):
    """Several templates are a list; one whose name is no text is not the default one."""
    folder = write_folder("qwen3", tmp_path / "folder")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for names, expected in ((([], "default"), True), ((["a"], {"b": 1}), False)):
        named = [{"name": name, "template": template} for name in names]
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
        assert (read_tokenizer(folder, {}).template is not None) == expected


def test_a_question_is_found_where_nothing_is_between_it_and_its_answer():
    parts = dict.fromkeys(("begin", "begin_system", "after_system", "answer", "last_answer", "open_end"), "")
    ends = {"next_question": "</s>", "end": "</s>"}
    template = ChatTemplate(**parts, **ends, controls=("</s>",), stripped=(("nothing", "nothing"),) * 4)
    assert template.question(["U, A", "the question"]) == "the question"
