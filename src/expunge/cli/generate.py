"""Command `generate`."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Config, Device, ModelName, Pickle, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from ..edits import Edit
    from ..kernel.model import Model


def generate(
    *,
    model: ModelName,
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures; empty, or not there yet.")],
    edit: Annotated[Path | None, typer.Option(help="Run, or edit file, to apply.")] = None,
    transfer: Annotated[
        bool,
        typer.Option("--transfer", help="The edit's membranes (spm) are tried on another fine-tune of their base."),
    ] = False,
    seeds: Annotated[str, typer.Option(help="Numbers and ranges, such as 0-7,12.")] = "0-7",
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; default: as the model has it.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Guidance scale; default: as the model has it.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt, or the file of a token (.safetensors) to lead away from.")
    ] = None,
    config: Config = None,
    device: Device = "auto",
    allow_pickle: Pickle = False,
) -> None:
    """Draw pictures: numbered PNGs and a contact sheet."""
    from .. import gate, terminal
    from ..records import need_empty
    from ..storage import sweep

    numbers = gate.seeds(seeds)
    sweep(out)
    need_empty(out)
    target = resolve(device)
    from .. import sheet, tokens
    from ..backbones import load
    from ..edits import load_edit

    applied = load_edit(edit) if edit else None
    on = _placing(applied, transfer)
    base = load(model, device=target, allow_pickle=allow_pickle, config=config)
    _warn_cut(base, prompt, "prompt")
    prompts = [p for p in prompt for _ in numbers]
    with (
        on(base) as ready,
        tokens.readable(ready, negative) as avoided,
    ):
        _need_guidance(ready, guidance, negative)
        _warn_cut(ready, [avoided] if avoided else [], "negative prompt")
        with terminal.bars() as tick:
            images = ready.generate(
                prompts,
                seeds=list(numbers) * len(prompt),
                steps=steps,
                guidance=guidance,
                negative=avoided,
                progress=terminal.counter(tick, "drawing", len(prompts)),
            )
    sheet.save(out, images, prompts, list(numbers) * len(prompt), columns=min(8, len(numbers)))
    typer.echo(f"Pictures: {len(images)} in {out}, all on {out / 'sheet.png'}")


def _placing(edit: Edit | None, transfer: bool) -> Callable[[Model], AbstractContextManager[Model]]:
    """Return what puts an edit on a model for a while.

    Raises:
        SettingError: an edit, or none, that cannot be tried on another model.
    """
    from ..edits import GatedEdit
    from ..errors import SettingError

    if not transfer:
        return edit.on if edit else nullcontext
    if not isinstance(edit, GatedEdit):
        found = f"this edit is of kind {edit.kind!r}" if edit else "no --edit is given"
        raise SettingError(
            f"--transfer is for the membranes of `spm`, and {found}. Leave it out, and erase from this model itself."
        )
    return partial(edit.on, transfer=True)


def _warn_cut(model: Model, prompts: Sequence[str], kind: str) -> None:
    """Warn of prompts that are longer than the text encoder's window."""
    from ..errors import PromptCut

    for prompt, lost in model.clipped(list(dict.fromkeys(prompts))):
        warnings.warn(
            f"the {kind} {prompt!r} is longer than the text encoder's window: the model does not see {lost!r}.",
            PromptCut,
            stacklevel=3,
        )


def _need_guidance(model: Model, guidance: float | None, negative: str | None) -> None:
    """Refuse a negative prompt that nothing would read.

    Raises:
        SettingError: sampling goes without guidance, which is what a negative prompt is for.
    """
    from ..errors import SettingError

    scale = model.sampling.guidance if guidance is None else guidance
    if negative is not None and (model.one_step is not None or scale <= 1):
        why = f"the guidance scale is {scale:g}. Leave it out, or give a --guidance above 1."
        if model.one_step is not None:
            why = "a one-step generator draws without guidance. Leave it out."
        raise SettingError(f"--negative has no effect: {why}")
