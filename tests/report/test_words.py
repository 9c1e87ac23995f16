"""What is said of numbers, and above all what is not said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expunge.protocols import PROTOCOLS
from expunge.records import Score
from expunge.report import words
from expunge.report.read import Contents, read

N = "\u00a0"


@pytest.fixture
def contents(make_run):
    return read(make_run(), 0)


def with_score(contents: Contents, metric: str, **changes) -> Contents:
    scores = [replace(s, **changes) if s.metric == metric else s for s in contents.scores]
    assert scores != contents.scores
    return replace(contents, scores=scores)


def without(contents: Contents, *metrics: str) -> Contents:
    return replace(contents, scores=[s for s in contents.scores if s.metric not in metrics])


def clean(contents: Contents) -> Contents:
    """Return the same edit without anything to caution about except what no edit escapes."""
    for metric, changes in (
        ("ua", {"low": 0.93, "high": 1.0, "value": 1.0}),
        ("cra", {"errors": 0}),
        ("degenerate", {"value": 0.0144}),
    ):
        contents = with_score(contents, metric, **changes)
    return replace(contents, neighbours=[replace(n, damage=0.0) for n in contents.neighbours])


def test_sentence_counts_pictures_and_gives_the_interval(contents):
    said = words.sentence(contents).replace(N, " ")
    assert said.startswith("recognised in 46 of 48 pictures before, in 1 of 48 after ")
    assert " (UA 97.9 %, 95 % interval 89.1\N{EN DASH}99.6 %)." in said
    assert "Other objects 94.4 % → 92.5 %; styles 98.1 % → 97.5 %." in said


def test_sentence_of_a_style_names_the_domains_the_other_way_round(contents):
    concept = {**contents.card.concept, "kind": "style"}
    said = words.sentence(replace(contents, card=replace(contents.card, concept=concept)))
    assert "Other styles" in said
    assert "; objects" in said


def test_unscored_pictures_are_not_counted_as_recognised(contents):
    # 3 of 48 are no success, two of them because nothing could be read
    said = words.sentence(with_score(contents, "ua", value=45 / 48, n=46, errors=2))
    assert "in 46 of 48 pictures before, in 1 of 48 after (2 could not be scored)" in said.replace(N, " ")
    said = words.sentence(with_score(contents, "ua", value=0.0, n=0, errors=48))
    assert "in 46 of 48 pictures before, in 0 of 48 after (48 could not be scored)" in said.replace(N, " ")


def test_sentence_without_a_base_makes_no_comparison(contents):
    said = words.sentence(with_score(contents, "ua", base=None))
    assert "before" not in said
    assert any("no before to compare" in c for c in words.verdict(with_score(contents, "ua", base=None)).cautions)


def test_a_clean_edit_is_good_yet_never_proven(contents):
    found = words.verdict(clean(contents))
    assert found.level == "good"
    assert found.text == "Hardly recognised any more, with little or no loss in the rest."
    assert found.cautions == ["Plain prompts only: no attack has tried to bring the concept back."]


@pytest.mark.parametrize(
    ("metric", "changes", "level", "text", "caution"),
    [
        ("ua", {"low": 0.7}, "mixed", "on too few pictures to be sure", "30.0 points wide: 48 pictures"),
        ("ua", {"value": 0.85}, "mixed", "Much less recognised, but not gone", ""),
        ("ua", {"value": 0.6}, "bad", "Only partly erased", ""),
        ("ua", {"value": 0.1}, "bad", "Not erased", ""),
        ("ua", {"p": 0.3}, "good", "", "may be chance (p = 0.30)"),
        ("ua", {"base": 0.9}, "unknown", "base model rarely drew it", ""),
        ("ua", {"errors": 3}, "good", "", "3 of the UA pictures could not be scored"),
        ("ira", {"value": 0.85}, "mixed", "at some cost to the rest", ""),
        ("cra", {"value": 0.4}, "bad", "at a heavy cost to the rest", ""),
        ("ira", {"low": None}, "good", "", "IRA comes without an interval"),
        ("ira", {"base": None}, "unknown", "not fully measured", ""),
        ("degenerate", {"value": 0.3}, "mixed", "", "Degenerate pictures rose from 1.4 % to 30.0 %"),
    ],
)
def test_verdict_says_what_limits_it(contents, metric, changes, level, text, caution):
    before, after = words.verdict(clean(contents)), words.verdict(with_score(clean(contents), metric, **changes))
    assert after.level == level
    assert text in after.text
    said = " ".join(after.cautions).replace(N, " ")
    assert caution in said
    if caution:
        assert caution not in " ".join(before.cautions).replace(N, " ")


def test_hurt_neighbours_qualify_the_praise(contents):
    assert "except near the target" in words.verdict(contents).text
    assert any("3 neighbours lost 20 points or more: firecracker, bowling and dagger" in c
               for c in words.verdict(contents).cautions)  # fmt: skip


def test_no_audit_is_no_verdict(contents):
    found = words.verdict(replace(contents, scores=[]))
    assert (found.level, "no measurement" in found.text) == ("unknown", True)
    assert "not audited yet" in words.sentence(replace(contents, scores=[]))


def test_nothing_scored_is_no_verdict(contents):
    empty = with_score(contents, "ua", value=None, low=None, high=None, n=0, errors=48)
    assert words.verdict(empty).level == "unknown"
    assert "none of its 48 pictures could be scored" in words.sentence(empty)


def test_missing_retention_is_said(contents):
    assert "rest was not measured" in words.sentence(without(contents, "ira", "cra"))


def test_an_unfinished_erasure_is_never_good(contents):
    card = replace(contents.card, status="diverged at step 12")
    found = words.verdict(replace(clean(contents), card=card))
    assert found.level == "mixed"
    assert "diverged at step 12" in found.cautions[0]


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100 %"), (0.9999, "> 99.9 %"), (0.0, "0 %"), (0.0001, "< 0.1 %"), (0.979, "97.9 %")]
)
def test_all_and_nothing_are_said_of_exact_rates_only(share, text):
    assert words.percent(share).replace(N, " ") == text


@pytest.mark.parametrize(
    ("spelled", "text"),
    [
        (words.seconds(64.2), "64.2 s"),
        (words.seconds(3700), "1 h 1 min"),
        (words.memory(1.437e9), "1.44 GB"),
        (words.change("rate", 0.9, 0.95), "\N{MINUS SIGN}5.0"),
        (words.change("number", None, 0.95), ""),
        (words.measure("rate", None), "\N{EN DASH}"),
        (words.points(-0.25), "\N{MINUS SIGN}25.0"),
        (words.p_value(1e-9), "< 0.001"),
        (words.listed(["a", "b", "c", "d"]), "a, b, c and 1 more"),
    ],
)
def test_spelling(spelled, text):
    assert spelled.replace(N, " ") == text


def test_the_sentence_speaks_of_the_first_protocol_with_a_ua(contents):
    first = Score(protocol="other-v1", metric="ira", value=0.5)
    assert words.headline_protocol([first, *contents.scores]) == "emoji-v1"


def test_distances_to_real_pictures_are_named_with_their_network():
    fid, precision = words.metric("fid_fashion64"), words.metric("precision_cifar64")
    assert (fid.label, fid.form, fid.better) == ("FID to real pictures (fashion64)", "number", "lower")
    assert (precision.label, precision.form, precision.better) == ("Precision (cifar64)", "rate", "higher")
    assert words.metric("fid").label == "FID to the base model"
    assert words.metric("my_metric") == words.Metric("my_metric", "number", "", "")


def test_every_metric_of_every_protocol_is_named():
    names = {m["name"] for p in PROTOCOLS.values() for m in p.describe()["metrics"]}
    assert not [n for n in names if words.metric(n).label == n]


def test_a_class_has_no_other_domain(contents):
    card = replace(contents.card, concept={**contents.card.concept, "kind": "class"})
    edit = replace(without(clean(contents), "cra"), card=card)
    assert words.sentence(edit).replace(N, " ").endswith("Other classes 94.4 % → 92.5 %.")
    assert words.verdict(edit).level == "good"
    # where the protocol has it and it could not be scored, the cost is not known
    assert words.verdict(with_score(clean(contents), "cra", value=None)).level == "unknown"


def test_a_distillation_is_judged_by_what_it_kept(contents):
    card = replace(contents.card, concept={}, method="sid")
    edit = replace(without(clean(contents), "ua", "h"), card=card, neighbours=[])
    assert words.title(card) == "Distilling emoji in one step"
    assert words.sentence(edit).replace(N, " ") == (
        "nothing was to be forgotten. Objects 94.4 % → 92.5 %; styles 98.1 % → 97.5 %."
    )
    found = words.verdict(edit)
    assert (found.level, found.text, found.cautions) == ("good", "Distilled with little or no loss in the rest.", [])
    assert words.verdict(with_score(edit, "ira", value=0.5)).level == "bad"
    assert words.verdict(with_score(edit, "ira", value=None)).text == (
        "Distilled; what it cost the rest was not fully measured."
    )
    assert "not audited yet" in words.sentence(replace(edit, scores=[]))
