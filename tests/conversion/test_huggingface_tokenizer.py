"""Hugging Face's tokenizer, made of our files, gives our ids."""

import contextlib
import functools
import json
import random
import shutil
import unicodedata
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinysft_jax import chat
from tinysft_jax.console import UserError
from tinysft_jax.conversion.huggingface import read_huggingface
from tinysft_jax.tokenizer import ChatTokenizer

MARKERS = (*chat.ROLE_MARKERS.values(), chat.END_OF_TEXT, "<|pad|>")
# Of every kind of character: what the regular expression tells apart, and what it might.
KINDS = {
    "letters": "abcXYZéßñжδ中文한กาआ",
    "digits": "0123456789²½٣४",
    "spaces": " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u3000\ufeff",
    "signs": "'\"<|>.,!?-_()[]{}@#%&*+=/\\^~`$€“”’…",
    "marks": "\u0301\u0308\u20dd\u0e31\u200d\ufe0f",
    "others": "🚀😶🌫👩🏽\x00\x07\x7f\ue000\U0010ffff",
}
PIECES = [
    "'s",
    "'t",
    "'re",
    "'LL",
    "'ve'",
    " 's",
    "the",
    " story",
    "\n\n",
    "  ",
    "   \n",
    " x",
    "https://",
    "endoftext",
]


def mixed_strings(n: int, seed: int = 0) -> list[str]:
    """Strings of every kind of character and of common pieces; some are long words, some long white space."""
    draw = random.Random(seed)
    everything = "".join(KINDS.values())

    def part() -> str:
        kind = draw.randrange(8)
        if kind == 0:
            return draw.choice(PIECES)
        if kind == 1:
            return draw.choice(KINDS[draw.choice(list(KINDS))]) * draw.choice([1, 2, 3, 50, 700])
        if kind == 2:
            return "".join(draw.choice("abcdefghinorst") for _ in range(draw.choice([5, 20, 300])))
        if kind == 3:
            return chr(draw.choice([draw.randrange(0x20, 0xD800), draw.randrange(0xE000, 0x110000)]))
        return "".join(draw.choice(everything) for _ in range(draw.randrange(1, 10)))

    strings = ["".join(part() for _ in range(draw.randrange(8))) for _ in range(n)]
    return [string for string in strings if not any(marker in string for marker in MARKERS)]


@pytest.fixture(scope="module")
def pair(make_folder):
    """Our tokenizer, and the one that `AutoTokenizer` makes of a folder's files."""

    def make(template: str | None, bpe_ranks: int):
        return ChatTokenizer(template, bpe_ranks), load(make_folder(template, bpe_ranks))

    return make


