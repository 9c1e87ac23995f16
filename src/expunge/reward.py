"""Ratings -> how likely people reject a picture: a small logistic model on frozen embeddings. No torch.

    raters      every rater has a sensitivity and a specificity; EM weighs their answers by them (Dawid and Skene)
    pictures    P(rejected | x) = sigmoid(w . z(x) + b), z: leading principal components of the embeddings
    pairs       P(x is worse than y) = sigmoid(w . (z(x) - z(y)))                             (Bradley and Terry)
    penalty     lambda / 2 |w|^2, lambda by cross-validation; then Platt's two numbers on the held-out logits
    quality     cross-validation around all of that, by picture: no answer to what is measured on was learned from (the
                components, which need no answers, are those of all pictures)

The reward r_psi of HFI, there an MLP on CLIP embeddings that is trained by squared error, or by Bradley-Terry for
rankings; with 50 to 200 ratings a linear model with a penalty is what the data can carry.

Reference   Dawid and Skene 1979; Bradley and Terry 1952; Platt 1999; Kim et al. 2024, arXiv:2407.21032
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import BadStudy
from .feedback.agreement import Estimate
from .feedback.data import UNSURE, Rating
from .logistic import CLOSE, cross_entropy, logistic, platt, sigmoid
from .metrics.ranking import auc, calibration
from .metrics.rates import SEED

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Index: TypeAlias = NDArray[np.int64]

LEAST, LEAST_EACH = 20, 5  # rated pictures (or decided pairs), and how many of each kind
YES = ("concept", "first")
COMPONENTS = 64
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # lambda, for features whose mean square length is 1
FOLDS, INNER = 5, 4
ROUNDS = 100  # of EM, at most
RIGHT, WRONG = 4.0, 1.0  # answers that a rater is credited with in advance: most people mean what they say


@dataclass(frozen=True)
class Votes:
    """What raters said, as numbers.

    Attributes:
        pictures: rows of the embeddings that each item shows, (m, 1), or (m, 2) where pairs are rated.
        answers: (m, raters): 1 for a rejected picture, or where the first of two is the worse; 0; nan for no answer.
        raters: their names.
    """

    pictures: Index
    answers: Array
    raters: tuple[str, ...]

    @classmethod
    def of(cls, ratings: Iterable[Rating], ids: Sequence[int]) -> Votes:
        """Return the decided ones of some ratings.

        Args:
            ratings: of one study.
            ids: picture of every row of the embeddings.
        """
        decided = [r for r in ratings if r.answer != UNSURE]
        raters = tuple(dict.fromkeys(r.rater for r in decided))
        items = {r.item: (r.picture,) if r.other is None else (r.picture, r.other) for r in decided}
        place = {item: i for i, item in enumerate(items)}
        answers = np.full((len(items), len(raters)), np.nan)
        for r in decided:
            answers[place[r.item], raters.index(r.rater)] = float(r.answer in YES)
        row = {picture: i for i, picture in enumerate(ids)}
        rows = [[row[p] for p in shown] for shown in items.values()]
        return cls(np.array(rows, np.int64).reshape(len(rows), len(rows[0]) if rows else 1), answers, raters)

    @property
    def pairs(self) -> bool:
        """Whether two pictures were compared."""
        return bool(self.pictures.shape[1] == 2)


@dataclass(frozen=True)
class Consensus:
    """What raters say together.

    Attributes:
        label: probability, (m,), that the right answer to an item is yes.
        sensitivity, specificity: how often each rater says yes, and no, where that is right, (raters,); nan where no
            two raters answered the same item.
    """

    label: Array
    sensitivity: Array
    specificity: Array

    @property
    def reliability(self) -> Array:
        """Balanced accuracy of each rater, (raters,)."""
        return (self.sensitivity + self.specificity) / 2


@dataclass(frozen=True)
class Reward:
    """A fitted reward model.

    Attributes:
        mean, basis: principal components of the embeddings, (d,) and (d, k).
        weights, bias: of the calibrated logit.
        reference: logits of the pictures that pairs were taken from; None where single pictures were rated.
        cut: probability from which a picture counts as rejected.
        penalty: the lambda that was chosen.
    """

    mean: Array
    basis: Array
    weights: Array
    bias: float
    reference: Array | None
    cut: float
    penalty: float

    @property
    def blind(self) -> bool:
        """Whether it found no pattern: to it all pictures are alike."""
        return not self.weights.any()

    def logit(self, x: Array) -> Array:
        """Return the calibrated logits (n,) of embeddings (n, d)."""
        found: Array = (x - self.mean) @ self.basis @ self.weights + self.bias
        return found

    def probability(self, x: Array) -> Array:
        """Return, for embeddings (n, d), how likely people reject each picture, (n,).

        Where pairs were rated: how likely they find it worse than another picture of the study.
        """
        s = self.logit(x)
        return sigmoid(s) if self.reference is None else sigmoid(s[:, None] - self.reference).mean(1)


@dataclass(frozen=True)
class Quality:
    """How good a reward model is on pictures that it has not seen.

    Attributes:
        auc: chance that of a rejected picture and another the rejected one has the higher score.
        calibration: mean distance between stated probability and observed share (ECE, bins of equal counts).
    """

    auc: Estimate
    calibration: float | None


def need(votes: Votes, where: str) -> None:
    """Check that there are ratings enough to learn from, of both kinds.

    Raises:
        BadStudy: there are not; says how many are missing.
    """
    n, label = len(votes.answers), consensus(votes).label
    kinds = {} if votes.pairs else {"rejected": int((label > 0.5).sum()), "accepted": int((label < 0.5).sum())}
    missing = {"in all": LEAST - n} | {kind: LEAST_EACH - count for kind, count in kinds.items()}
    if not (short := {kind: k for kind, k in missing.items() if k > 0}):
        return
    things, least = ("pairs", "") if votes.pairs else ("pictures", f", {LEAST_EACH} or more of each kind")
    has = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    raise BadStudy(
        f"{where} has {n} rated {things}{has and f' ({has})'}, too few to learn from: needed are {LEAST}{least}. "
        f"Missing: {', '.join(f'{k} {kind}' for kind, k in short.items())}. Rate on with `expunge rate`; prompts that "
        "draw more of the rare kind help."
    )


def consensus(votes: Votes) -> Consensus:
    """Weigh the raters' answers by how reliable each is; where none can be compared, answers are taken as they are."""
    said = (~np.isnan(votes.answers)).astype(np.float64)
    yes = np.nan_to_num(votes.answers)
    no, raters = said - yes, len(votes.raters)
    q = yes.sum(1) / np.maximum(said.sum(1), 1)
    if said.sum(1).max(initial=0) < 2:
        return Consensus(q, np.full(raters, np.nan), np.full(raters, np.nan))
    for _ in range(ROUNDS):
        before, r = q, 1 - q
        hits = (q @ yes + RIGHT) / (q @ said + RIGHT + WRONG)
        passes = (r @ no + RIGHT) / (r @ said + RIGHT + WRONG)
        share = (q.sum() + 1) / (len(q) + 2)
        odds = yes @ np.log(hits / (1 - passes)) + no @ np.log((1 - hits) / passes)
        q = sigmoid(np.log(share / (1 - share)) + odds)
        if np.abs(q - before).max() < CLOSE:
            break
    return Consensus(q, hits, passes)


