"""Where a text's sentences end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.tasks.answers import sentence_ends, sentences


@pytest.mark.parametrize(
    "expected",
    [
        ["Tim ran.", "Mia did not!", "Why?"],
        ["Mr. Fox and Mrs. Hen met Dr. Owl.", "They talked."],
        ['"Stop!" said Mia.', 'Tim said, "Oh. Why?"', '"Look at me. Please," said Mia.', "He did."],
        ["“Oh. No,” he said.", "Yes."],
        ["Once…", "No end here"],
        [],
    ],
)
def test_sentences(expected: list[str]):
    assert list(sentences(" ".join(expected))) == expected
    assert list(sentences("\n\n".join(expected))) == expected


def test_a_quotation_that_is_never_closed_ends_with_its_paragraph():
    assert list(sentences('"Oh no. Not that.\nThen he left. Bye.')) == ['"Oh no. Not that.\nThen he left.', "Bye."]
    assert list(sentences("“Oh no. Not that.\nThen he left. Bye.")) == ["“Oh no. Not that.\nThen he left.", "Bye."]


@given(st.text(alphabet='aB. !?"“”\n'))
def test_sentences_are_the_text(text: str):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
    ends = list(sentence_ends(text))
    assert ends == sorted(set(ends)) and all(text[:end].rstrip('"“”')[-1] in ".!?" for end in ends)
