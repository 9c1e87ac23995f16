"""From judged picture pairs to scores: a pure function, no model involved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import BadModel
from ..judges.panel import Judged
from ..protocols import PictureSpec, Protocol
from ..records import Card, Json, Score
from .degenerate import degenerate
from .fid import fid, kid
from .perceptual import perceptual
from .rates import Array, harmonic_score, mean_score, rate


@dataclass(frozen=True)
class Findings:
    """What an audit writes: scores, a row a picture pair, a row a retained neighbour."""

    scores: list[Score]
    outcomes: list[Json]
    neighbours: list[Json]


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of one set of pictures, each (n,): 1, 0, or nan for a picture that could not be read.

    Attributes:
        object, style: the judge reads what the prompt says (style: nan too where the prompt names none).
        gone: the judge reads nothing that is erased; one erased concept in place of another is no success.
        own: probability of the picture's own concept (the object, or the style when styles are erased).
        confidence: probability of the best object.
    """

    object: Array
    style: Array
    gone: Array
    own: Array
    confidence: Array


def outcomes(
    specs: Sequence[PictureSpec], judged: Judged, objects: Sequence[str], styles: Sequence[str], kind: str
) -> Outcomes:
    """Compare readings with prompts.

    Args:
        specs: what was asked for.
        judged: what was seen, row by row.
        objects: the judge's names of objects.
        styles: its names of styles.
        kind: "object" or "style", whichever is erased.

    Raises:
        BadModel: the judge has no class of a name that was asked for.
    """
    strange = [s.object for s in specs if s.object not in objects] + [
        s.style for s in specs if s.style not in (None, *styles)
    ]
    if strange:
        raise BadModel(f"the judge knows no {strange[0]!r}: it was trained for another world. Reinstall expunge.")
    reading = judged.reading
    rows = torch.arange(len(specs))
    wanted = torch.tensor([objects.index(s.object) for s in specs])
    unnamed = torch.tensor([s.style is None for s in specs])
    styled = torch.tensor([0 if s.style is None else styles.index(s.style) for s in specs])
    unread = reading.object < 0
    own = reading.objects[rows, wanted] if kind == "object" else reading.styles[rows, styled]
    head, names = (reading.object, objects) if kind == "object" else (reading.style, styles)
    erased = torch.tensor([names.index(s.concept) for s in specs if s.role == "target"], dtype=torch.long)
    object_hit = (reading.object == wanted).double().masked_fill(unread, torch.nan)
    style_hit = (reading.style == styled).double().masked_fill(unread | unnamed, torch.nan)
    gone = (~torch.isin(head, erased)).double().masked_fill(unread, torch.nan)
    return Outcomes(*(t.double().numpy() for t in (object_hit, style_hit, gone, own, reading.confidence)))


def scores(
    protocol: Protocol,
    kind: str,
    specs: Sequence[PictureSpec],
    base: tuple[Judged, Outcomes],
    edited: tuple[Judged, Outcomes],
    card: Card | None = None,
) -> list[Score]:
    """Return every score of a protocol, in the order of `protocols.METRICS`; without targets, those of retention.

    Args:
        protocol: the protocol.
        kind: "object" or "style", whichever is erased.
        specs: the n pictures.
        base: what was seen in the base model's n pictures.
        edited: the same of the edited model, same prompts and seeds.
        card: gives the cost of the edit.
    """
    is_target = np.array([s.role == "target" for s in specs], dtype=bool)
    (seen_base, before), (seen, after) = base, edited
    pid = protocol.id

    def heads(o: Outcomes) -> tuple[Array, Array, Array]:
        own, other = (o.object, o.style) if kind == "object" else (o.style, o.object)
        return o.gone[is_target], own[~is_target], other[~is_target]

    (ua, ira, cra), (ua_0, ira_0, cra_0) = heads(after), heads(before)
    keep = torch.from_numpy(~is_target)
    floors = [degenerate(o.confidence, protocol.floor) for o in (after, before)]
    distance = perceptual([d[keep] for d in seen_base.depths], [d[keep] for d in seen.depths])
    found = [
        rate(pid, "ua", ua, ua_0),
        rate(pid, "ira", ira, ira_0),
        rate(pid, "cra", cra, cra_0),
        harmonic_score(pid, "h", [[ua], [ira, cra]], [[ua_0], [ira_0, cra_0]]),
        mean_score(pid, "clip_score", seen.cosines[keep].double().numpy(), seen_base.cosines[keep].double().numpy()),
        *_sets(pid, seen_base, seen, keep),
        mean_score(pid, "perceptual", distance.double().numpy()),
        rate(pid, "degenerate", floors[0], floors[1], error_is=1),
        rate(pid, "degenerate_target", floors[0][is_target], floors[1][is_target], error_is=1),
        *cost(pid, card),
    ]
    return asked_for(found)


def asked_for(found: Sequence[Score]) -> list[Score]:
    """Leave out the scores of no pictures at all: a plain distillation has no targets."""
    return [s for s in found if s.n + s.errors]


def _sets(pid: str, base: Judged, edited: Judged, keep: torch.Tensor) -> list[Score]:
    a, b = base.features[keep], edited.features[keep]
    # a pair with one broken picture leaves both sets, so that they stay sets of the same prompts
    both = a.isfinite().all(1) & b.isfinite().all(1)
    n, errors = int(both.sum()), int((~both).sum())
    values = {"fid": fid(a[both], b[both]), "kid": kid(a[both], b[both])}
    return [Score(protocol=pid, metric=m, value=v, n=n, errors=errors) for m, v in values.items()]


def cost(pid: str, card: Card | None) -> list[Score]:
    """Score what an edit cost, by its card."""
    if card is None:
        return []
    return [
        Score(protocol=pid, metric="seconds", value=card.seconds, n=1),
        Score(protocol=pid, metric="peak_memory", value=float(card.peak_bytes), n=1),
    ]
