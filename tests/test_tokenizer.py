"""GPT-2's BPE, control tokens, and what encoding a conversation promises."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax import chat
from tinysft_jax.bpe import MERGES_FILE, gpt2_tokens
from tinysft_jax.checkpoints import load_tokenizer
from tinysft_jax.console import UserError
from tinysft_jax.tokenizer import ChatTokenizer

MARKERS = ["<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# Texts that a template could trip over: markers, parts of them, quotes, line ends and characters of several tokens.
TRICKY = st.lists(
    st.sampled_from([*MARKERS, "<|", "|>", "<", ">", '"', '"Hi', "\n", "\n\n", " ", "a", " cat", "🐱", "é"]) | TEXT,
    min_size=1,
).map("".join)
CONTENT = TRICKY.filter(lambda text: not chat.is_blank(text))


@st.composite
def conversations(draw: st.DrawFn, content: st.SearchStrategy[str] = CONTENT) -> list[dict[str, str]]:
    """An optional system message and up to three turns."""
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(content)})
    return messages


def answers(messages: list[dict[str, str]]) -> str:
    return "".join(m["content"] + "<|endoftext|>" for m in messages if m["role"] == "assistant")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        ("Once upon a time", [7454, 2402, 257, 640]),
        ("\n", [198]),
        ("\n\n", [628]),
        ("\n\nOnce", [198, 198, 7454]),
        (" ", [220]),
        ("!", [0]),
        ("\x00", [188]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("<|user|>", [27, 91, 7220, 91, 29]),
        ("", []),
    ],
)
def test_ids_are_gpt2s(text, ids):
    assert ChatTokenizer().encode_text(text) == ids


def test_ranks_are_gpt2s():
    tokens = gpt2_tokens()
    assert len(tokens) == len(set(tokens)) == 50256
    assert [tokens[rank] for rank in (0, 187, 188, 255, 256)] == [b"!", b"\xff", b"\x00", b"\xad", b" t"]


def test_a_damaged_merges_file_is_refused(tmp_path: Path):
    content = MERGES_FILE.read_bytes()
    damaged = tmp_path / "vocab.bpe"
    damaged.write_bytes(content[:-1] + b" ")
    with pytest.raises(UserError, match=r"vocab\.bpe is missing or damaged"):
        gpt2_tokens(damaged)
    with pytest.raises(UserError, match="missing or damaged"):
        gpt2_tokens(tmp_path / "missing.bpe")


def test_special_ids_are_right_above_the_ranks():
    control, text, plain = (ChatTokenizer(template, 1000) for template in ("control", "text", None))
    assert control.control_ids == {"<|system|>": 1001, "<|user|>": 1002, "<|assistant|>": 1003}
    assert text.control_ids == plain.control_ids == {}
    assert [tok.eot_id for tok in (control, text, plain)] == [1000] * 3
    assert [tok.vocab_size for tok in (control, text, plain)] == [1004, 1001, 1001]
    assert ChatTokenizer().vocab_size == 50260


@pytest.mark.parametrize("arguments", [("chatml", 50256), ("control", 255), ("control", 50257), (None, True)])
def test_unknown_templates_and_sizes_are_refused(arguments):
    with pytest.raises(UserError):
        ChatTokenizer(*arguments)


@given(text=TRICKY, bpe_ranks=st.sampled_from([256, 257, 1000, 4096, 50256]))
def test_any_text_survives_in_any_number_of_ranks(text, bpe_ranks):
    tok = ChatTokenizer("control", bpe_ranks)
    ids = tok.encode_text(text)
    assert all(0 <= i < bpe_ranks for i in ids)
    assert tok.decode(ids) == text


def test_first_ranks_give_what_whole_bpe_gives_with_only_its_best_merges():
    assert ChatTokenizer(None, 256).encode_text(" the") == [220, 83, 71, 68]
    assert ChatTokenizer(None, 258).encode_text(" the") == [256, 71, 68]
    assert ChatTokenizer(None, 259).encode_text(" the") == [256, 258]


@given(messages=conversations(), bpe_ranks=st.sampled_from([256, 50256]))
def test_supervised_ids_are_the_answers_and_no_control_comes_from_content(messages, bpe_ranks):
    tok = ChatTokenizer("control", bpe_ranks)
    ids, supervised = tok.encode_chat(messages)
    assert tok.decode(ids[supervised]) == answers(messages)
    roles = [message["role"] for message in messages]
    expected = [f"<|{role}|>" for role in (roles if roles[0] == "system" else ["system", *roles])]
    markers = {i: marker for marker, i in tok.control_ids.items()}
    assert [markers[i] for i in ids.tolist() if i in markers] == expected
    assert (ids == tok.eot_id).sum() == roles.count("assistant")


@given(messages=conversations())
def test_a_prompt_is_a_prefix_of_its_conversation(messages):
    tok = ChatTokenizer()
    prompt, (ids, supervised) = tok.encode_prompt(messages[:-1]), tok.encode_chat(messages)
    assert np.array_equal(ids[: len(prompt)], prompt)
    assert supervised[len(prompt) :].all() and prompt[-1] == tok.control_ids["<|assistant|>"]


@given(messages=conversations(CONTENT.map(lambda text: text.replace("<|", "< |"))))
def test_text_template_keeps_the_same_promises(messages):
    tok = ChatTokenizer("text")
    prompt, (ids, supervised) = tok.encode_prompt(messages[:-1]), tok.encode_chat(messages)
    assert tok.decode(ids[supervised]) == answers(messages)
    assert np.array_equal(ids[: len(prompt)], prompt)
    assert supervised[len(prompt) :].all()
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    assert ids.tolist()[: len(tok.encode_prompt(messages[:first]))] == tok.encode_text(
        "".join(piece.text for piece in chat.prompt_pieces(messages[:first], "control"))
    )


@pytest.mark.parametrize("template", ["control", "text"])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (1, 1)])
def test_a_weight_changes_what_is_learned_and_nothing_else(template, weights):
    tok = ChatTokenizer(template, 256)
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "So.")]
    plain = [{"role": role, "content": content} for role, content in turns]
    weighted = [
        plain[0],
        plain[1] | {"weight": weights[0]},
        plain[2] | {"weight": 0},
        plain[3] | {"weight": weights[1]},
    ]
    (ids, supervised), (expected, _) = tok.encode_chat(weighted), tok.encode_chat(plain)
    assert np.array_equal(ids, expected)
    said = [answer + "<|endoftext|>" for answer, weight in zip(("Ho", "So."), weights, strict=True) if weight]
    assert tok.decode(ids[supervised]) == "".join(said)
    assert np.array_equal(tok.encode_prompt(weighted[:-1]), tok.encode_prompt(plain[:-1]))


def test_a_document_is_its_text_and_end_of_text():
    tok = ChatTokenizer(None)
    assert tok.encode_document("Hello world").tolist() == [15496, 995, 50256]


def test_without_a_template_there_is_no_chat():
    tok = ChatTokenizer(None)
    message = {"role": "user", "content": "Hi"}
    with pytest.raises(UserError, match="completes plain text"):
        tok.encode_prompt([message])
    with pytest.raises(UserError, match="completes plain text"):
        tok.encode_chat([message, {"role": "assistant", "content": "Hi"}])


def test_lone_surrogates_have_no_ids():
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        ChatTokenizer().encode_text("ab\ud800")


def test_decode_shows_markers_and_refuses_other_ids():
    tok = ChatTokenizer("control", 300)
    assert tok.decode([39, 303, 300]) == "H<|assistant|><|endoftext|>"
    assert tok.decode(np.array([39, 72], np.int32)) == "Hi"
    assert tok.decode([]) == ""
    for outside in (304, -1, 50257):
        with pytest.raises(UserError, match=f"token id {outside} is outside the vocabulary of 304"):
            tok.decode([39, outside])


def test_decode_replaces_half_a_character():
    tok = ChatTokenizer()
    assert tok.decode(tok.encode_text("🐱")[:1]) == "\ufffd"


def test_marker_pieces_spell_the_markers():
    tok = ChatTokenizer()
    assert tok.marker_pieces()["<|user|>"] == [27, 91, 7220, 91, 29]
    assert {tok.decode(ids) for ids in tok.marker_pieces().values()} == {"<|system|>", "<|user|>", "<|assistant|>"}


@pytest.mark.parametrize("template", ["control", "text", None])
def test_a_tokenizer_is_loaded_from_its_description(tmp_path: Path, template):
    tok = ChatTokenizer(template, 512)
    (tmp_path / "data.json").write_text(json.dumps({"format_version": 1, **tok.description()}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.template, loaded.bpe.ranks, loaded.vocab_size) == (template, 512, tok.vocab_size)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"format_version": 1, "chat_template": None, "tokenizer": None}, "tokenizer is unknown"),
        ({"format_version": 1}, "tokenizer is unknown"),
        ({"format_version": 5, "tokenizer": None}, "upgrade"),
        ({"format_version": 1, "tokenizer": {"kind": "llama"}}, "no tokenizer"),
        ({"format_version": 1, "tokenizer": {"kind": "gpt2"}}, "lacks 'tokenizer.bpe_ranks'"),
        (
            {"format_version": 1, "chat_template": "x", "tokenizer": {"kind": "gpt2", "bpe_ranks": 256}},
            "template is 'x'",
        ),
    ],
)
def test_descriptions_without_a_known_tokenizer_are_refused(tmp_path: Path, content, complaint):
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=complaint):
        load_tokenizer(tmp_path)


def test_a_directory_of_neither_kind_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is not a model directory"):
        load_tokenizer(str(tmp_path))
