"""The reward model: what it learns, how it says how well, and when it refuses."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from expunge import reward
from expunge.errors import BadStudy
from expunge.feedback.data import Rating
from expunge.logistic import logistic, sigmoid
from expunge.metrics.ranking import auc, calibration
from expunge.reward import Votes

WIDTH = 24


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rated(answers: Any, pictures: Any = None) -> Votes:
    """Votes of raters (columns) on pictures 0 to m - 1, or on pairs of rows."""
    answers = np.asarray(answers, float).reshape(len(answers), -1)
    rows = np.arange(len(answers))[:, None] if pictures is None else np.asarray(pictures)
    return Votes(rows, answers, tuple(f"r{j}" for j in range(answers.shape[1])))


def world(n: int = 200, gap: float = 4.0, share: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of two classes whose means lie `gap` standard deviations apart along one direction."""
    r = rng(seed)
    y = (np.arange(n) < share * n).astype(float)
    r.shuffle(y)
    x = r.normal(size=(n, WIDTH))
    x[:, 0] += gap * y
    return x, y


def flipped(y: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    return np.where(rng(seed).random(len(y)) < noise, 1 - y, y)


# ------------------------------------------------------------------------------------------------------------- learning


def test_auc_of_separable_of_noisy_and_of_shuffled_labels() -> None:
    x, y = world()
    clean = reward.evaluate(x, rated(y)).auc
    noisy = reward.evaluate(x, rated(flipped(y, 0.2))).auc
    chance = reward.evaluate(x, rated(rng(5).permutation(y))).auc
    assert (clean.value or 0) > 0.97
    assert (clean.low or 0) > 0.9
    assert (chance.low or 1) < 0.5 < (chance.high or 0)
    # one label in five is wrong: even the truth itself scores no more than this against them
    bound = auc(np.where(y > 0, 1.0, -1.0), flipped(y, 0.2), np.arange(len(y))[:, None]).value or 0
    assert 0.6 < (noisy.value or 0) < bound
    assert clean.n == noisy.n == len(y)


def test_memory_of_labels_is_no_quality() -> None:
    """Labels without any pattern are learned by heart, and the cross-validation is not fooled."""
    x, _ = world(60, gap=0)
    y = (rng(2).random(60) < 0.5).astype(float)
    model = reward.fit(x, rated(y))
    own = auc(model.logit(x), y, np.arange(60)[:, None])
    held = reward.evaluate(x, rated(y)).auc
    assert (own.value or 0) > (held.value or 1) + 0.1
    assert (held.low or 1) < 0.5


def test_probabilities_are_calibrated_where_raw_logits_are_not() -> None:
    x, y = world(1200, gap=1.0, share=0.3)
    votes = rated(flipped(y, 0.1))
    found = reward.evaluate(x, votes).calibration
    assert found is not None
    assert found < 0.05
    # before: the same scores stretched, as a model without a penalty and without Platt's step would give them
    model = reward.fit(x, votes)
    stretched = calibration(sigmoid(5 * model.logit(x)), votes.answers[:, 0])
    assert stretched is not None
    assert stretched > 2 * found


def test_fit_finds_the_direction_and_a_cut_between_the_classes() -> None:
    x, y = world()
    model = reward.fit(x, rated(flipped(y, 0.1)))
    new, truth = world(seed=9)
    p = model.probability(new)
    assert ((p >= model.cut) == (truth > 0)).mean() > 0.95
    direction = model.basis @ model.weights
    assert abs(direction[0]) == np.abs(direction).max()


def test_same_votes_same_model() -> None:
    x, y = world(80)
    one, two = (reward.fit(x, rated(y)).logit(x) for _ in range(2))
    assert np.array_equal(one, two)


# --------------------------------------------------------------------------------------------------------------- raters


def test_an_unreliable_rater_counts_for_less() -> None:
    r = rng(4)
    truth = (r.random(150) < 0.4).astype(float)
    noises = (0.05, 0.1, 0.45)
    answers = np.stack([flipped(truth, noise, seed) for seed, noise in enumerate(noises)], 1)
    answers[r.random(answers.shape) < 0.2] = np.nan
    answers = answers[~np.isnan(answers).all(1)]
    truth = truth[: len(answers)] if len(answers) == 150 else None
    assert truth is not None
    said = reward.consensus(rated(answers))
    assert list(np.argsort(-said.reliability)) == [0, 1, 2]
    assert said.reliability[0] > 0.85
    assert said.reliability[2] < 0.65
    majority = np.nanmean(answers, 1)
    together = ((said.label > 0.5) == (truth > 0)).mean()
    assert together > ((majority > 0.5) == (truth > 0)).mean()


def test_a_lenient_and_a_strict_rater_are_told_apart() -> None:
    """Sensitivity and specificity: who marks too little misses, and is right whenever he marks."""
    truth = (np.arange(120) % 3 == 0).astype(float)
    strict = np.where((truth > 0) & (rng(1).random(120) < 0.5), 0.0, truth)
    said = reward.consensus(rated(np.stack([truth, truth, strict], 1)))
    assert said.sensitivity[2] < 0.65
    assert said.specificity[2] > 0.9
    assert said.sensitivity[0] > 0.9


def test_answers_of_one_rater_are_taken_as_they_are() -> None:
    y = np.array([1.0, 0, 0, 1])
    said = reward.consensus(rated(y))
    assert np.array_equal(said.label, y)
    assert np.isnan(said.reliability).all()


# ---------------------------------------------------------------------------------------------------------------- pairs


def duels(scores: np.ndarray, n: int, seed: int = 0, noise: float = 1.0) -> Votes:
    """n comparisons by Bradley and Terry's law; noise 0 always picks the worse."""
    r = rng(seed)
    pairs = np.array([r.choice(len(scores), 2, replace=False) for _ in range(n)])
    gap = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    wins = r.random(n) < sigmoid(gap) if noise else gap > 0
    return rated(wins.astype(float), pairs)


def test_bradley_terry_recovers_a_known_order() -> None:
    scores = np.linspace(-6, 6, 12)
    x = np.eye(12)  # nothing but who is who
    model = reward.fit(x, duels(scores, 1500))
    assert list(np.argsort(model.logit(x))) == list(range(12))
    assert np.all(np.diff(model.probability(x)) > 0)
    # before: the order of answers given by chance is another
    assert list(np.argsort(reward.fit(x, duels(np.zeros(12), 1500)).logit(x))) != list(range(12))


def test_bradley_terry_s_strengths_are_those_that_made_the_answers() -> None:
    scores = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    votes = duels(scores, 6000)
    weights, bias = logistic(reward.design(np.eye(5), votes), votes.answers[:, 0], 1e-3, bias=False)
    assert bias == 0
    np.testing.assert_allclose(weights - weights.mean(), scores, atol=0.15)  # 3 standard errors of 2,400 duels each


def test_pairs_are_learned_from_embeddings_and_a_probability_is_of_being_worse_than_another() -> None:
    r = rng(6)
    x = r.normal(size=(60, 8))
    votes = duels(4 * x[:, 0], 240)
    quality, model = reward.evaluate(x, votes), reward.fit(x, votes)
    assert (quality.auc.value or 0) > 0.8
    assert (quality.auc.low or 0) > 0.6
    assert model.probability(x).mean() == pytest.approx(0.5, abs=1e-9)
    assert np.corrcoef(model.probability(x), x[:, 0])[0, 1] > 0.8
    chance = reward.evaluate(x, duels(np.zeros(60), 240)).auc
    assert (chance.low or 1) < 0.5 < (chance.high or 0)


# ----------------------------------------------------------------------------------------------------- cross-validation


@pytest.mark.parametrize("pairs", [False, True])
def test_no_picture_of_a_test_item_is_learned_from(pairs: bool) -> None:
    r = rng(7)
    pictures = np.array([r.choice(30, 2, replace=False) for _ in range(90)]) if pairs else np.arange(30)[:, None]
    y = (r.random(len(pictures)) < 0.4).astype(float)
    tested = np.zeros(len(pictures), int)
    for train, test in reward.folds(pictures, y, 5, r):
        assert not set(pictures[train].ravel()) & set(pictures[test].ravel())
        assert train.any()
        tested += test
        if not pairs:  # stratified: 12 of 30 are marked at most, every fold has its share
            assert abs(y[test].mean() - y.mean()) < 0.17
    assert (tested == 1).all()


def test_raters_are_weighed_by_what_a_fold_may_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights from answers to what is tested would make a bad rater look better than he is on new pictures."""
    x, y = world(60)
    votes, weighed, weigh = rated(np.stack([y, flipped(y, 0.3)], 1)), list[int](), reward.consensus

    def spy(some: Votes) -> reward.Consensus:
        weighed.append(len(some.answers))
        return weigh(some)

    monkeypatch.setattr(reward, "consensus", spy)
    reward.evaluate(x, votes)
    assert weighed == [60, *[48] * 5]  # once for what is measured against, then in each of five folds
    weighed.clear()
    reward.evaluate(x, votes, limit=30)
    assert weighed == [60, *[30] * 5]


def test_the_curve_rises_with_the_ratings() -> None:
    x, y = world(240, gap=2.0)
    curve = reward.learning_curve(x, rated(flipped(y, 0.1)), (20, 60, 500))
    assert [n for n, _ in curve] == [20, 60, 192]
    values = [found.value or 0 for _, found in curve]
    assert values[0] < values[-1]
    assert all((found.low or 0) < (found.high or 0) for _, found in curve)


# ------------------------------------------------------------------------------------------------------------- refusals


def rating(picture: int, answer: str, other: int | None = None, rater: str = "ann") -> Rating:
    about = {"prompt": "", "seed": 0, "milliseconds": 1, "time": ""}
    return Rating(rater=rater, item=picture, picture=picture, other=other, answer=answer, **about)


def test_votes_hold_what_was_said() -> None:
    said = [rating(7, "concept"), rating(8, "not"), rating(8, "concept", rater="bob"), rating(9, "unsure")]
    votes = Votes.of(said, [6, 7, 8, 9])
    assert votes.raters == ("ann", "bob")
    assert votes.pictures.tolist() == [[1], [2]]
    np.testing.assert_array_equal(votes.answers, [[1, np.nan], [0, 1]])
    compared = Votes.of([rating(1, "second", other=2), rating(2, "first", other=3)], [1, 2, 3])
    assert compared.pairs
    assert compared.pictures.tolist() == [[0, 1], [1, 2]]
    assert compared.answers[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("marked", "passed", "message"),
    [
        (0, 0, "s has 0 rated pictures (0 rejected, 0 accepted), too few.*needed are 20, 5 or more of each kind. "
               "Missing: 20 in all, 5 rejected, 5 accepted"),
        (6, 6, "s has 12 rated pictures.*Missing: 8 in all. Rate on"),
        (2, 30, "s has 32 rated pictures (2 rejected, 30 accepted).*Missing: 3 rejected"),
        (30, 0, "Missing: 5 accepted"),
    ],
)  # fmt: skip
def test_too_few_or_one_sided_ratings_are_refused_with_what_is_missing(marked: int, passed: int, message: str) -> None:
    said = [rating(i, "concept" if i < marked else "not") for i in range(marked + passed)]
    said += [rating(500 + i, "unsure") for i in range(30)]
    votes = Votes.of(said, range(600))
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(BadStudy, match=pattern):
        reward.need(votes, "s")
    with pytest.raises(BadStudy, match="too few"):
        reward.fit(rng().normal(size=(600, 4)), votes)


def test_just_enough_is_enough() -> None:
    said = [rating(i, "concept" if i < 5 else "not") for i in range(20)]
    reward.need(Votes.of(said, range(20)), "s")
    with pytest.raises(BadStudy, match="Missing: 1 in all"):
        reward.need(Votes.of(said[:-1], range(20)), "s")


def test_too_few_pairs_are_refused() -> None:
    said = [rating(i, "first", other=i + 1) for i in range(12)]
    with pytest.raises(BadStudy, match="has 12 rated pairs, too few to learn from: needed are 20. Missing: 8 in all"):
        reward.need(Votes.of(said, range(20)), "s")


def test_needs_no_torch(tmp_path: Any) -> None:
    import subprocess

    code = "import sys, expunge.reward; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_answers_without_a_pattern_leave_the_model_blind() -> None:
    found = [reward.fit(x, rated(y)) for x, y in (world(60, gap=0, seed=seed) for seed in range(6))]
    blind = [model for model in found if model.blind]
    assert blind  # chance may show a pattern, but not every time
    assert all(np.ptp(model.probability(world(60)[0])) == 0 for model in blind)
    x, y = world(60)
    assert not reward.fit(x, rated(y)).blind


def test_shares_of_answers() -> None:
    np.testing.assert_array_equal(reward.shares(rated([1.0, 0, 1]), 5), [1, 0, 1, 0, 0])
    compared = rated([1.0, 1, 0], [[0, 1], [0, 2], [0, 3]])
    np.testing.assert_allclose(reward.shares(compared, 4), [2 / 3, 0, 0, 1])
