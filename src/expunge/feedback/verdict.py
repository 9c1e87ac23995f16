"""What a study says of its pictures, by the raters' own answers alone: no model, no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..concept import Concept
from ..errors import ConceptError
from .agreement import consensus, table
from .study import DATABASE, Study

FORM = "study:"  # how the command line names a study as a concept


def concept(text: str, **details: Any) -> Concept:
    """Return the concept of "study:FOLDER", under the label that the study has, else under the folder's name.

    Args:
        text: the form.
        details: further fields of the concept.

    Raises:
        ConceptError: other pictures, or an embedding, are given as well.
        BadStudy: no study, or a damaged one.
    """
    if twice := [name for name in ("images", "embedding") if details.get(name)]:
        raise ConceptError(f"{text} is given by its rated pictures and by {' and '.join(twice)}. Give one of them.")
    folder = Path(text.removeprefix(FORM))
    with Study.open(folder) as study:
        return Concept(study.concept or folder.resolve().name, **details | {"images": folder})


def is_study(folder: Path) -> bool:
    """Tell whether a folder holds a rating study."""
    return (folder / DATABASE).is_file()


def rejected(folder: Path) -> list[tuple[Path, str]]:
    """Return file and prompt of every picture that raters reject, by id.

    A picture is rejected when more raters mark it than pass it; of pairs, when more comparisons find it the worse.

    Raises:
        BadStudy: no study, or a damaged one.
    """
    with Study.open(folder) as study:
        said = consensus(table(study.ratings()))
        balance: Counter[int] = Counter()
        for item in study.items():
            answer = said.get(item.id)
            if item.other is None:
                balance[item.picture] += {"concept": 1, "not": -1}.get(str(answer), 0)
            elif answer is not None:
                worse, better = (item.picture, item.other) if answer == "first" else (item.other, item.picture)
                balance.update({worse: 1, better: -1})
        return [(study.path(p.id), p.prompt) for p in study.pictures() if balance[p.id] > 0]
