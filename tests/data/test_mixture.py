from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysft_jax.console import UserError
from tinysft_jax.data import prepare
from tinysft_jax.data.mixture import Schedule, open_parts

OPTIONS = ["--max_tokens=64", "--valid_fraction=0.1", "--workers=1", "--limit=20"]


@pytest.fixture(scope="module")
def sets(chat_data, tmp_path_factory):
    """Sets of the same chats: two of them alike, one with another vocabulary, one with another template."""
    directory = tmp_path_factory.mktemp("sets")
    for name, ranks in (("a", "256"), ("b", "256"), ("other", "257")):
        source = chat_data.parent / "chats.jsonl"
        prepare.main([f"--input={source}", f"--output={directory / name}", f"--bpe_ranks={ranks}", *OPTIONS])
    text = [f"--output={directory / 'text'}", "--bpe_ranks=256", "--template=text", "--max_tokens=128", *OPTIONS[1:]]
    prepare.main([f"--input={source}", *text])
    return directory


@given(
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    batch_size=st.integers(1, 7),
    start=st.integers(0, 3000),
)
def test_any_window_of_rows_has_the_shares_and_each_part_is_read_in_order(weights, batch_size, start):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    window = 100 * batch_size
    schedule = Schedule(shares, window)
    first = start // window * window
    places = [schedule.place(row) for row in range(first, first + 2 * window)]
    for part, share in enumerate(shares):
        numbers = [number for of, number in places if of == part]
        assert abs(len(numbers) - 2 * window * share) <= 2
        before = schedule.rows_before(first)[part]
        assert schedule.rows_before(first + 37)[part] - before == [of for of, _ in places[:37]].count(part)
        assert numbers == list(range(before, before + len(numbers))) and abs(before - first * share) <= 1
    if all((window * share).denominator == 1 for share in shares):
        counts = Counter(part for part, _ in places[:window])
        assert [counts[part] for part in range(len(shares))] == [window * share for share in shares]


def test_the_parts_are_spread_evenly():
    schedule = Schedule([Fraction(4, 5), Fraction(1, 5)], 800)
    rare = [row for row in range(4000) if schedule.place(row)[0] == 1]
    assert len(rare) == 800 and set(np.diff(rare).tolist()) == {5}


def test_threads_share_a_schedule():
    """What another thread asks for in between does not matter."""
    schedule = Schedule([Fraction(2, 3), Fraction(1, 3)], 100)
    expected = [Schedule([Fraction(2, 3), Fraction(1, 3)], 100).place(row) for row in range(300)]
    for row in range(300):
        schedule.place((row * 77) % 300)
        assert schedule.place(row) == expected[row]


def test_one_data_set_is_its_own_only_part(sets):
    (part,) = open_parts(str(sets / "a"))
    assert part.name == "" and part.share == 1


def test_weights_are_shares_of_their_sum(sets):
    parts = open_parts(f"{sets}/a=3,{sets}/b=0.75")
    assert [(part.name, part.share) for part in parts] == [("a", Fraction(4, 5)), ("b", Fraction(1, 5))]
    (sets / "c=1").symlink_to(sets / "a")
    assert open_parts(str(sets / "c=1"))[0].name == ""


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("{0}/a=1,{0}/b", r"data.path is .*; several data sets are PATH=WEIGHT,PATH=WEIGHT .* such as a=0.8,b=0.2$"),
        ("{0}/a=1,{0}/b=0", "weights above 0"),
        ("{0}/a=1,{0}/b=-1", "weights above 0"),
        ("{0}/a=1,{0}/b=nan", "weights above 0"),
        ("{0}/a=1,{0}/b=1/0", "weights above 0"),
        ("{0}/a=1,{0}/b=inf", "weights above 0"),
        ("{0}/a=1,{0}/b=1e1000000000", "weights above 0"),
        ("{0}/a=1," + "b" * 300 + "=1", "b"),
        ("b" * 5000 + "=1", "b"),
        ("{0}/a=1,~nosuchuser/b=1", "nosuchuser"),
        ("{0}/a=1,{0}/b=", "weights above 0"),
        ("{0}/a=1,=1", "weights above 0"),
        ("{0}/a=1,{0}/a=1", "two data sets called a; .*rename one directory$"),
        ("{0}/a=995,{0}/b=5", "b has 0.50% of the weights; give each data set 1 % or more$"),
        ("{0}/a=1,{0}/none=1", "none"),
        ("{0}/a=1,{0}/other=1", r"a and .*other differ in their tokenizer; prepare both for one model"),
        ("{0}/a=1,{0}/text=1", r"a and .*text differ in their chat template; prepare both for one model"),
    ],
)
def test_what_can_not_be_mixed_is_one_line(sets, path, complaint):
    with pytest.raises(UserError, match=complaint) as refusal:
        open_parts(path.format(sets))
    assert "\n" not in str(refusal.value)
