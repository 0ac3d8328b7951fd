"""Texts as documents of a judge, against the log-probabilities of its forward pass."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_model import make_model_directory, make_tokenizer

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
