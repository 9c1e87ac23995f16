"""Commands `bench methods`, `bench uce`, `bench speed`, `bench bank`: the measurements behind docs/bench.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SettingError, nearest
from .options import PROTOCOL, Settings

app = typer.Typer(help="Measure the methods on the shipped world; every command resumes.", no_args_is_help=True)

Results = Annotated[Path, typer.Option(help="JSON file of the results.")]


def _words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]


@app.command()
def methods(
    *,
    only: Annotated[str, typer.Option("--methods", help="Names separated by commas; default: all.")] = "",
    targets: Annotated[str, typer.Option(help="Objects and styles; default: 8 bench targets and both styles.")] = "",
    work: Annotated[Path, typer.Option(help="Folder of the cells' runs.")] = Path("bench-runs"),
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG to write: erasure against retention.")] = None,
    protocol: Annotated[str, typer.Option(help="One of `expunge protocols`.")] = PROTOCOL,
) -> None:
    """Every method with its defaults on the bench targets: one table, one plot."""
    from ..methods import METHODS
    from ..protocols import protocol as find
    from ..zoo.emoji.world import BENCH_STYLES, BENCH_TARGETS, drawn

    find(protocol)
    chosen, asked = _words(only) or list(METHODS), _words(targets) or [*BENCH_TARGETS[:8], *BENCH_STYLES]
    for names, allowed in ((chosen, tuple(METHODS)), (asked, (*drawn(), *BENCH_STYLES))):
        if unknown := [n for n in names if n not in allowed]:
            raise SettingError(f"{unknown[0]!r} is not known here.{nearest(unknown[0], allowed)}")
    from .. import terminal
    from ..bench import methods as grid
    from ..storage import write_atomic

    todo = [c for c in grid.cells(chosen, asked) if not grid.finished(work, *c)]
    terminal.say(f"Plan: {len(todo)} cells of a method and a target, a few minutes each; finished ones are kept.")
    with terminal.bars() as tick:
        grid.run(chosen, asked, work, protocol, tick)
    found = grid.rows(chosen, asked, work)
    typer.echo(grid.table(found))
    if table:
        write_atomic(table, grid.table(found).encode())
    if plot:
        grid.plot(found, plot)


@app.command()
def uce(
    *,
    counts: Annotated[str, typer.Option(help="Numbers of concepts, separated by commas.")] = "1,10,50,100",
    out: Results = Path("bench-runs/uce.json"),
) -> None:
    """UCE on many concepts at once: seconds, erasure, retention."""
    from ..bench.uce import measure

    if bad := [c for c in _words(counts) if not c.isdecimal() or c == "0"]:
        raise SettingError(f"--counts has {bad[0]!r}. Give whole numbers from 1, such as 1,10,50,100.")
    measure([int(c) for c in _words(counts)], out, typer.echo)


@app.command()
def speed(
    *,
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = "emoji",
    updates: Annotated[int, typer.Option(min=1, help="Updates a cell.")] = 40,
    out: Results = Path("bench-runs/speed.json"),
) -> None:
    """Time and memory a sample of ESD and SDD against a plain loop."""
    from ..bench.speed import measure

    typer.echo(json.dumps(measure(model, updates, out, typer.echo), indent=1))


@app.command()
def bank(
    *,
    concepts: Annotated[str, typer.Option(help="Objects outside the bench targets.")] = "rhinoceros,tractor",
    out: Results = Path("bench-runs/bank.json"),
    plot: Annotated[Path | None, typer.Option(help="SVG to write.")] = None,
) -> None:
    """What reuse of latents costs: quality and seconds over the bank's settings."""
    from ..bench.bank import measure
    from ..bench.bank import plot as draw

    rows = measure(_words(concepts), out, typer.echo)
    if plot:
        draw(rows, plot)


@app.command()
def hfi(
    *,
    looks: Annotated[str, typer.Option(help="Names separated by commas; default: all.")] = "",
    settings: Settings = None,
    pictures: Annotated[int, typer.Option(min=8, help="Pictures that a cell is measured on.")] = 160,
    work: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("bench-runs/hfi"),
    out: Results = Path("bench-runs/hfi.json"),
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """HFI on looks that no prompt names, rated by simulated raters, against SDD with the best words."""
    from .. import flags, terminal
    from ..bench import hfi as grid
    from ..bench.looks import LOOKS
    from ..methods.hfi import HFI
    from ..storage import write_atomic, write_json

    chosen = _words(looks) or list(LOOKS)
    if unknown := [n for n in chosen if n not in LOOKS]:
        raise SettingError(f"{unknown[0]!r} is no look. Looks: {', '.join(LOOKS)}.{nearest(unknown[0], LOOKS)}")
    given = flags.parse(settings or ())
    built = flags.build(HFI, given)
    with terminal.bars() as tick:
        rows = grid.run(chosen, work, pictures, {k: getattr(built, k) for k in given}, tick)
    write_json(out, rows)
    typer.echo(grid.table(rows))
    if table:
        write_atomic(table, grid.table(rows).encode())
