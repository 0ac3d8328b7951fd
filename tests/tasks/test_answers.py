"""Answers found in a story: where its sentences end, its moral, whether somebody speaks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.tasks.answers import find_moral, has_dialogue, sentence_ends, sentences


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


BEFORE = "Tom had a ball. He did not share it. "


@pytest.mark.parametrize(
    "moral",
    [
        "The moral of the story is: share what you find, or you may have nobody to share with.",
        "The moral of this story is that it is good to share.",
        "The lesson is to always tell the truth.",
        "Moral: be kind to others.",
        "Tom learned that it is good to share.",
        "In the end, Mr. Fox learned how important friends are.",
        "They learned an important lesson: never lie!",
        "She learned a valuable lesson that day - to be careful.",
        "From then on, Tom knew better: he had learned to always ask first.",
        "Tom realized that he should share.",
    ],
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("The end of the race\n\n", " The end."), ("", "\nThe end.")])
def test_the_sentence_is_taken_word_for_word(before, moral, after):
    assert find_moral(BEFORE + before + moral + after) == moral


@pytest.mark.parametrize(
    "sentence",
    [
        "Tom learned to swim.",
        "Tom learned his lesson.",
        "Tom learned a lesson.",
        "Tom realized that his ball was gone.",
        'Mom said, "The moral of the story is that you should share."',
        "“Tom learned that it is good to share,” said Mom.",
    ],
)
def test_no_clean_moral(sentence):
    assert find_moral(BEFORE + sentence) is None


def test_a_named_moral_goes_before_a_later_sentence():
    story = "The moral of the story is to share your things. Tom learned that balls are round."
    assert find_moral(story) == "The moral of the story is to share your things."


def test_the_last_of_several_is_taken():
    story = "Tom learned that balls are round. He lost it. Tom learned that it is good to share."
    assert find_moral(story) == "Tom learned that it is good to share."


@pytest.mark.parametrize(
    "story",
    [
        '"Hello," said Tom.',
        '"Where is it?" the little duck asked.',
        'Tom said, "Hello."',
        "“Stop!” cried Mia.",
        'Then Ann asked her mom, "May I go?"',
        'They shouted:\n"Come back!"',
        'Leo read the letter and said, "We must go."',
        'A sign said: "Shop." Leo saw it. "A shop!" said Leo.',
        'Mom was glad. "Well done!" She smiled. "I am proud," she said.',
        'Tom said, "I will go.\n\nAnd I will come back."',
    ],
)
def test_speech(story):
    assert has_dialogue(story) is True


@pytest.mark.parametrize(
    "story",
    [
        "Tom walked home. It was dark.",
        "Tom asked his mom for help, and she said yes.",
        'Ana painted a sign. It said:\n"Words: two for one coin. Story: free."\nLeo read it aloud and clapped.',
        'There was a note on the door that said "Closed."',
        'He had a dog called "Spot".',
        'She knew the word "no" well.',
        'His toy had "Max" on it, and he called it his friend.',
        "It was Tom's dog. The dogs' bowls were empty.",
    ],
)
def test_no_speech(story):
    assert has_dialogue(story) is False


@pytest.mark.parametrize("story", ["Mom smiled up. 'Where is Tom?' she asked.", 'He thought, "I can eat it."'])
def test_unclear(story):
    assert has_dialogue(story) is None
