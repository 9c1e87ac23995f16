"""Command `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Config, Device, ModelName, Pickle, resolve


def generate(
    *,
    model: ModelName,
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures; empty, or not there yet.")],
    edit: Annotated[Path | None, typer.Option(help="Run, or edit file, to apply.")] = None,
    seeds: Annotated[str, typer.Option(help="Numbers and ranges: 0-7,12.")] = "0-7",
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="Guidance scale.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    config: Config = None,
    device: Device = "auto",
    allow_pickle: Pickle = False,
) -> None:
    """Draw pictures: numbered PNGs and a contact sheet."""
    from contextlib import nullcontext

    from .. import gate, terminal
    from ..records import need_empty

    numbers = gate.seeds(seeds)
    need_empty(out)
    target = resolve(device)
    from .. import sheet
    from ..backbones import load
    from ..edits import load_edit

    base = load(model, device=target, allow_pickle=allow_pickle, config=config)
    prompts = [p for p in prompt for _ in numbers]
    with load_edit(edit).on(base) if edit else nullcontext(base) as ready, terminal.bars() as tick:
        images = ready.generate(
            prompts,
            seeds=list(numbers) * len(prompt),
            steps=steps,
            guidance=guidance,
            negative=negative,
            progress=terminal.counter(tick, "drawing", len(prompts)),
        )
    sheet.save(out, images, prompts, list(numbers) * len(prompt), columns=min(8, len(numbers)))
    typer.echo(f"Pictures: {len(images)} in {out}, all on {out / 'sheet.png'}")
