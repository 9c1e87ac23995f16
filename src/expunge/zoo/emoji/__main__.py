"""The recipe of the `emoji` world: `python -m expunge.zoo.emoji {data,vae,unet,judges,clip,sae,card,gold,all}`.

Every stage resumes after a kill. Stages read and write one work folder; `card` copies the result into the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .. import run

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="folder of data, checkpoints and results (about 1 GB)")]
Device = Annotated[str, typer.Option(help="cpu, or an accelerator such as cuda: bfloat16 there")]
LEFT_OUT = typer.Option("--without", help="an object to leave out, its pictures and its captions; repeatable")
WORK = Path.home() / ".cache" / "expunge" / "emoji-recipe"


@app.command()
def data(work: Work = WORK) -> None:
    """Fetch the icon sets from npm, render, choose distinct objects."""
    from .data import build

    build(work)


@app.command()
def vae(work: Work = WORK, steps: int = 6000, device: Device = "cpu") -> None:
    """Train the autoencoder."""
    from .vae import train

    train(work, steps, device=device)


@app.command()
def unet(
    work: Work = WORK,
    objects: int = 304,
    steps: int = 12_000,
    name: str = "unet",
    batch: Annotated[int, typer.Option(help="pictures a step; an accelerator takes 512")] = 32,
    device: Device = "cpu",
    without: Annotated[list[str] | None, LEFT_OUT] = None,
) -> None:
    """Train the text encoder, then the denoiser; `--without bomb`: the gold standard of forgetting it."""
    from .unet import train

    train(work, objects, steps, name=name, batch=batch, device=device, without=without or ())


@app.command()
def gold(
    without: Annotated[list[str], LEFT_OUT],
    out: Annotated[Path, typer.Option(help="folder of the run; empty, or not there yet")],
    work: Work = WORK,
    name: str = "unet",
    base: Annotated[str, typer.Option(help="model that it is compared with")] = "emoji",
) -> None:
    """Make a run of the model that `unet --without` trained, which `expunge audit` reads like an erasure's."""
    from ...concept import Concept
    from .. import gold as standard
    from .training import lacking, listed, named

    entries = listed(work)
    left_out = named(entries, without)
    tail, concepts = lacking(entries, left_out), [Concept(entries[i]["name"]) for i in left_out]
    given = {k: v for k, v in (("work", str(work)), ("name", name)) if v not in (str(WORK), "unet")}
    standard.gold(base, work / f"pipeline{tail}", concepts, out, work / f"{name}{tail}.jsonl", settings=given)


@app.command()
def judges(work: Work = WORK, objects: int = 304, steps: int = 6000, device: Device = "cpu") -> None:
    """Train both judges on real renders."""
    from .judges import train

    for which in ("a", "b"):
        train(work, which, steps, count=objects, device=device)


@app.command()
def clip(work: Work = WORK, objects: int = 304, steps: int = 2500, device: Device = "cpu") -> None:
    """Train the image tower that matches the text encoder."""
    from .clip import train

    train(work, objects, steps, device=device)


@app.command()
def sae(work: Work = WORK, objects: int = 304) -> None:
    """Train the sparse autoencoder of the text encoder."""
    from .sae import build

    build(work, objects)


@app.command()
def card(
    work: Work = WORK,
    every: Annotated[int, typer.Option(help="draw every so many-th object only", min=1)] = 1,
    seeds: Annotated[int, typer.Option(help="pictures of every object in every style", min=1)] = 1,
) -> None:
    """Measure the world, write its card, and put everything into the package."""
    from .card import ship

    ship(work, every, seeds)


@app.command(name="all")
def everything(work: Work = WORK, objects: int = 304, device: Device = "cpu") -> None:
    """Run every stage."""
    work.mkdir(parents=True, exist_ok=True)
    stages: tuple[Callable[[], None], ...] = (
        lambda: data(work),
        lambda: vae(work, device=device),
        lambda: unet(work, objects, device=device),
        lambda: judges(work, objects, device=device),
        lambda: clip(work, objects, device=device),
        lambda: sae(work, objects),
        lambda: card(work),
    )
    for stage in stages:
        stage()


if __name__ == "__main__":
    sys.exit(run(app))
