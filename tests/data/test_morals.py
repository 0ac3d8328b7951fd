"""Finding the moral of a story."""

import pytest

from tinysft_jax.tasks.answers import find_moral

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
