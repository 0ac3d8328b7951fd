"""Requests for a story from the data set's own conditions."""

from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.tasks.records import StoryRecord
from tinysft_jax.tasks.requests import (
    CONDITIONS,
    FEATURE_NAMES,
    PHRASINGS,
    StoryRequest,
    conditions_of,
    parse_request,
    requested_words,
)

ORDER = {"features": 1.0, "words": 2.0, "summary": 3.0, "random_sentence": 4.0}
LINES = st.text(min_size=1).map(lambda text: " ".join(text.split())).filter(bool)
ITEMS = st.lists(LINES.filter(lambda item: "," not in item), max_size=4).map(tuple)
FEATURES = st.lists(st.sampled_from([*FEATURE_NAMES, "Rhyme"]), max_size=3, unique=True).map(tuple)
REQUESTS = st.builds(StoryRequest, ITEMS, FEATURES, LINES | st.none(), LINES | st.none())
DRAWS = st.floats(0, 1, exclude_max=True)


def test_the_canonical_wording_has_the_data_sets_headers():
    request = StoryRequest(("cat", "tree"), ("BadEnding", "Twist"), "A cat climbs.", "It was high.")
    assert request.prompt(0.0, ORDER) == (
        "Write a short story.\nFeatures: BadEnding, Twist\nWords: cat, tree\nSummary: A cat climbs.\n"
        "Random sentence: It was high."
    )
    assert StoryRequest(words=("cat",)).prompt(0.0, ORDER) == "Write a short story.\nWords: cat"


def test_other_wordings_name_features_as_people_do():
    prompt = StoryRequest(features=("BadEnding", "MoralValue")).prompt(0.5, ORDER)
    assert prompt.endswith(": a bad ending, a moral")


def test_the_order_of_the_lines_is_the_one_that_was_drawn():
    request = StoryRequest(("cat",), ("Twist",), "A cat climbs.", "It was high.")
    *_, first, _, _, last = request.prompt(0.0, {name: -rank for name, rank in ORDER.items()}).split("\n")
    assert first.startswith("Random sentence: ") and last.startswith("Features: ")


@given(REQUESTS, DRAWS, st.permutations(CONDITIONS))
def test_a_request_can_be_read_back(request, draw, order):
    """In any wording and order, even where a condition looks like a label."""
    prompt = request.prompt(draw, {name: float(rank) for rank, name in enumerate(order)})
    assert parse_request(prompt) == request
    assert requested_words(prompt) == request.words


def test_a_condition_that_looks_like_a_label_stays_what_it_is():
    request = StoryRequest(summary="Words: none", random_sentence="Summary: Words: two")
    for draw in (0.0, 0.5, 0.7, 0.99):
        assert parse_request(request.prompt(draw, ORDER)) == request


def test_prompts_of_the_words_task_ask_for_words_alone():
    for wording in PHRASINGS["words"]:
        assert parse_request(wording.format("cat, tree")) == StoryRequest(words=("cat", "tree"))


def test_questions_about_a_story_ask_for_nothing():
    """Even about one with the lines of a record."""
    story = "Tim read.\nWords: two\nSummary: one"
    for task in PHRASINGS.keys() - {"words"}:
        for wording in PHRASINGS[task]:
            assert parse_request(wording.format(story)) == StoryRequest()
    assert requested_words("Tell me a joke.") == ()


def test_conditions_of_a_record_stand_on_one_line_each():
    record = StoryRecord(("Twist",), ("big\ncat",), "It was\nsad. ", None, "Tim ran.")
    assert conditions_of(record) == StoryRequest(("big cat",), ("Twist",), "It was sad.", None)
    assert conditions_of(StoryRecord(None, (), None, None, "Tim ran.")) == StoryRequest()
