"""The part of an audit that belongs to class-conditional worlds: which judges read the pictures, and what they find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import neighbours
from .judges.classes import ClassPanel, Seen, load_panel
from .metrics.classes import class_scores, entropy
from .metrics.rates import Array
from .metrics.scores import Findings
from .protocols import ClassProtocol, PictureSpec
from .records import Card, Json

ZOO = Path(__file__).parent / "zoo"


def panel_of(rules: ClassProtocol, model: str) -> ClassPanel:
    """Load the judges of a protocol: the shipped ones of its world, else those in the model's own folder.

    Raises:
        BadModel: they are missing, damaged, or not the protocol's.
    """
    shipped = ZOO / rules.world / "weights"
    return load_panel(shipped if shipped.is_dir() else Path(model), rules.scorer, rules.network, rules.hashes)


def examine_classes(
    rules: ClassProtocol, panel: ClassPanel, card: Card, specs: list[PictureSpec], base: Tensor, edited: Tensor
) -> Findings:
    """Judge picture pairs (n, 3, 32, 32) of a class-conditional world."""
    seen, after = panel.judge(base), panel.judge(edited)
    return Findings(
        class_scores(rules, specs, panel, seen, after, card),
        rows(specs, panel.scorer.classes, seen, after),
        damage(specs, panel.scorer.classes, seen, after),
    )


def rows(specs: Sequence[PictureSpec], classes: Sequence[str], base: Seen, edited: Seen) -> list[Json]:
    """Return the lines of outcomes.jsonl; a picture that could not be read has null readings."""
    told = [readings(specs, classes, seen) for seen in (base, edited)]
    return [
        {
            "role": s.role,
            "part": s.role,
            "concept": s.concept,
            "prompt": s.prompt,
            "seed": s.seed,
            "style": None,
            "object": s.object,
            "base": told[0][i],
            "edited": told[1][i],
        }
        for i, s in enumerate(specs)
    ]


def readings(specs: Sequence[PictureSpec], classes: Sequence[str], seen: Seen) -> list[Json]:
    """Return what the judge reads in every picture: the class, its probability, that of the prompt's class, entropy."""
    own = owns(specs, classes, seen)
    unsure, best = entropy(seen.probabilities), seen.probabilities.amax(1)
    out: list[Json] = []
    for i, label in enumerate(seen.label.tolist()):
        if label < 0:
            out.append(dict.fromkeys(("object", "style", "confidence", "own", "entropy")))
            continue
        figures = {"confidence": float(best[i]), "own": float(own[i]), "entropy": float(unsure[i])}
        out.append({"object": classes[label], "style": None, **{k: round(v, 4) for k, v in figures.items()}})
    return out


def owns(specs: Sequence[PictureSpec], classes: Sequence[str], seen: Seen) -> Array:
    """Return the probability (n,) of each picture's own class, nan where it could not be read."""
    wanted = torch.tensor([classes.index(s.concept) for s in specs])
    return seen.probabilities.gather(1, wanted[:, None])[:, 0].double().numpy()


def damage(specs: Sequence[PictureSpec], classes: Sequence[str], base: Seen, edited: Seen) -> list[Json]:
    """Return the rows of neighbours.json: every retained class, the most damaged first."""
    groups: dict[str, list[int]] = {}
    good = base.features.isfinite().all(1).tolist()
    for i, spec in enumerate(specs):
        if good[i]:
            groups.setdefault(spec.concept, []).append(i)
    means = {name: base.features[group].mean(0).double().numpy() for name, group in groups.items()}
    image = neighbours.similarities(means, tuple({s.concept for s in specs if s.role == "target"}))
    kept = [i for i, s in enumerate(specs) if s.role != "target"]
    before, after = (owns(specs, classes, seen)[kept] for seen in (base, edited))
    return neighbours.damage([specs[i].concept for i in kept], before, after, {}, image, len(classes))
