"""Commands `bench NAME`: the measurements behind docs/bench.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SettingError, nearest
from .options import Device, Settings, resolve

app = typer.Typer(
    help="Measure the methods on the shipped worlds; what is measured already is not measured again by methods, "
    "classes, claims, bank and hfi.",
    no_args_is_help=True,
)

Known = Annotated[
    Path | None,
    typer.Option(help="File of the cells that are measured already; read, and written again with what is added."),
]
Results = Annotated[Path, typer.Option(help="JSON file of the results.")]


def _words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]


def _check(names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise SettingError unless every name is allowed."""
    allowed = tuple(allowed)
    if unknown := [n for n in names if n not in allowed]:
        raise SettingError(f"{unknown[0]!r} is not known here.{nearest(unknown[0], allowed)}")


@app.command()
def methods(
    *,
    only: Annotated[
        str,
        typer.Option(
            "--methods", help='Names separated by commas, each alone or with settings, "sdd steps=300"; default: all.'
        ),
    ] = "",
    targets: Annotated[
        str,
        typer.Option(help="Objects and styles, separated by commas, or a number of bench targets, and two styles."),
    ] = "8",
    work: Annotated[Path, typer.Option(help="Folder of the cells' runs.")] = Path("bench-runs"),
    known: Known = None,
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG to write: erasure against retention.")] = None,
    device: Device = "auto",
) -> None:
    """Every method with its defaults on the bench targets: one table, one plot. Interrupted, it goes on.

    The same command started twice shares the work.
    """
    from ..methods import METHODS
    from ..zoo.emoji.world import BENCH_STYLES, BENCH_TARGETS, STYLES, drawn

    chosen, asked = _words(only) or list(METHODS), _words(targets)
    if targets.isdecimal():
        asked = [*BENCH_TARGETS[: int(targets)], *BENCH_STYLES]
    _check((arm.split()[0] for arm in chosen), METHODS)
    _check(asked, (*drawn(), *STYLES))
    target = resolve(device)
    from .. import terminal
    from ..backbones import load
    from ..bench import cells
    from ..bench import methods as grid
    from ..storage import write_atomic

    for arm in chosen:
        grid.built(arm)
    model = load("emoji", device=target)
    if known:
        cells.recall(known, work)
    todo = [c for c in grid.grid(chosen, asked) if not grid.finished(work, *c, model.hash)]
    terminal.say(f"Plan: {len(todo)} cells of a method and a target, a few minutes each; finished ones are kept.")
    with terminal.bars() as tick:
        grid.run(model, todo, work, tick)
    if known:
        cells.keep(known, work)
    found = grid.rows(chosen, asked, work)
    text = grid.table(found, grid.by_target(chosen, asked, work), grid.refusals(chosen, asked, work))
    typer.echo(text)
    if table:
        write_atomic(table, text.encode())
    if plot:
        grid.plot(found, plot)


