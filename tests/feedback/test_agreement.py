"""Agreement against examples that their authors computed by hand."""

from __future__ import annotations

import pytest

from expunge.feedback.agreement import (
    Detection,
    cohen,
    consensus,
    detection,
    fleiss,
    krippendorff,
    pairwise,
    table,
)
from expunge.feedback.data import Rating

# published figures have three decimals
ROUNDED = 5e-4

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example C: 4 observers, 12 units, "." is missing
EXAMPLE_C = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
# example A: 2 observers, 10 units, two values; example B: 2 observers, 12 units, five values
EXAMPLE_A = """
0 1 0 0 0 0 0 0 1 0
1 1 1 0 0 1 0 0 0 0
"""
EXAMPLE_B = """
a a b b d c c c e d d a
b a b b b c c c e d d d
"""
# Fleiss 1971 as worked in textbooks: 10 subjects, 14 raters, 5 categories
FLEISS = """
0 0 0 0 14
0 2 6 4 2
0 0 3 5 6
0 3 9 2 0
2 2 8 1 1
7 7 0 0 0
3 2 6 3 0
2 5 3 2 2
6 5 2 1 0
0 2 2 3 7
"""


def by_observer(text: str) -> dict[int, dict[str, str]]:
    lines = [line.split() for line in text.strip().splitlines()]
    return {
        unit: {f"rater {i}": v for i, v in enumerate(values) if v != "."}
        for unit, values in enumerate(zip(*lines, strict=True))
    }


def two_by_two(yes_yes: int, yes_no: int, no_yes: int, no_no: int) -> dict[int, dict[str, str]]:
    pairs = [("yes", "yes")] * yes_yes + [("yes", "no")] * yes_no + [("no", "yes")] * no_yes + [("no", "no")] * no_no
    return {i: {"A": a, "B": b} for i, (a, b) in enumerate(pairs)}


@pytest.mark.parametrize(
    ("text", "alpha"), [(EXAMPLE_A, 0.095), (EXAMPLE_B, 0.692), (EXAMPLE_C, 0.743)], ids=["A", "B", "C"]
)
def test_krippendorff_against_his_own_examples(text, alpha):
    assert krippendorff(by_observer(text)).value == pytest.approx(alpha, abs=ROUNDED)


def test_units_with_one_answer_do_not_count():
    answers = by_observer(EXAMPLE_C)
    assert krippendorff(answers).n == 11
    alone = {k: v for k, v in answers.items() if len(v) > 1}
    assert krippendorff(alone) == krippendorff(answers)


@pytest.mark.parametrize(
    ("counts", "kappa"), [((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 0.1304), ((25, 35, 5, 35), 0.2593)]
)
def test_cohen_against_textbook_tables(counts, kappa):
    found = cohen(two_by_two(*counts), "A", "B")
    assert found.value == pytest.approx(kappa, abs=ROUNDED)
    assert found.n == sum(counts)


def test_fleiss_against_his_example():
    subjects = [list(map(int, line.split())) for line in FLEISS.strip().splitlines()]
    answers = {
        i: {
            f"rater {j}": value
            for j, value in enumerate(c for c, n in zip("abcde", row, strict=True) for _ in range(n))
        }
        for i, row in enumerate(subjects)
    }
    assert fleiss(answers).value == pytest.approx(0.210, abs=ROUNDED)


def test_fleiss_uses_what_every_rater_answered():
    answers = two_by_two(20, 5, 10, 15)
    more = {**answers, 99: {"A": "yes"}}
    assert fleiss(more) == fleiss(answers)


def test_chance_is_zero_and_agreement_is_one():
    assert cohen(two_by_two(25, 25, 25, 25), "A", "B").value == 0
    perfect = two_by_two(25, 0, 0, 25)
    for found in (cohen(perfect, "A", "B"), fleiss(perfect), krippendorff(perfect)):
        assert found.value == pytest.approx(1)
        # resampling would claim certainty
        assert (found.low, found.high) == (None, None)


def test_nothing_is_defined_where_nothing_varies():
    same = two_by_two(30, 0, 0, 0)
    for found in (cohen(same, "A", "B"), fleiss(same), krippendorff(same)):
        assert found.value is None
        assert found.n == 30
    assert krippendorff({}).n == 0
    assert cohen(same, "A", "C").value is None


def test_interval_holds_the_value_and_narrows_with_more_items():
    few, many = (cohen(two_by_two(*(k * n for n in (20, 5, 10, 15))), "A", "B") for k in (1, 4))
    for found in (few, many):
        assert found.low < found.value < found.high
    # four times the items: half the width
    assert (many.high - many.low) / (few.high - few.low) == pytest.approx(0.5, abs=0.08)
    # large-sample standard error of kappa (Fleiss, Cohen, Everitt 1969) for 20/5/10/15 is 0.128
    assert (few.high - few.low) / (2 * 1.96) == pytest.approx(0.128, abs=0.01)


def test_every_pair_of_raters_is_compared():
    found = pairwise(by_observer(EXAMPLE_C), ["rater 0", "rater 1", "rater 2"])
    assert list(found) == [("rater 0", "rater 1"), ("rater 0", "rater 2"), ("rater 1", "rater 2")]
    assert found["rater 0", "rater 1"].n == 9


def test_consensus_ignores_the_unsure_and_has_no_opinion_on_a_tie():
    answers = {
        1: {"A": "concept", "B": "unsure", "C": "unsure"},
        2: {"A": "concept", "B": "not"},
        3: {"A": "not", "B": "not", "C": "concept"},
        4: {"A": "unsure"},
    }
    assert consensus(answers) == {1: "concept", 2: None, 3: "not", 4: None}


def test_detection_counts_what_both_judged():
    people = {1: "concept", 2: "concept", 3: "not", 4: "not", 5: None, 6: "not"}
    found = detection(people, {1: 0.9, 2: 0.2, 3: 0.5, 4: 0.1, 5: 1.0}, threshold=0.5)
    assert found == Detection(hits=1, false_alarms=1, misses=1, passes=1)
    assert found.precision.value == found.recall.value == 0.5
    assert found.precision.low == pytest.approx(0.0945, abs=ROUNDED)  # Wilson, 1 of 2
    assert detection({}, {}, 0.5).precision.value is None


def rating(rater, item, answer):
    return Rating(rater=rater, item=item, picture=item, answer=answer, prompt="", seed=None, milliseconds=0, time="")


def test_table_is_by_item():
    ratings = [rating("A", 1, "concept"), rating("B", 1, "not"), rating("A", 2, "not")]
    assert table(ratings) == {1: {"A": "concept", "B": "not"}, 2: {"A": "not"}}


def test_agreement_does_not_depend_on_who_answered_first():
    ratings = [rating(r, i, answer) for i, row in two_by_two(20, 5, 10, 15).items() for r, answer in row.items()]
    for found in (lambda t: cohen(t, "A", "B"), fleiss, krippendorff):
        assert found(table(ratings)) == found(table(ratings[::-1]))


def test_the_value_can_be_had_without_its_interval():
    answers = by_observer(EXAMPLE_C)
    whole, short = krippendorff(answers), krippendorff(answers, interval=False)
    assert (short.value, short.n) == (whole.value, whole.n)
    assert whole.low is not None
    assert short.low is short.high is None