@functools.cache
def load(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template, bpe_ranks, n", [("control", 50256, 10_100), ("text", 1000, 3000), (None, 256, 300)])
def test_strings_have_the_same_ids(pair, template, bpe_ranks, n):
    ours, theirs = pair(template, bpe_ranks)
    strings = mixed_strings(n, seed=bpe_ranks)
    assert len(strings) > 0.99 * n
    for string, ids in zip(strings, theirs(strings)["input_ids"], strict=True):
        assert ids == ours.encode_text(string), string
    assert len(theirs) == ours.vocab_size + 1 and theirs.eos_token_id == ours.eot_id


def test_every_character_has_the_same_ids(pair):
    """Beside letters, digits, spaces and signs, so that it shows which of them each library takes it for."""
    ours, theirs = pair("control", 1000)
    used = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs", "Lo")]
    others = [chr(c) for c in range(0xA0, 0x110000, 97) if not 0xD800 <= c < 0xE000]
    for characters in (used, others):
        # Many in a string: one in each line, as a text of its own would take long.
        text = "".join(f"\na{c}a {c}1{c} \t{c}{c}!{c}." for c in characters)
        assert theirs(text)["input_ids"] == ours.encode_text(text)


@pytest.mark.parametrize("template", ["control", "text", None])
def test_spelled_markers_are_text_where_special_tokens_are_split(pair, template):
    ours, theirs = pair(template, 50256)
    draw = random.Random(0)
    for string in mixed_strings(300, seed=1):
        at = draw.randrange(len(string) + 1)
        string = f"{string[:at]}{draw.choice(MARKERS)}{string[at:]}{draw.choice(['', *MARKERS])}"
        ids = theirs(string, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode_text(string), string
        assert theirs.encode(string, split_special_tokens=True, add_special_tokens=False) == ids


def test_spelled_markers_are_control_tokens_otherwise(pair):
    """What the model card warns of."""
    ours, theirs = pair("control", 50256)
    for marker, id in (*ours.control_ids.items(), (chat.END_OF_TEXT, ours.eot_id), ("<|pad|>", ours.vocab_size)):
        assert theirs(f"a {marker} b")["input_ids"] == [*ours.encode_text("a "), id, *ours.encode_text(" b")]
        assert theirs.convert_tokens_to_ids(marker) == id and marker in theirs.all_special_tokens


def test_text_comes_back(pair):
    _, theirs = pair("control", 50256)
    for string in mixed_strings(300, seed=2):
        assert theirs.decode(theirs(string)["input_ids"]) == string


contents = st.one_of(
    st.text(min_size=1, max_size=20),
    st.text("ab \n\t'\"<|>.,", min_size=1, max_size=12),
    st.sampled_from(['"Hi," she said.', " a ", "\n\na\n", "{{ x }}", "{% if %}", "&amp;", "|", ">"]),
).filter(lambda text: not chat.is_blank(text) and not any(marker in text for marker in MARKERS))


@st.composite
def conversations(draw) -> list[dict[str, str]]:
    """Any number of turns; the last is the user's."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(0, 3)) + ["user"]
    return [{"role": role, "content": draw(contents)} for role in roles]


@pytest.mark.parametrize("template, bpe_ranks", [("control", 50256), ("control", 300), ("text", 50256), ("text", 1000)])
@settings(max_examples=60)
@given(messages=conversations(), answer=contents)
def test_chat_template_lays_out_as_we_do(pair, template, bpe_ranks, messages, answer):
    """The ids of prompts and of chats, and which of them are supervised."""
    ours, theirs = pair(template, bpe_ranks)
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked == ours.encode_prompt(messages).tolist()
    answered = [*messages, {"role": "assistant", "content": answer}]
    found = theirs.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    ids, supervised = ours.encode_chat(answered)
    assert found["input_ids"] == ids.tolist()
    assert found["assistant_masks"] == supervised.astype(int).tolist()


@pytest.mark.parametrize("template", ["control", "text"])
def test_the_mask_of_a_batch_leaves_out_its_padding(pair, template):
    """As programs that fine-tune ask for it; what they mask as padding is not the end of an answer."""
    ours, theirs = pair(template, 300)
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in ("😶", " a" * 20)]
    batch = theirs.apply_chat_template(chats, return_dict=True, padding=True, return_assistant_tokens_mask=True)
    for index, messages in enumerate(chats):
        ids, supervised = ours.encode_chat(messages)
        fill = len(batch["input_ids"][index]) - len(ids)
        assert batch["input_ids"][index] == [theirs.pad_token_id] * fill + ids.tolist()
        assert batch["assistant_masks"][index] == [0] * fill + supervised.astype(int).tolist()
    assert theirs.pad_token_id == ours.vocab_size != theirs.eos_token_id


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"], ["system", "assistant"]])
def test_chat_template_refuses_what_is_no_conversation(pair, roles):
    _, theirs = pair("control", 300)
    with pytest.raises(jinja2.TemplateError, match="user and assistant in turn"):
        theirs.apply_chat_template([{"role": role, "content": "a"} for role in roles])


def test_model_without_a_chat_template_has_none(pair):
    assert pair(None, 256)[1].chat_template is None


@pytest.mark.parametrize("template, bpe_ranks", [("control", 50256), ("control", 300), ("text", 1000), (None, 256)])
def test_our_files_are_recognised(make_folder, tmp_path, template, bpe_ranks):
    """As we write them, and as transformers writes them again."""
    folder = make_folder(template, bpe_ranks)
    again = shutil.copytree(folder, tmp_path / "again")
    load(folder).save_pretrained(again)
    for path in (folder, again):
        description, ours = read_huggingface(path)[0], ChatTokenizer(template, bpe_ranks)
        assert (description.chat_template, description.tokenizer) == tuple(ours.description().values())
        assert description.config.vocab_size == ours.vocab_size


OTHERS = {
    "another model": lambda c: c["model"].update(type="WordPiece"),
    "a normalizer": lambda c: c.update(normalizer={"type": "NFC"}),
    "a prefix space": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    "another id": lambda c: c["model"]["vocab"].update({"a": 1, "b": 2}),
    "another merge": lambda c: c["model"]["merges"].reverse(),
    "a token more": lambda c: c["model"]["vocab"].update({"zzzz": 300}),
    "another marker": lambda c: c["added_tokens"][1].update(content="<|im_start|>"),
    "a control token that is none": lambda c: c["added_tokens"][1].update(special=False),
    "a word that is one token": lambda c: c["added_tokens"].append({"id": 305, "content": "cat", "special": False}),
    "an id that is none": lambda c: c["added_tokens"][1].update(id="301"),
    "few tokens": lambda c: c["model"].update(vocab={"a": 0}),
    "no model": lambda c: c.pop("model"),
    "no pre-tokenizer": lambda c: c.update(pre_tokenizer=None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_tokenizers_are_not_taken_for_ours(make_folder, tmp_path, other):
    """They are read as the model's own, or refused."""
    folder = shutil.copytree(make_folder("control", 300), tmp_path / "folder")
    content = json.loads((folder / "tokenizer.json").read_text())
    OTHERS[other](content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with contextlib.suppress(UserError):
        description, _ = read_huggingface(folder)
        assert description.tokenizer["kind"] == "tokenizer.json" and description.config.vocab_size == 305
