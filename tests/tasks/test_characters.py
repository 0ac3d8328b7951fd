"""Who a story is about."""

import pytest

from tinysft_jax.tasks.characters import main_character

CLEAR = {
    "a name": ("Once upon a time there was a girl named Lily. Lily ran. Then Lily sat down.", "Lily"),
    "introduced and never mentioned again": ("Once there was a boy named Tim. He ran. He sang. He slept.", "Tim"),
    "a pronoun opens most sentences": (
        "One day, Ben saw a red ball. He took it. He ran home. He was glad. His mom smiled at Ben. They sang.",
        "Ben",
    ),
    "the first word of a sentence is no name": (
        "Suddenly it rained. Suddenly it stopped. Everyone ran. Later Max came, and Max laughed. Max was wet.",
        "Max",
    ),
    "two names, one of them more often": (
        "Mia had a dog called Rex. Mia threw a stick, and Rex ran. Mia clapped. Mia and Rex went home with Mia's mom.",
        "Mia",
    ),
    "possessives are mentions": (
        "Tom met Ann. Ann liked Tom's hat and Tom's shoes. Tom's mom smiled. Then Tom’s dad came.",
        "Tom",
    ),
    "curly quotes": (
        "“Where is my hat?” asked Zoë. “Here!” said Ben. Zoë laughed. “Thank you,” said Zoë. Zoë put it on.",
        "Zoë",
    ),
    "a being": ("A little duck swam on a pond. The little duck was cold. The duck went home.", "the little duck"),
    "a being with two adjectives": (
        "There was a big, red bird. The bird sang. A cat listened. The red bird flew away.",
        "the big red bird",
    ),
    "two beings of a kind": (
        "A big duck lived on a pond. One day a little duck found some bread. The big duck took it. The big duck ate.",
        "the big duck",
    ),
    "a thing that feels": (
        "Once there was a yellow kite. The kite was sad. The kite wanted to fly. A wind came, and the kite flew.",
        "the yellow kite",
    ),
    "a baby elephant is not a baby": (
        "There was a baby elephant. The baby elephant ran. The baby elephant was happy.",
        "the baby elephant",
    ),
    "a being that has a name goes by it": (
        "There was a cat named Coco. The cat saw a small dog. The small dog ran off, and the cat sat down."
        " The small dog came back, and Coco smiled.",
        "Coco",
    ),
    "a name that comes later": (
        "There was a little frog. His name was Hop. The frog jumped. Then Hop jumped too far, and the frog got wet.",
        "Hop",
    ),
    "a name and what it is": ("Pip the mouse was tired. In the morning Pip found cheese. The mouse ate it.", "Pip"),
    "a name with a title": (
        "Mr. Brown had a shop. One day Mr. Brown lost his key. Ann helped. “Thank you,” said Mr. Brown.",
        "Mr. Brown",
    ),
    "parents are not the main character": (
        'Sue was ill. Mom came. "Drink this," said Mom. Then Mom sat down with Sue. Mom sang, and Sue slept.',
        "Sue",
    ),
    "what is near is not a being": (
        "There was a river. A little bird who lived by the river wanted to see the river. It flew over the river."
        " The river was big. The little bird was glad. The little bird sang.",
        "the little bird",
    ),
}

UNCLEAR = {
    "two friends": "Tom and Lily are friends. Tom has a ball. Lily has a doll. Tom and Lily play.",
    "as often": "There was a girl named Mia. Mia met Tom. Tom waved to Mia. Mia and Tom played. Tom laughed.",
    "nobody": "It rained all day. The sun came out. Then there was a rainbow.",
    "only pronouns": "One day, they went to the park. They played. Then They went home. She smiled. I was glad.",
    "days and parents": "On Monday, Mom went out. On Monday, Dad stayed. Then Mom came back to Dad on Monday.",
    "a place": "One day, they went to Paris. It was a big city. They liked Paris, and they said goodbye to Paris.",
    "mentioned once": "One day, Tim saw a kite in a tall tree. He could not reach it. He went home.",
    "the second one a little more often": "Ann met Bob. Bob ran to Ann. Bob sat down by Ann. Then Bob left.",
    "what is mentioned most does not act": (
        "Ann was kind. She met a man with a dog. He said the dog was his. He fed the dog, washed the dog, took the dog"
        " home and brushed the dog. Ann liked the dog."
    ),
    "a noun with a capital": "They wanted Cake. Cake is good. They ate cake and more cake.",
    "a name that only opens sentences": "Ana sang. Ana met Leo. Ana danced. Leo ran, and then Leo sat. Ana left.",
    "an empty story": "",
}


@pytest.mark.parametrize("case", CLEAR)
def test_clear(case):
    story, character = CLEAR[case]
    assert main_character(story) == character


@pytest.mark.parametrize("case", UNCLEAR)
def test_unclear(case):
    assert main_character(UNCLEAR[case]) is None
