"""Texts as documents of a judge, or as answers to questions, against the log-probabilities of its forward pass."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_model import make_model_directory, make_tokenizer

from tinysft_jax.chat_template import ChatTemplate
from tinysft_jax.checkpoints import load_model
from tinysft_jax.console import UserError
from tinysft_jax.evaluation.likelihood import Judge

TEXTS = ["the cat", "", "a", "to see the little red dog", " \u200b\n", "ran"]


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("judge") / "model", None, 64)


def copy(model, path, **changes):
    """The model with other entries of `model.json`."""
    shutil.copytree(model, path)
    (path / "model.json").write_text(json.dumps(json.loads((path / "model.json").read_text()) | changes))
    return str(path)


def test_all_but_the_first_token_is_predicted_and_end_of_text_too(judge_path):
    model = load_model(judge_path)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))
    expected = []
    for text in TEXTS:
        ids = [*make_tokenizer(None).encode_text(text), 256]
        log_p = forward(np.pad(ids, (0, 32 - len(ids))).astype(np.int32)[None])[0]
        values = [float(log_p[i - 1, ids[i]]) for i in range(1, len(ids))]
        expected.append(pytest.approx(np.mean(values), rel=1e-4) if text.strip(" \u200b\n") else None)
    judge = Judge(str(judge_path))
    assert judge.fluency(TEXTS, batch_size=4) == expected
    assert judge.fluency(["", " "], batch_size=4) == [None] * 2


def conversation(template, question, answer):
    """The ids, of which the last answer + 1 are the answer's and end-of-text; a token is a byte."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return make_tokenizer(template).encode_chat(messages)[0]


@pytest.mark.parametrize("template", [pytest.param("control", marks=pytest.mark.slow), "text"])
def test_a_judge_with_a_template_reads_the_answer_after_its_question(template, judge_path, tmp_path):
    """Only the answer counts, with the end-of-text that closes it; what the template refuses has no value."""
    path = make_model_directory(tmp_path / "judge", template, 256)
    model = load_model(path)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))
    texts, questions = ["the cat", " \u200b", "a", "so <|user|> ran", "ran"], ["who", "what", "why", "how", "is it so"]
    expected = []
    for text, question in zip(texts, questions, strict=True):
        if text == " \u200b" or (template == "text" and "<|" in text):
            expected.append(None)
            continue
        ids, n = conversation(template, question, text), len(text) + 1
        assert ids[-1] == 256
        log_p = forward(np.pad(ids, (0, 256 - len(ids))).astype(np.int32)[None])[0]
        values = [float(log_p[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids))]
        expected.append(pytest.approx(np.mean(values), rel=1e-4))
    judge = Judge(str(path))
    assert judge.fluency(texts, 4, questions) == expected
    plain = Judge(str(judge_path))
    assert plain.fluency(texts, 4, questions) == plain.fluency(texts, 4)  # it knows documents only


def test_only_the_token_that_ends_the_answer_counts_of_what_follows(tmp_path):
    """As of a model's own template, whose turns end with a special token and a line break."""
    literals = {"begin": "<|user|>", "begin_system": None, "after_system": None, "answer": "<|assistant|>"}
    literals |= {"last_answer": "<|assistant|>", "next_question": "<|endoftext|>\n<|user|>", "open_end": ""}
    parts = {"controls": ("<|endoftext|>",), "stripped": (("nothing", "nothing"),) * 4}
    found = []
    for end in ("<|endoftext|>", "<|endoftext|>\nand so on"):
        judge = Judge(str(make_model_directory(tmp_path / str(len(found)), None, 64)))
        judge._tokenizer = make_tokenizer(ChatTemplate(**literals, end=end, **parts))
        found += judge.fluency(["the cat"], 4, ["who"])
    assert found[0] == found[1] is not None


def test_a_conversation_is_cut_as_a_document_is(tmp_path, capsys):
    """Where nothing of an answer is left, it has no value."""
    path = make_model_directory(tmp_path / "judge", "control", 256)
    start = len(conversation("control", "who", "a")) - 2
    judge = Judge(copy(path, tmp_path / "short", trained_length=start + 4))
    whole, cut, same, *none = judge.fluency(
        ["cat", "cats", "cats ran", "cat", "a"], 4, ["who"] * 3 + ["who is it", "who?!.:"]
    )
    assert cut == same != whole and None not in (whole, cut)
    assert none == [None, None]
    assert f"the judge reads {start + 4} tokens, and 4 of 5 texts have more" in capsys.readouterr().err
    assert Judge(str(path)).fluency(["cat", "cats"], 4, ["who"] * 2)[0] == pytest.approx(whole)


def test_a_document_is_cut_at_the_length_that_the_judge_was_trained_to(judge_path, tmp_path, capsys):
    """At 8 tokens "the cat" with its end-of-text is whole, and of a longer text neither the rest nor the end counts."""
    judge = Judge(copy(judge_path, tmp_path / "short", trained_length=8))
    whole, cut, same = judge.fluency(["the cat", "the cats ran", "the cats sat"], batch_size=4)
    assert cut == same and cut != whole
    assert "the judge reads 8 tokens, and 2 of 3 texts have more" in capsys.readouterr().err
    everything = Judge(str(judge_path)).fluency(["the cat", "the cats ran"], batch_size=4)
    assert everything[0] == pytest.approx(whole) and everything[1] != pytest.approx(cut)


def test_what_can_not_judge_is_refused_in_one_line(judge_path, tmp_path):
    nameless = copy(judge_path, tmp_path / "nameless", tokenizer=None)
    for path, message in ((nameless, f"{nameless}: the model's tokenizer is unknown"), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=message) as error:
            Judge(path)
        assert "\n" not in str(error.value)
