"""Concepts that people rated: a study becomes weights of its pictures, prompts to reject and to keep, and a record.

The reward model scores every picture that was drawn, rated or not; where it sees no pattern, the raters' answers stand
alone. A picture counts as rejected from the model's cut on; the soft token is then inverted from the rejected ones,
each weighted by its probability. A prompt is rejected when its pictures are on average; the study's others are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import WeakReward
from .feedback import Study
from .feedback.data import Picture
from .judges.embedding import embedding
from .kernel.critic import Critic
from .pictures import CHUNK, read
from .reward import Array, Quality, Reward, Votes, consensus, evaluate, fit, learning_curve, need, shares

if TYPE_CHECKING:
    from .kernel.model import Model

CHANCE = 0.5  # AUC of a model that knows nothing
SIZES = (25, 50, 100, 200, 400)  # of the learning curve
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a reward model learns from.

    Attributes:
        pictures: the drawn ones.
        paths: their files.
        x: their embeddings, (n, d).
        votes: what raters said of them.
    """

    pictures: list[Picture]
    paths: list[Path]
    x: Array
    votes: Votes

    @classmethod
    def of(cls, study: Study, embed: Embed, side: int = 64) -> Lesson:
        """Read and embed the pictures of a study, at `side` x `side` pixels.

        Raises:
            BadStudy: too few ratings to learn from, or of one kind only.
        """
        drawn = [p for p in study.pictures() if p.drawn]
        votes = Votes.of(study.ratings(), [p.id for p in drawn])
        need(votes, str(study.folder))
        paths = [study.path(p.id) for p in drawn]
        chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
        x = torch.cat([embed(torch.stack([read(path, side) for path in chunk])) for chunk in chunks])
        return cls(drawn, paths, x.double().cpu().numpy(), votes)

    def quality(self) -> Quality:
        """Return how good the reward model is on pictures that it has not seen."""
        return evaluate(self.x, self.votes)

    def curve(self, whole: Quality | None = None) -> list[dict[str, Any]]:
        """Return rows of `ratings`, and of `value`, `low`, `high` and `n` of the AUC after so many.

        Args:
            whole: the quality after all of them, where it is known.
        """
        found = learning_curve(self.x, self.votes, SIZES, whole=whole)
        return [{"ratings": n, **asdict(auc)} for n, auc in found]


@dataclass(frozen=True)
class Verdict:
    """What a study says of prompts, and how surely; plain data, kept with the soft token.

    Attributes:
        rejected: prompts whose pictures people reject.
        accepted: the other prompts of the study.
        critic: the reward model as numbers: `weights` of an embedding, `bias`, and the mean probability, `low` and
            `high`, of pictures that count as accepted and as rejected. Empty where it sees no pattern, or is no better
            than chance on unseen pictures.
        record: JSON for the run's records: who rated, how much, and how good the reward model is.
    """

    rejected: tuple[str, ...]
    accepted: tuple[str, ...]
    record: dict[str, Any]
    critic: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """Read a verdict."""
        return cls(tuple(data["rejected"]), tuple(data["accepted"]), dict(data["record"]), dict(data.get("critic", {})))


def check(folder: Path) -> None:
    """Check, before any long work, that a study can be learned from.

    Raises:
        BadStudy: it cannot be read; too few ratings, or of one kind only.
    """
    with Study.open(folder) as study:
        need(Votes.of(study.ratings(), [p.id for p in study.pictures()]), str(folder))