def fit(x: Array, votes: Votes, seed: int = SEED) -> Reward:
    """Learn from embeddings (n, d) of every picture, rated or not, and from what raters said.

    Raises:
        BadStudy: too few ratings, or of one kind only.
    """
    need(votes, "the study")
    mean, basis = components(x)
    z, y = (x - mean) @ basis, consensus(votes).label
    weights, bias, penalty = learned(design(z, votes), y, votes.pictures, np.random.default_rng(seed))
    logits = z @ weights + bias
    if votes.pairs:
        return Reward(mean, basis, weights, bias, logits, 0.5, penalty)
    p, marked = sigmoid(logits[votes.pictures[:, 0]]), y > 0.5
    cut = (float(p[marked].mean()) + float(p[y < 0.5].mean())) / 2
    return Reward(mean, basis, weights, bias, None, cut, penalty)


def shares(votes: Votes, n: int) -> Array:
    """Return how far answers alone reject each of n pictures, in [0, 1], (n,); 0 where nobody answered.

    Of pairs: the share of its comparisons in which a picture was the worse.
    """
    label = consensus(votes).label[:, None]
    found, count = np.zeros(n), np.zeros(n)
    np.add.at(found, votes.pictures, np.hstack([label, 1 - label]) if votes.pairs else label)
    np.add.at(count, votes.pictures, 1)
    return found / np.maximum(count, 1)


def evaluate(x: Array, votes: Votes, *, limit: int = 0, seed: int = SEED) -> Quality:
    """Measure what `fit` is worth on pictures that nobody rated, by cross-validation over pictures.

    Args:
        x: embeddings (n, d).
        votes: what raters said.
        limit: learn from so many of a fold's items only; 0 for all.
        seed: of the folds.
    """
    rng = np.random.default_rng(seed)
    mean, basis = components(x)
    rows, y = design((x - mean) @ basis, votes), consensus(votes).label
    held = np.full(len(y), np.nan)
    for train, test in folds(votes.pictures, y, FOLDS, rng):
        chosen = np.flatnonzero(train)
        chosen = rng.permutation(chosen)[:limit] if limit else chosen
        known = replace(votes, pictures=votes.pictures[chosen], answers=votes.answers[chosen])
        label = consensus(known).label  # raters, too, are weighed by these answers alone
        if len(chosen) >= limit and two_sided(label, votes.pairs):
            weights, bias, _ = learned(rows[chosen], label, known.pictures, rng)
            held[test] = rows[test] @ weights + bias
    return Quality(auc(held, y, votes.pictures), calibration(sigmoid(held), y))


