"""Command `feedback`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingError, nearest
from .options import AsJson

if TYPE_CHECKING:
    from ..feedback import Study
    from ..feedback.agreement import Estimate, Table


def feedback(
    *,
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study.")],
    scores: Annotated[Path | None, typer.Option(help="A detector's scores: picture (or file) and score.")] = None,
    judge: Annotated[str, typer.Option(help="Detector: the shipped judge's probability of this concept.")] = "",
    threshold: Annotated[float, typer.Option(help="The detector marks what scores as much.")] = 0.5,
    curve: Annotated[bool, typer.Option("--curve", help="Learning curve of the reward model.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write every rating: .jsonl, .csv or .parquet.")] = None,
    take: Annotated[Path | None, typer.Option("--import", help="First take in ratings made elsewhere.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how far raters agree, how well a detector agrees with them, and how much more ratings would help."""
    from ..feedback import Study, agreement, exchange

    if scores and judge:
        raise SettingError("--scores and --judge are two detectors. Give one at a time.")
    with Study.open(study) as opened:
        if opened.pairs and (scores or judge):
            raise SettingError(f"{study} holds pairs; a detector is compared with pictures that were rated one by one.")
        if take:
            new, old = exchange.load(opened, take)
            typer.echo(f"Imported: {new} ratings from {take}; {old} were there already", err=True)
        if export:
            typer.echo(f"Exported: {exchange.export(opened, export)} ratings to {export}", err=True)
        answers = agreement.table(opened.ratings())
        found = _agreement(opened, answers)
        if scores or judge:
            marks = exchange.scores(opened, scores) if scores else _judged(opened, judge)
            found["detector"] = _detector(answers, marks, threshold)
        if curve:
            found["reward"] = _reward(opened)
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


def _agreement(study: Study, answers: Table) -> dict[str, Any]:
    from ..feedback import agreement

    progress, ratings = study.progress(), study.ratings()
    times = [r.milliseconds for r in ratings if r.milliseconds]
    return {
        "ask": study.ask,
        "pairs": study.pairs,
        "items": progress.items,
        "answered": progress.answered,
        "answers": {a: sum(r.answer == a for r in ratings) for a in study.answers},
        "median_milliseconds": median(times) if times else None,
        "krippendorff": asdict(agreement.krippendorff(answers)),
        "fleiss": asdict(agreement.fleiss(answers)),
        "cohen": {f"{a} and {b}": asdict(e) for (a, b), e in agreement.pairwise(answers, study.raters()).items()},
    }


def _judged(study: Study, name: str) -> dict[int, float]:
    """Return the scoring judge's probability of an object or a style, by picture."""
    import numpy as np
    import torch
    from PIL import Image

    from ..judges.classifier import load_judge
    from ..zoo.emoji.world import WEIGHTS

    judge = load_judge(WEIGHTS / "judge-b.safetensors")
    known = (*judge.objects, *judge.styles)
    if name not in known:
        raise SettingError(f"the shipped judge reads no {name!r}, only what `emoji` draws.{nearest(name, known)}")
    if not (drawn := [p.id for p in study.pictures() if p.drawn]):
        raise SettingError(f"{study.folder} has no pictures yet. Draw them: `expunge rate MODEL --out {study.folder}`.")
    arrays = [np.asarray(Image.open(study.path(i)).convert("RGB"), dtype=np.float32) / 255 for i in drawn]
    if sizes := {a.shape[:2] for a in arrays} - {(64, 64)}:
        raise SettingError(f"the shipped judge reads pictures of 64x64 pixels, not {sizes.pop()}. Give --scores.")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return dict(zip(drawn, judge.probability(images, name).tolist(), strict=True))


def _detector(answers: Table, marks: dict[int, float], threshold: float) -> dict[str, Any]:
    from ..feedback import agreement

    people = agreement.consensus(answers)
    found = agreement.detection(people, marks, threshold)
    return {
        "threshold": threshold,
        **asdict(found),
        "undecided": sum(v is None for v in people.values()),
        "precision": asdict(found.precision),
        "recall": asdict(found.recall),
    }


def _reward(study: Study) -> dict[str, Any]:
    """Return how good a reward model of these ratings is on unseen pictures, and how good it was with fewer."""
    from ..judges.embedding import embedding
    from ..studies import Lesson

    lesson = Lesson.of(study, embedding())
    quality = lesson.quality()
    return {"auc": asdict(quality.auc), "calibration": quality.calibration, "curve": lesson.curve()}


def _lines(found: dict[str, Any]) -> list[str]:
    """Return what a person reads."""
    from ..feedback.agreement import Estimate

    unit = "pairs" if found["pairs"] else "pictures"
    rows = [f"{found['ask']}  ({found['items']} {unit})", ""]
    rows += [f"  {name:<24} {n} answered" for name, n in found["answered"].items()]
    rows += ["", "answers       " + ", ".join(f"{a} {n}" for a, n in found["answers"].items())]
    if found["median_milliseconds"] is not None:
        rows.append(f"median time   {found['median_milliseconds'] / 1000:.1f} s")
    rows += ["", "agreement (1 perfect, 0 chance; 95 % interval)"]
    named = {"Krippendorff's alpha": found["krippendorff"], "Fleiss' kappa": found["fleiss"]}
    named |= {f"Cohen's kappa, {who}": e for who, e in found["cohen"].items()}
    rows += [f"  {name:<36} {_number(Estimate(**e))} on {e['n']} {unit}" for name, e in named.items()]
    if d := found.get("detector"):
        rows += ["", f"detector at {d['threshold']:g}, against the answer of most people ({d['undecided']} undecided)"]
        rows += [f"  {k:<36} {_number(Estimate(**d[k]))} on {d[k]['n']} pictures" for k in ("precision", "recall")]
    if r := found.get("reward"):
        off = "" if r["calibration"] is None else f"; its probabilities are off by {r['calibration']:.2f} on average"
        rows += ["", f"reward model on unseen {unit}: AUC by number of ratings (0.5 chance){off}"]
        fields = ("value", "low", "high", "n")
        rows += [f"  {x['ratings']:<36} {_number(Estimate(*(x[k] for k in fields)))}" for x in r["curve"]]
    return rows


def _number(e: Estimate) -> str:
    if e.value is None:
        return f"{'-':>5} {'':<14}"
    span = "" if e.low is None else f"{e.low:.2f} to {e.high:.2f}"
    return f"{e.value:5.2f} {span:<14}"
