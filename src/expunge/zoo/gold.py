"""The gold standard of forgetting: a model retrained without the concept, as the run of an edit of its base.

Audits, reports and attacks then read it like any other run. Its edit replaces every weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from .. import __version__
from ..backbones import load
from ..concept import Concept
from ..edits import WeightEdit
from ..edits.io import parameters
from ..errors import BadModel, NeedsError
from ..records import EDIT, Card, Run, need_empty
from .emoji.training import last


def gold(
    base: str,
    folder: Path,
    concepts: Sequence[Concept],
    out: Path,
    log: Path,
    settings: Mapping[str, str] | None = None,
) -> WeightEdit:
    """Write the run whose edit turns a base into the model that was retrained without some concepts.

    Args:
        base: the model that it is compared with, as `expunge.load` takes it.
        folder: the retrained pipeline.
        concepts: what it has never seen; at least one.
        out: folder of the run.
        log: of the retraining; its last line says what it cost.
        settings: options that the recipe was given beside its defaults, by name; the report repeats them.

    Raises:
        NeedsError: nothing was retrained.
        BadRun: `out` holds files.
        ConceptError: the base does not know a concept.
        BadModel: the two models differ in more than the values of their weights.
    """
    need_empty(out)
    if not folder.is_dir():
        raise NeedsError(f"there is no retrained model at {folder}. Train it first, by the same --without and --work.")
    before = load(base)
    for concept in concepts:
        concept.check(before.world)
    after = load(folder)
    values = {k: p.detach().clone() for k, p in parameters(after).items()}
    sizes = {k: p.shape for k, p in parameters(before).items()}
    if before.painter != after.painter or sizes != {k: v.shape for k, v in values.items()}:
        raise BadModel(
            f"{folder} differs from {base!r} in its autoencoder, tokenizer, scheduler, labels or sizes, which no edit "
            "changes. Retrain it in the work folder, and with the settings, that the base was made with."
        )
    first, *also = (c.resolved(before.world).to_json() for c in concepts)
    told = last(log)
    card = Card(
        method="retrain", settings=dict(settings or {}), concept=first, also=also, model=base, base_hash=before.hash,
        seed=0, version=__version__, kind=WeightEdit.kind, seconds=round(told.get("seconds", 0.0), 3),
        steps=told.get("step", 0), created=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    edit = WeightEdit(values, card)
    edit.save(out / EDIT)
    Run(out).write_card(card)
    return edit
