"""From judged picture pairs of a class-conditional model to scores: a pure function, no model involved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import BadModel
from ..judges.classes import ClassPanel, Seen
from ..protocols import ClassProtocol, PictureSpec
from ..records import Card, Score
from .manifold import precision, recall
from .rates import Array, harmonic_score, mean_score, rate
from .scores import asked_for, cost
from .sets import Real, fid_to, kid_to, set_score


def class_scores(
    protocol: ClassProtocol,
    specs: Sequence[PictureSpec],
    panel: ClassPanel,
    base: Seen,
    edited: Seen,
    card: Card | None = None,
) -> list[Score]:
    """Return every score of a protocol, in the order of `protocol.metrics`; without targets, those of retention.

    Args:
        protocol: the protocol.
        specs: the n pictures.
        panel: the judges; its real pictures are what distances are measured to.
        base: what was seen in the base model's n pictures.
        edited: the same of the edited model, same prompts and seeds.
        card: gives the cost of the edit.

    Raises:
        BadModel: the judge has no class of a name that was asked for.
    """
    pid, classes = protocol.id, panel.scorer.classes
    if strange := [s.concept for s in specs if s.concept not in classes]:
        raise BadModel(f"the judge knows no {strange[0]!r}: it was trained for another world. Reinstall expunge.")
    is_target = np.array([s.role == "target" for s in specs], dtype=bool)
    wanted = torch.tensor([classes.index(s.concept) for s in specs])
    erased, keep = wanted[torch.from_numpy(is_target)], torch.from_numpy(~is_target)

    def outcomes(seen: Seen) -> tuple[Array, Array, Array, Array]:
        unread = seen.label < 0
        gone = (~torch.isin(seen.label, erased)).double().masked_fill(unread, torch.nan).numpy()
        right = (seen.label == wanted).double().masked_fill(unread, torch.nan).numpy()
        own = seen.probabilities.gather(1, wanted[:, None])[:, 0].double().numpy()
        return gone[is_target], right[~is_target], own[is_target], entropy(seen.probabilities).numpy()[is_target]

    (ua, ira, probability, unsure), (ua_0, ira_0, probability_0, unsure_0) = outcomes(edited), outcomes(base)
    return asked_for(
        [
            rate(pid, "ua", ua, ua_0),
            rate(pid, "ira", ira, ira_0),
            harmonic_score(pid, "h", [[ua], [ira]], [[ua_0], [ira_0]]),
            *distances(protocol, panel, erased, edited.features[keep], base.features[keep]),
            mean_score(pid, "probability", probability, probability_0),
            mean_score(pid, "entropy", unsure, unsure_0),
            *cost(pid, card),
        ]
    )


def distances(protocol: ClassProtocol, panel: ClassPanel, erased: Tensor, edited: Tensor, base: Tensor) -> list[Score]:
    """Score retained pictures (n, d) against the real test pictures of the classes that are not in erased (k,)."""
    pid, names = protocol.id, protocol.sets
    kept = ~torch.isin(panel.labels, erased)
    real = Real(panel.real[kept].double())
    few = panel.real[first(panel.labels, protocol.retained) & kept]
    k = protocol.nearest
    return [
        set_score(pid, names["fid"], fid_to, real, edited, base),
        set_score(pid, names["kid"], kid_to, real, edited, base),
        rate(pid, names["precision"], precision(edited, few, k), precision(base, few, k)),
        rate(pid, names["recall"], recall(edited, few, k), recall(base, few, k)),
    ]


def first(labels: Tensor, n: int) -> Tensor:
    """Return which of labels (m,) are among the first n of their class."""
    found = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        found[(labels == label).nonzero().flatten()[:n]] = True
    return found


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy (n,) in nats of rows (n, classes); nan where a row is not finite."""
    found: Tensor = torch.special.entr(probabilities.double()).sum(1)
    return found