def learn(folder: Path, embed: Embed, name: str, side: int) -> tuple[Verdict, Tensor, Tensor]:
    """Learn from a study.

    Args:
        folder: of the study.
        embed: pictures (n, 3, side, side) in [0, 1] -> vectors (n, d).
        name: of the embedding, for the record.
        side: of the model's pictures, in pixels.

    Returns:
        The verdict; the rejected pictures, (n, 3, side, side); the probability of each that it is one, (n,).

    Raises:
        BadStudy: it cannot be learned from.
    """
    with Study.open(folder) as study:
        lesson, concept = Lesson.of(study, embed, side), study.concept
    reward = fit(lesson.x, lesson.votes)
    p, cut = reward.probability(lesson.x), reward.cut
    if reward.blind:
        p, cut = shares(lesson.votes, len(lesson.x)), 0.5
    shown = dict[str, list[float]]()
    for picture, value in zip(lesson.pictures, p.tolist(), strict=True):
        if picture.prompt:
            shown.setdefault(picture.prompt, []).append(value)
    against = {prompt: fmean(values) >= cut for prompt, values in shown.items()}
    used = [i for i, value in enumerate(p.tolist()) if value >= cut]
    record = {"concept": concept, "study": str(folder), "embedding": name, **_record(lesson, reward), "used": len(used)}
    verdict = Verdict(
        tuple(prompt for prompt, no in against.items() if no),
        tuple(prompt for prompt, no in against.items() if not no),
        record,
        _critic(reward, p) if _leads(reward, record["auc"]["value"]) else {},
    )
    return verdict, torch.stack([read(lesson.paths[i], side) for i in used]), torch.from_numpy(p[used])


def critic(verdict: Verdict | None, model: Model) -> Critic | None:
    """Return what tells, of a model's latents, what people reject; None without ratings, or a pattern in them."""
    if verdict is None or not verdict.critic:
        return None
    looks, said = embedding(model.folder, str(model.device)), verdict.critic
    weights = torch.tensor(said["weights"], device=model.device)

    def logit(latents: Tensor) -> Tensor:
        out: Tensor = looks.seen(model.pictures(latents)) @ weights + said["bias"]
        return out

    return Critic(logit, said["low"], said["high"])


def _leads(reward: Reward, auc: float | None) -> bool:
    """Tell whether a reward model may lead an erasure: it sees a pattern, and more than chance where that is known."""
    return not reward.blind and (auc is None or auc > CHANCE)


def _critic(reward: Reward, p: Array) -> dict[str, Any]:
    """Return the reward model as numbers; `p`: the probability of every picture, (n,)."""
    weights = reward.basis @ reward.weights
    # among pairs a picture is rejected as it is worse than the middle one
    middle = 0.0 if reward.reference is None else float(np.median(reward.reference))
    bias = reward.bias - float(reward.mean @ weights) - middle
    yes = p >= reward.cut
    return {"weights": weights.tolist(), "bias": bias, "low": float(p[~yes].mean()), "high": float(p[yes].mean())}


def _record(lesson: Lesson, reward: Reward) -> dict[str, Any]:
    """Return the part of the record that says how much was rated, and how good the model is."""
    votes, said, quality = lesson.votes, consensus(lesson.votes), lesson.quality()
    auc = quality.auc
    if auc.low is None or auc.low <= CHANCE:
        value = "is unknown" if auc.value is None else f"{auc.value:.2f} [{auc.low:.2f}, {auc.high:.2f}]"
        warnings.warn(
            f"the reward model may not see what people reject: its AUC on unseen pictures {value}, and 0.5 is chance. "
            + "It leads nothing, then: the soft token alone is erased. " * (not _leads(reward, auc.value))
            + "Rate more pictures, or look at the raters' agreement: `expunge feedback`.",
            WeakReward,
            stacklevel=2,
        )
    reliability = [None if r != r else round(r, 4) for r in said.reliability.tolist()]  # noqa: PLR0124 (nan)
    return {
        "pairs": votes.pairs,
        "raters": len(votes.raters),
        "reliability": reliability,  # without names: a run's folder is passed on
        "rated": len(votes.answers),
        "rejected": int((said.label > 0.5).sum()),
        "auc": asdict(auc),
        "calibration": quality.calibration,
        "blind": reward.blind,
        "penalty": reward.penalty,
        "cut": reward.cut,
        "curve": lesson.curve(quality),
    }
