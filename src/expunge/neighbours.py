"""Automatically found neighbours: retained concepts nearest to an erased one, and the damage done to them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from .metrics.rates import Array


def similarities(vectors: Mapping[str, Array], targets: Sequence[str]) -> dict[str, float]:
    """Return, for every other concept, the cosine to its nearest target.

    The mean of all vectors is removed first: embeddings of one model share a large common part, which would make
    everything similar to everything.

    Args:
        vectors: concept -> embedding (d,); concepts with a vector that is not finite are left out.
        targets: erased concepts; those without a vector are ignored.
    """
    finite = {k: v for k, v in vectors.items() if np.isfinite(v).all()}
    known = [t for t in targets if t in finite]
    if not known or len(finite) < 2:
        return {}
    names = list(finite)
    matrix = np.stack([finite[n] for n in names]).astype(np.float64)
    matrix -= matrix.mean(0)
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    cosine = (matrix @ matrix[[names.index(t) for t in known]].T).max(1)
    return {n: float(c) for n, c in zip(names, cosine, strict=True) if n not in targets}


def nearest(similar: Mapping[str, float], n: int) -> list[str]:
    """Return the n most similar names, the nearest first; equals by name."""
    return sorted(similar, key=lambda k: (-similar[k], k))[:n]


def alternating(one: Mapping[str, float], other: Mapping[str, float], n: int) -> list[str]:
    """Return n names, by turns the nearest of either mapping that is not there yet."""
    both = (name for pair in zip_longest(nearest(one, len(one)), nearest(other, len(other))) for name in pair if name)
    return list(dict.fromkeys(both))[:n]


def damage(
    concepts: Sequence[str],
    base: Array,
    edited: Array,
    text: Mapping[str, float],
    image: Mapping[str, float],
    n: int,
) -> list[dict[str, Any]]:
    """Return the rows of neighbours.json, the most damaged first.

    Args:
        concepts: concept of every retained picture pair.
        base: the judge's probability of the picture's own concept, nan where it could not be read.
        edited: the same of the edited model's picture.
        text: similarity to the target by concept, in the space of prompts.
        image: the same in the space of pictures.
        n: how many nearest of either kind count as neighbours.

    Returns:
        For every neighbour {name, text_similarity, image_similarity, base, edited, damage, n}; base and edited are mean
        probabilities of the right reading (an unread picture counts 0), damage is their difference.
    """
    drawn = set(concepts)
    close = [*nearest({k: v for k, v in text.items() if k in drawn}, n)]
    close += nearest({k: v for k, v in image.items() if k in drawn}, n)
    before, after, names = np.nan_to_num(base), np.nan_to_num(edited), np.asarray(concepts)
    rows = []
    for name in dict.fromkeys(close):
        mine = names == name
        was, now = float(before[mine].mean()), float(after[mine].mean())
        rows.append(
            {
                "name": name,
                "text_similarity": text.get(name),
                "image_similarity": image.get(name),
                "base": was,
                "edited": now,
                "damage": was - now,
                "n": int(mine.sum()),
            }
        )
    return sorted(rows, key=lambda row: (-row["damage"], row["name"]))
