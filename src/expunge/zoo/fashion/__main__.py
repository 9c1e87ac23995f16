"""The recipe of the `fashion` world: `python -m expunge.zoo.fashion STAGE`.

STAGE is data, judges, features, ddpm, guide, card, one-step, gold or all. Every one resumes after a kill. Stages read
and write one work folder; `guide` compares guidance scales; `card` measures and, for the shipped world, copies the
result into the package. With `--world cifar10 --source FOLDER` the same stages make a model of CIFAR-10 in
`WORK/pipeline`, which `expunge` takes as MODEL.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...devices import resolve
from ...errors import SettingError, nearest
from .. import run
from .world import FASHION, SOURCES, Source

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Work = Annotated[Path | None, typer.Option(help="Folder of data, checkpoints and results; default: in the cache.")]
World = Annotated[str, typer.Option(help=f"One of {', '.join(SOURCES)}.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser updates.")]
Guidance = Annotated[float, typer.Option(min=1, help="Guidance scale that the saved model samples with.")]
Only = Annotated[Literal["a", "b"] | None, typer.Option(help="Train this one of the two.")]
Rate = Annotated[
    float | None, typer.Option("--lr", min=1e-8, max=1, help="Highest learning rate; default: the recipe's.")
]
Device = Annotated[str, typer.Option(help="Where to train: auto, cpu, cuda or mps.")]
Half = Annotated[
    bool,
    typer.Option("--bf16", help="Compute in bfloat16: 1.7 times as fast on a CPU with AMX, slower on one without."),
]
From = Annotated[Path | None, typer.Option(help="Folder of the published files; default: where Debian puts them.")]

DDPM, JUDGE, FEATURES, ONE_STEP = 15_000, 9000, 4000, 1000  # updates
GUIDANCE = 2.0
SCALES = "1,1.5,1.75,2,2.5"


def place(world: str, work: Path | None) -> tuple[Source, Path]:
    """Return what a world is made of and the work folder, which is made.

    Raises:
        SettingError: there is no such world.
    """
    if world not in SOURCES:
        raise SettingError(f"unknown world {world!r}. Worlds: {', '.join(SOURCES)}.{nearest(world, SOURCES)}")
    folder = work or Path.home() / ".cache" / "expunge" / f"{world}-recipe"
    folder.mkdir(parents=True, exist_ok=True)
    return SOURCES[world], folder


@app.command()
def data(world: World = FASHION.world, work: Work = None, source: From = None) -> None:
    """Read the published files, check them, keep the pictures."""
    from .data import build

    of, folder = place(world, work)
    build(folder, of, source)


@app.command()
def ddpm(
    world: World = FASHION.world,
    work: Work = None,
    steps: Steps = DDPM,
    guidance: Guidance = GUIDANCE,
    without: Annotated[str, typer.Option(help="A class to leave out: the gold standard of forgetting it.")] = "",
    lr: Rate = None,
    device: Device = "auto",
    bf16: Half = False,
) -> None:
    """Train the class-conditional denoiser."""
    from .ddpm import train

    target = resolve(device)
    of, folder = place(world, work)
    train(folder, of, steps, guidance=guidance, without=without, lr=lr, device=target, bf16=bf16)


@app.command()
def gold(
    without: Annotated[str, typer.Option(help="The class that was left out.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; empty, or not there yet.")],
    world: World = FASHION.world,
    work: Work = None,
) -> None:
    """Make a run of the model that `ddpm --without` trained, which `expunge audit` reads like an erasure's."""
    from ...concept import Concept
    from .. import gold as standard
    from .ddpm import absent

    of, folder = place(world, work)
    left_out = absent(of, without)
    base = of.world if of is FASHION else str(folder / "pipeline")
    concept, log = Concept(of.classes[left_out], kind="class"), folder / f"ddpm-without-{left_out}.jsonl"
    given = {"world": world} if of is not FASHION else {}
    given |= {"work": str(work)} if work else {}
    standard.gold(base, folder / f"pipeline-without-{left_out}", [concept], out, log, settings=given)


@app.command()
def snapshot(world: World = FASHION.world, work: Work = None, guidance: Guidance = GUIDANCE) -> None:
    """Export the denoiser as it is in the newest checkpoint, while training goes on."""
    from . import ddpm as stage

    of, folder = place(world, work)
    stage.snapshot(folder, of, guidance)


@app.command()
def judges(
    world: World = FASHION.world,
    work: Work = None,
    steps: Steps = JUDGE,
    only: Only = None,
    lr: Rate = None,
    device: Device = "auto",
    bf16: Half = False,
) -> None:
    """Train both judges on real pictures."""
    from .judges import train

    target = resolve(device)
    of, folder = place(world, work)
    for which in (only,) if only else ("a", "b"):
        train(folder, of, which, steps, lr=lr, device=target, bf16=bf16)


@app.command()
def features(
    world: World = FASHION.world,
    work: Work = None,
    steps: Steps = FEATURES,
    lr: Rate = None,
    device: Device = "auto",
    bf16: Half = False,
) -> None:
    """Train the feature network of the distances, and keep the real test pictures as it sees them."""
    from .judges import train

    target = resolve(device)
    of, folder = place(world, work)
    train(folder, of, "features", steps, lr=lr, device=target, bf16=bf16)


@app.command()
def guide(
    world: World = FASHION.world,
    work: Work = None,
    scales: Annotated[str, typer.Option(help="Guidance scales, with commas between; 1 is none.")] = SCALES,
    count: Annotated[int, typer.Option(help="Pictures at each scale.")] = 1000,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's own.")] = None,
) -> None:
    """Compare guidance scales on the trained denoiser: judge a's accuracy, FID, KID, precision and recall."""
    from .guide import compare, read_scales

    of, folder = place(world, work)
    compare(folder, of, read_scales(scales), count, steps)


@app.command()
def card(
    world: World = FASHION.world,
    work: Work = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Ship a model that misses an aim.")] = False,
) -> None:
    """Measure the world, write its card, and put the shipped world into the package."""
    from .card import assemble, ship

    of, folder = place(world, work)
    done = assemble(folder, of)
    if of is FASHION:
        ship(done, anyway=anyway)


@app.command(name="one-step")
def one_step(
    world: World = FASHION.world,
    work: Work = None,
    steps: Steps = ONE_STEP,
    device: Device = "auto",
) -> None:
    """Distil the model into a generator that draws in one step; of the shipped world, put it into the package."""
    from .onestep import measure, ship, train

    target = resolve(device)
    of, folder = place(world, work)
    run = train(folder, of, steps, target)
    figures = measure(folder, of, run, target)
    if of is FASHION:
        ship(run, figures)


@app.command(name="all")
def everything(
    world: World = FASHION.world,
    work: Work = None,
    source: From = None,
    device: Device = "auto",
    bf16: Half = False,
) -> None:
    """Run every stage."""
    resolve(device)  # a device that is not here is told before the first stage
    data(world, work, source)
    judges(world, work, device=device, bf16=bf16)
    features(world, work, device=device, bf16=bf16)
    ddpm(world, work, device=device, bf16=bf16)
    card(world, work)
    one_step(world, work, device=device)


if __name__ == "__main__":
    sys.exit(run(app))
