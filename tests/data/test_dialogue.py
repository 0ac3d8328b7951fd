"""Whether the characters of a story talk."""

import pytest

from tinysft_jax.tasks.answers import has_dialogue


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
