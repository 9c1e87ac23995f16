"""Commands `audit` and `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Device, Protocol, resolve

GATE_FAILED = 3


def audit(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of an erasure, or of a distillation.")],
    protocol: Protocol = "",
    gate: Annotated[str, typer.Option(help="Rules such as ua>=0.95,ira>=0.95; exit code 3 when one fails.")] = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what a run erased and what it damaged, against the untouched model, on the same prompts and seeds."""
    from ..gate import parse
    from ..records import Run

    rules = parse(gate) if gate else ()
    opened = Run.open(run)
    opened.edit_path  # noqa: B018 (raises before any long work when the run holds no edit)
    target = resolve(device)
    from .. import terminal
    from ..auditing import audit as prove

    with terminal.bars() as tick:
        scores = prove(run, protocol or None, device=target, progress=tick)
    if as_json:
        typer.echo(json.dumps([s.to_json() for s in scores], indent=1))
    else:
        typer.echo("\n".join(terminal.table(scores)))
        terminal.say(terminal.verdict(opened.card, scores))
    if failures := [why for rule in rules if (why := rule.failure(scores))]:
        for why in failures:
            typer.echo(f"gate: {why}", err=True)
        raise typer.Exit(GATE_FAILED)


def report(
    *,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of audited runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one run or several."""
    from ..records import Run
    from ..report import build
    from ..storage import write_atomic

    write_atomic(out, build([Run.open(r) for r in runs]).encode())
    typer.echo(f"Report: {out}")
