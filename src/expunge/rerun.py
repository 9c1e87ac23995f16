"""Going on with an interrupted run: what makes two runs the same, and what lies in a run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from . import checkpoint, pictures, sae, tokens
from .concept import Targets
from .errors import BadRun
from .feedback.verdict import is_study
from .methods.base import FILE
from .records import CARD, CHECKPOINT, EDIT, Run, need_empty
from .storage import sweep

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.model import Model
    from .kernel.state import Probe
    from .methods.base import Method

# what a run was asked for beside its method's settings; there only where it was asked for
ASKED = ("make_images", "probe")


def request_of(
    model: Model, targets: Sequence[Targets], method: Method, seed: int, make_images: int, probe: Probe | None
) -> dict[str, Any]:
    """Return what makes two runs the same run, as plain JSON data."""
    settings: Any = method
    request = {
        "base_hash": model.hash,
        "method": type(method).__name__.lower(),
        "settings": asdict(settings),
        "concepts": [t.concept.to_json() for t in targets],
        "seed": seed,
    }
    if make_images:
        request["make_images"] = make_images
    if probe:
        request["probe"] = {"until": probe.until, "every": probe.every}
    if found := contents(model, targets, method):
        request["contents"] = found
    plain: dict[str, Any] = json.loads(json.dumps(request, default=str))
    return plain


def contents(model: Model, targets: Sequence[Targets], method: Method) -> dict[str, str]:
    """Return a hash of what each file and folder holds that the run learns from; one that cannot be read has none.

    A fake score that a generator was distilled with counts as one.
    """
    settings: Any = method
    hints, values, needs = get_type_hints(type(method), include_extras=True), asdict(settings), method.needs
    files = {k: Path(v) for k, v in values.items() if v and FILE in getattr(hints[k], "__metadata__", ())}
    if needs.sae and (path := sae.place(model, values["sae"])):
        files["sae"] = path
    folders: dict[str, Path] = {}
    for c in (t.concept for t in targets):
        if c.embedding:
            files[f"embedding of {c.name!r}"] = c.embedding
        # a study is read once, into its token: people may go on rating while the run lasts
        if c.images and (needs.images or not (c.embedding or is_study(c.images))):
            folders[f"images of {c.name!r}"] = c.images
        if c.keep_images and needs.retained:
            folders[f"keep_images of {c.name!r}"] = c.keep_images
    # whoever reads a file says what is wrong with it
    found = {k: hashlib.sha256(path.read_bytes()).hexdigest() for k, path in files.items() if path.is_file()}
    if not needs.steps and model.one_step and model.one_step.fake:
        found["fake score"] = _digest(model.one_step.fake())
    return found | {k: pictures.digest(folder) for k, folder in folders.items()}


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of weights and their names."""
    h = hashlib.sha256()
    for name, value in sorted(weights.items()):
        h.update(f"{name}{tuple(value.shape)}".encode())
        h.update(value.float().contiguous().numpy().tobytes())
    return h.hexdigest()


def enter(
    out: Path | None, request: dict[str, Any], resume: bool, continues: bool = False
) -> dict[str, Any] | Path | None:
    """Check the run's folder; return the checkpoint to go on with, the finished edit, or None for a fresh start.

    Args:
        out: the folder.
        request: see `request_of`.
        resume: whether there may be something in it.
        continues: whether a run of more steps is the same run, gone on with.

    Raises:
        BadRun: the folder is in the way, holds another run, or a finished one that cannot go on.
    """
    if out is None:
        if resume:
            raise BadRun(
                "there is nothing to resume without a folder. Give the interrupted run's: out=... or --out RUN."
            )
        return None
    if not resume:
        need_empty(out)
        return None
    return _resume(out, request, continues)


def _resume(out: Path, request: dict[str, Any], continues: bool) -> dict[str, Any] | Path | None:
    if not out.exists():
        return None
    if not out.is_dir():
        raise BadRun(f"{out} is a file. Give the folder of the interrupted run.")
    sweep(out)
    if (out / CARD).exists() and _whole(out, request, continues):
        return out / EDIT
    if (out / CHECKPOINT).exists():
        saved = checkpoint.load(out / CHECKPOINT)
        _check_same(out, _grown(saved["request"], request) if continues else saved["request"], request)
        return saved
    if (former := tokens.former(out) or pictures.former(out)) is not None:
        # killed between an inversion, or drawing pictures, and the first checkpoint
        _check_same(out, former, request)
    elif any(out.iterdir()):
        raise BadRun(f"{out} holds files but no interrupted run ({CHECKPOINT} is missing). Choose another folder.")
    return None


def _whole(out: Path, request: dict[str, Any], continues: bool) -> bool:
    """Tell whether a folder with a card holds all that is asked for; if not, there is a checkpoint to go on with.

    Raises:
        BadRun: it holds another run, or a finished one that cannot go on.
    """
    card = Run.open(out).card
    if card.status != "complete":
        return False
    done = request | {k: v for k, v in asdict(card).items() if k in request} | {"concepts": card.concepts}
    # cards of older versions do not say what the files held
    done["contents"] = card.contents or request.get("contents", {})
    former = done | {"make_images": card.make_images or None}
    grown = _grown(former, request) if continues else former
    _check_same(out, grown, request)
    if not continues:
        # killed between the last two writes of a run that was whole
        (out / CHECKPOINT).unlink(missing_ok=True)
    if grown is not former and not (out / CHECKPOINT).exists():
        raise BadRun(
            f"{out} is finished with steps={former['settings']['steps']}, and what it would need to go on to "
            f"{request['settings']['steps']} was not kept ({CHECKPOINT} is missing). Start anew in another folder, "
            "with keep_state=True (--keep-state)."
        )
    return grown is former


def _grown(former: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Return a former request with the steps of the present one, if those are more."""
    before, now = (r["settings"].get("steps", 0) for r in (former, request))
    return former | {"settings": former["settings"] | {"steps": now}} if now > before else former


def _check_same(out: Path, former: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise BadRun naming what differs between an interrupted run and the one asked for."""
    differs = [
        f"{k}: {former.get(k)!r} then, {request.get(k)!r} now"
        for k in ("base_hash", "method", "seed", *ASKED)
        if former.get(k) != request.get(k)
    ]
    if former["method"] == request["method"]:
        old, new = former["settings"], request["settings"]
        differs += [
            f"setting {k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in {**old, **new} if old.get(k) != new.get(k)
        ]
        was, now = former.get("contents", {}), request.get("contents", {})
        differs += [
            f"contents of {k}: {was.get(k, 'none')[:12]} then, {now.get(k, 'none')[:12]} now"
            for k in {**was, **now}
            if was.get(k) != now.get(k)
        ]
    if former["concepts"] != request["concepts"]:
        names = [" and ".join(c["name"] for c in r["concepts"]) for r in (former, request)]
        differs.append(
            f"concept: {names[0]} then, {names[1]} now" + (" (other details)" if names[0] == names[1] else "")
        )
    if differs:
        raise BadRun(f"{out} holds another run and cannot be resumed. It differs in {'; '.join(differs)}.")
