"""Command `distill`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SettingError
from .options import Config, Device, ModelName, Pickle, Seed, resolve

if TYPE_CHECKING:
    from ..kernel.state import Step
    from ..terminal import Tick


def distill(
    *,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder of the run; empty, or not there yet.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="A setting, key=value; repeatable. See docs/howto/distill.md."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of settings; --set wins.")] = None,
    config: Config = None,
    device: Device = "auto",
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, to more steps too when it is finished.")
    ] = False,
    keep_state: Annotated[
        bool, typer.Option(help="Keep what a finished run needs to go on, and SFD to start from; see the how-to.")
    ] = True,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="MODEL is a distillation's run: write its generator so far to --out.")
    ] = False,
    allow_pickle: Pickle = False,
) -> None:
    """Distil a model into a generator that draws in one step; the run's folder is then a model."""
    from .. import flags, terminal
    from ..records import need_empty

    if snapshot:
        _look(model, out, wanted=bool(settings or recipe or resume))
        return
    chosen = flags.recipe(recipe) if recipe else {}
    if (named := chosen.pop("method", "sid")) != "sid":
        raise SettingError(f"{recipe} is a recipe of {named!r}. A distillation needs one of 'sid', or none.")
    given = chosen | flags.parse(settings or ())
    if not resume:
        need_empty(out)
    target = resolve(device)
    from .. import distill as room
    from ..backbones import load

    method = flags.build(room.SiD, given)
    done = room.done(out) if resume else 0
    loaded = load(model, device=target, allow_pickle=allow_pickle, config=config)
    guidance = method.guidance or loaded.sampling.guidance
    terminal.say(
        f"model    {model}",
        f"distil   {len(method.told(loaded))} prompts, guidance {guidance:g}",
        f"method   {method}",
        f"cost     {max(0, method.steps - done)} updates of {method.passes(guidance)} forward passes of {method.batch} "
        f"samples: about {terminal.clock(room.estimate(loaded, method, done))} here",
        f"seed     {seed}",
        f"run      {out}",
    )
    with terminal.bars() as tick:
        edit = room.distill(
            loaded, method, seed=seed, out=out, resume=resume, progress=watched(tick), keep_state=keep_state
        )
    if edit.card:
        terminal.say(f"Distilled {model} in {edit.card.steps} updates, {terminal.clock(edit.card.seconds)}.")
    typer.echo(f"Run: {out}")
    terminal.say(f"Next: expunge generate {out} --prompt ... --out pictures")


def _look(run: str, out: Path, *, wanted: bool) -> None:
    """Write the generator of a run as it is now."""
    from .. import terminal
    from ..snapshot import snapshot

    if wanted:
        raise SettingError("--snapshot takes a run as it is. Leave out --set, --recipe and --resume.")
    edit = snapshot(run, out)
    assert edit.card is not None
    terminal.say(f"The generator of {run} after {edit.card.settings['steps']} updates.")
    typer.echo(f"Run: {out}")
    terminal.say(f"Next: expunge generate {out} --prompt ... --out pictures")


def watched(tick: Tick) -> Callable[[Step], None]:
    """Return a callback that keeps a bar, and writes a line whenever samples have been looked at."""
    from .. import terminal

    def show(step: Step) -> None:
        figures = {name: value for name, value in step.losses.items() if name in ("distance", "variety", "recognised")}
        if figures:
            told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            terminal.say(f"update {step.i + 1}: {told}")
        tick(f"distilling: fake score {step.losses['fake']:.2e}", step.i + 1, step.n)

    return show