@app.command()
def classes(
    *,
    only: Annotated[
        str,
        typer.Option(
            "--methods",
            help='Names separated by commas, each alone or with settings, "sfd steps=300"; "retrain" is what --gold '
            "holds; default: the baselines, sfd and retrain.",
        ),
    ] = "",
    names: Annotated[
        str, typer.Option("--classes", help="Names or numbers, separated by commas, or so many of them; default: all.")
    ] = "",
    model: Annotated[
        str, typer.Option(help="Class-conditional model that is sampled in steps: fashion, or a recipe's folder.")
    ] = "fashion",
    generator: Annotated[
        str, typer.Option(help="What sfd starts from: run of `expunge distill MODEL`; default: fashion's shipped one.")
    ] = "",
    gold: Annotated[Path | None, typer.Option(help="Folder of the runs of retrained models.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of the cells' runs.")] = Path("bench-runs/classes"),
    known: Known = None,
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="PNG to write: classes by the generator, before and after each is forgotten.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Every method on every class of a class-conditional model: one table. Interrupted, it goes on.

    The same command started twice shares the work.
    """
    from ..methods import METHODS

    named = _words(only)
    _check((arm.split()[0] for arm in named), (*METHODS, "retrain"))
    target = resolve(device)
    from .. import terminal
    from ..bench import cells, class_table, onestep
    from ..bench import classes as bench
    from ..storage import write_atomic

    arms = bench.arms(named, gold)
    shown = onestep.check_figure(figure, arms) if figure else ""
    room = bench.opened(model, generator, gold, arms, work, target)
    asked = room.asked(_words(names))
    if known:
        cells.recall(known, work)
    todo = room.todo(arms, asked)
    terminal.say(
        f"Plan: {len(todo)} of {len(arms) * len(asked)} cells of a method and a class, minutes each; finished ones are "
        "kept."
    )
    with terminal.bars() as tick:
        timed = onestep.speed(room, tick)
        bench.run(room, todo, tick)
    if known:
        cells.keep(known, work)
    text = class_table.text(room, arms, asked, timed)
    typer.echo(text)
    if table:
        write_atomic(table, text.encode())
    if figure and (left := onestep.figure(room, shown, asked, figure)):
        terminal.say(f"Not in the figure, since their edits are not under {work}: {', '.join(left)}")


@app.command()
def claims(
    *,
    only: Annotated[str, typer.Option("--claims", help="Names separated by commas; default: all.")] = "",
    targets: Annotated[int, typer.Option(min=1, max=16, help="So many of the bench targets.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, from 0.")] = 3,
    work: Annotated[Path, typer.Option(help="Folder of the cells' runs.")] = Path("bench-runs/claims"),
    known: Known = None,
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    device: Device = "auto",
) -> None:
    """Each method's central claim: won, lost or open. Interrupted, it goes on; started twice, it shares the work."""
    from ..bench import cells as store
    from ..bench import claims as bench

    chosen, allowed = _words(only), tuple(dict.fromkeys(c.name for c in bench.CLAIMS))
    if unknown := [n for n in chosen if n not in allowed]:
        raise SettingError(f"{unknown[0]!r} is no claim. Claims: {', '.join(allowed)}.{nearest(unknown[0], allowed)}")
    target = resolve(device)
    from .. import terminal
    from ..backbones import load
    from ..storage import write_atomic
    from ..zoo.emoji.world import BENCH_TARGETS

    asked, names = [c for c in bench.CLAIMS if not chosen or c.name in chosen], BENCH_TARGETS[:targets]
    if known:
        store.recall(known, work)
    model, cells = load("emoji", device=target), bench.grid(asked, names, seeds)
    todo = {c: wanted for c, wanted in cells.items() if not bench.whole(c, wanted, work, model.hash)}
    terminal.say(
        f"Plan: {len(todo)} of {len(cells)} cells of an arm, a target and a seed, a few minutes each; finished ones "
        "are kept."
    )
    with terminal.bars() as tick:
        bench.run(model, todo, work, tick)
    if known:
        store.keep(known, work)
    found = bench.table([bench.row(c, names, seeds, work) for c in asked], bench.refused(cells, work))
    typer.echo(found)
    if table:
        write_atomic(table, found.encode())


@app.command()
def uce(
    *,
    counts: Annotated[str, typer.Option(help="Numbers of concepts, separated by commas.")] = "1,10,50,100",
    out: Results = Path("bench-runs/uce.json"),
) -> None:
    """UCE (readers, tokens), RECE, SPEED and TUCE on many concepts at once: seconds, erasure, retention."""
    from ..bench.uce import measure

    found = _words(counts)
    if bad := [c for c in found or [counts] if not c.isdecimal() or int(c) == 0]:
        raise SettingError(f"--counts has {bad[0]!r}. Give whole numbers from 1, such as 1,10,50,100.")
    measure([int(c) for c in found], out, typer.echo)


@app.command()
def speed(
    *,
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = "emoji",
    updates: Annotated[int, typer.Option(min=1, help="Updates that each loop is timed over.")] = 40,
    out: Results = Path("bench-runs/speed.json"),
) -> None:
    """Time a sample and memory of ESD and SDD, against a plain loop."""
    from ..bench.speed import measure

    typer.echo(json.dumps(measure(model, updates, out, typer.echo), indent=1))


@app.command()
def bank(
    *,
    concepts: Annotated[
        str, typer.Option(help="Objects outside the bench targets, separated by commas.")
    ] = "rhinoceros,tractor",
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
def multistep(
    *,
    targets: Annotated[str, typer.Option(help="Objects and styles, separated by commas.")] = "rhinoceros,tractor",
    settings: Settings = None,
    work: Annotated[Path, typer.Option(help="Folder of the cells' runs.")] = Path("bench-runs"),
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    device: Device = "auto",
) -> None:
    """An experiment: score forgetting that leaves a model sampled in steps."""
    target = resolve(device)
    from .. import flags, terminal
    from ..backbones import load
    from ..bench import multistep as experiment
    from ..storage import write_atomic

    method = flags.build(experiment.MultiStep, flags.parse(settings or ()))
    with terminal.bars() as tick:
        found = experiment.run(load("emoji", device=target), _words(targets), work, method, tick)
    typer.echo(found)
    if table:
        write_atomic(table, found.encode())


@app.command()
def hfi(
    *,
    looks: Annotated[str, typer.Option(help="Names separated by commas; default: all.")] = "",
    curves: Annotated[
        str, typer.Option(help="Looks whose curves over ratings and wrong answers are drawn; default: the first three.")
    ] = "",
    settings: Settings = None,
    pictures: Annotated[int, typer.Option(min=8, help="Pictures that a cell is measured on.")] = 160,
    work: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("bench-runs/hfi"),
    out: Annotated[
        Path, typer.Option(help="JSON file of the rows: read, and written again with what is added.")
    ] = Path("bench-runs/hfi.json"),
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    device: Device = "auto",
) -> None:
    """HFI on looks that no prompt names, rated by simulated raters, against SDD with the best words."""
    from .. import flags, terminal
    from ..bench import hfi as grid
    from ..bench import hfi_table
    from ..bench.looks import LOOKS
    from ..methods.hfi import HFI
    from ..storage import write_atomic

    chosen = _words(looks) or list(LOOKS)
    curved = _words(curves) or chosen[: grid.CURVED]
    if unknown := [n for n in (*chosen, *curved) if n not in LOOKS]:
        raise SettingError(f"{unknown[0]!r} is no look. Looks: {', '.join(LOOKS)}.{nearest(unknown[0], LOOKS)}")
    given = flags.parse(settings or ())
    built = flags.build(HFI, given)
    target = resolve(device)
    known = grid.recalled(out)
    with terminal.bars() as tick:
        rows = grid.run(chosen, work, pictures, {k: getattr(built, k) for k in given}, tick, known, curved, target)
    grid.kept(out, rows, known)
    typer.echo(text := hfi_table.table(rows))
    if table:
        write_atomic(table, text.encode())