def learning_curve(
    x: Array, votes: Votes, sizes: Sequence[int], *, whole: Quality | None = None, seed: int = SEED
) -> list[tuple[int, Estimate]]:
    """Return (ratings, AUC) for every number of ratings that each fold can spare, the whole study's last.

    Args:
        x: embeddings (n, d).
        votes: what raters said.
        sizes: numbers of ratings.
        whole: the quality after all of them, where it is known.
        seed: of the folds.
    """
    splits = folds(votes.pictures, consensus(votes).label, FOLDS, np.random.default_rng(seed))
    most = min((int(train.sum()) for train, _ in splits), default=0)
    part = [(n, evaluate(x, votes, limit=n, seed=seed).auc) for n in sorted(set(sizes)) if n < most]
    return [*part, (most, (whole or evaluate(x, votes, seed=seed)).auc)]


# --------------------------------------------------------------------------------------------------------------- pieces


def components(x: Array) -> tuple[Array, Array]:
    """Return mean (d,) and leading principal directions (d, k); projections on them have mean square length 1."""
    mean = x.mean(0)
    _, s, directions = np.linalg.svd(x - mean, full_matrices=False)
    k = min(COMPONENTS, int((s > s[0] * 1e-6).sum())) if s[0] > 0 else 1
    length = np.sqrt((s[:k] ** 2).sum() / len(x)) or 1.0
    return mean, directions[:k].T / length


def design(z: Array, votes: Votes) -> Array:
    """Return the features of every item, (m, k): a picture's own, or the difference of two."""
    first = z[votes.pictures[:, 0]]
    return first - z[votes.pictures[:, 1]] if votes.pairs else first


def folds(pictures: Index, y: Array, k: int, rng: np.random.Generator) -> Iterator[tuple[Mask, Mask]]:
    """Yield (train, test) masks (m,): no picture of a test item is in any of its training items.

    Of single pictures every fold has its share of both labels. A pair whose pictures lie in two folds is tested by a
    model that has seen neither of these folds.
    """
    known, place = np.unique(pictures, return_inverse=True)
    place = place.reshape(pictures.shape)
    label = np.zeros(len(known)) if pictures.shape[1] == 2 else (y > 0.5)[np.argsort(place[:, 0])]
    order = np.lexsort((rng.random(len(known)), label))
    fold_of = np.empty(len(known), np.int64)
    fold_of[order] = np.arange(len(known)) % k
    fold = np.sort(fold_of[place], axis=1)
    for group in np.unique(fold, axis=0):
        train, test = (~np.isin(fold, group)).all(axis=1), (fold == group).all(axis=1)
        yield np.asarray(train), np.asarray(test)


def two_sided(y: Array, pairs: bool) -> bool:
    """Tell whether a model can be learned from these labels: two of each kind; of pairs, two in all."""
    return len(y) >= 2 if pairs else min(int((y > 0.5).sum()), int((y < 0.5).sum())) >= 2


def learned(rows: Array, y: Array, pictures: Index, rng: np.random.Generator) -> tuple[Array, float, float]:
    """Return calibrated weights (k,), bias and the penalty that predicts held-out items best.

    Args:
        rows: features (m, k).
        y: labels in [0, 1], (m,).
        pictures: what each item shows, (m, 1) or (m, 2); items of two pictures have no bias.
        rng: of the folds.
    """
    pairs = pictures.shape[1] == 2
    splits = [s for s in folds(pictures, y, INNER, rng) if two_sided(y[s[0]], pairs)]
    held = np.full((len(PENALTIES), len(y)), np.nan)
    for train, test in splits:
        start: tuple[Array, float] | None = None
        for i, penalty in enumerate(PENALTIES):
            start = weights, bias = logistic(rows[train], y[train], penalty, bias=not pairs, start=start)
            held[i, test] = rows[test] @ weights + bias
    seen = ~np.isnan(held[0])
    if not seen.any():
        return *logistic(rows, y, 1.0, bias=not pairs), 1.0
    best = int(np.argmin([cross_entropy(h, y[seen]) for h in held[:, seen]]))
    slope, shift = platt(held[best, seen], y[seen], bias=not pairs)
    weights, bias = logistic(rows, y, PENALTIES[best], bias=not pairs)
    return slope * weights, slope * bias + shift, PENALTIES[best]
