"""Command `sae`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import NeedsError
from .options import Config, Device, ModelName, Pickle, resolve

if TYPE_CHECKING:
    from ..kernel.model import Model


def sae(
    *,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="File to write, such as sae.safetensors; not there yet.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Text file of prompts, one a line; default: those of the model's world.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="expansion, k, depth, steps, batch, lr or patience=value; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Two trainings with one seed give the same file.")] = 0,
    config: Config = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted training of --out.")] = False,
    allow_pickle: Pickle = False,
) -> None:
    """Train sparse autoencoders of a model's text encoders, which some methods need."""
    from .. import flags, terminal
    from ..prompts import read
    from ..sae import Training, need_free, train

    built = flags.build(Training, flags.parse(settings or ()))
    if not resume:
        need_free(out)
    lines = read(prompts) if prompts else ()
    target = resolve(device)
    from ..backbones import load

    loaded = load(model, device=target, allow_pickle=allow_pickle, config=config)
    asked = lines or _known(loaded)
    depths = ", ".join(f"{len(stack)} layers of {name}" for name, stack in loaded.need_text().layers.items())
    terminal.say(
        f"model    {model}", f"read     {depths}", f"prompts  {len(asked)}, {prompts or 'of its world'}",
        f"train    {built}", f"seed     {seed}", f"file     {out}",
    )  # fmt: skip
    with terminal.bars() as tick:
        found = train(loaded, asked, out, built, seed=seed, resume=resume, progress=terminal.steps(tick))
    for name, figures in found.figures.items():
        terminal.say(
            f"{name}: {figures['explained']:.1%} of the variance of {len(found.held)} held-out prompts explained, "
            f"{figures['dead']:.1%} of {len(found.saes[name].encoder)} features dead"
        )
    typer.echo(f"File: {out}")
    terminal.say(f"Next: expunge erase {model} --concept NAME --method itd --set sae={out} --out RUN")


def _known(model: Model) -> tuple[str, ...]:
    """Return the prompts of a model's world.

    Raises:
        NeedsError: what it can draw is not known.
    """
    from ..sae import known

    if model.world is None:
        raise NeedsError(
            f"what {model.name!r} can draw is not known, so prompts must be given: --prompts FILE, a text file with "
            "one a line, such as the captions of a data set, better 10,000 of them."
        )
    return known(model.world)
