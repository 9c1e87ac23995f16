"""Commands `erase` and `demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import complete
from ..errors import ConceptError, SettingError, nearest
from .options import Config, Device, KeepState, MethodName, ModelName, Pickle, Resume, Seed, Settings, resolve

if TYPE_CHECKING:
    from ..concept import Concept, World
    from ..edits import Edit

DEMO_PICTURES = 64  # drawn of the concept, and to retain, for a method that learns from pictures


def erase(
    *,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder of the run; empty, or not there yet.")],
    concept: Annotated[
        list[str], typer.Option(help="What to erase, or study:FOLDER; repeatable.", autocompletion=complete.concepts)
    ],
    anchor: Annotated[str, typer.Option(help="What to draw instead.", autocompletion=complete.concepts)] = "",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="What to retain; repeatable, or separated by commas.", autocompletion=complete.concepts),
    ] = None,
    kind: Annotated[str, typer.Option(help="object, style, person or class; default: as the model knows it.")] = "",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"One of `expunge methods`; default: the recipe's, else {complete.DEFAULT}.",
            autocompletion=complete.method_names,
        ),
    ] = "",
    settings: Settings = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of method and settings; --set wins.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures of the concept.")] = None,
    keep_images: Annotated[Path | None, typer.Option(help="Folder of pictures to retain.")] = None,
    make_images: Annotated[
        int,
        typer.Option(
            min=0, help="Pictures to draw of each concept, and as many to retain, for methods that learn from pictures."
        ),
    ] = 0,
    embedding: Annotated[Path | None, typer.Option(help="Token embedding of the concept (.safetensors).")] = None,
    until: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Stop early, at this probability that a judge sees the concept; shipped text models."
        ),
    ] = None,
    keep_state: KeepState = False,
    config: Config = None,
    device: Device = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    allow_pickle: Pickle = False,
) -> None:
    """Erase one concept or several from a model; the model itself is left untouched."""
    from .. import terminal

    kept = tuple(k.strip() for line in keep or () for k in line.split(",") if k.strip())
    details = {"anchor": anchor, "keep": kept, "images": images, "keep_images": keep_images, "embedding": embedding}
    options = {"allow_pickle": allow_pickle, "config": config}
    edit = _erase(
        model, concept, method=method, settings=settings, out=out, device=device, seed=seed, resume=resume,
        recipe=recipe, kind=kind, make_images=make_images, until=until, keep_state=keep_state, details=details,
        options=options,
    )  # fmt: skip
    if edit.card:
        terminal.say(terminal.outcome(edit.card))
    typer.echo(f"Run: {out}")
    terminal.say(f"Next: {shlex.join(_next(model, concept, out))}")


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path("expunge-demo"),
    concept: Annotated[str, typer.Option(help="What to erase.", autocompletion=complete.concepts)] = "bomb",
    method: MethodName = "tuce",
    settings: Settings = None,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
) -> None:
    """Erase a concept from the shipped model, prove it, and write a report: the main job, start to end."""
    from .. import terminal
    from ..auditing import audit as prove
    from ..records import Run
    from ..report import build as write
    from ..storage import write_atomic

    terminal.say("Plan: erase, then audit against the untouched model, then report; about 3 minutes on two cores.")
    _erase(
        "emoji", [concept], method=method, settings=settings, out=out, device=device, seed=seed, resume=resume,
        make_images=None,
    )  # fmt: skip
    with terminal.bars() as tick:
        scores = prove(out, device=resolve(device), progress=tick)
    run, page = Run.open(out), out / "report.html"
    write_atomic(page, write([run]).encode())
    terminal.say(terminal.verdict(run.card, scores))
    typer.echo(f"Report: {page}")


def _erase(
    model: str,
    names: list[str],
    *,
    method: str,
    settings: list[str] | None,
    out: Path,
    device: str,
    seed: int,
    resume: bool,
    recipe: Path | None = None,
    kind: str = "",
    make_images: int | None = 0,
    until: float | None = None,
    keep_state: bool = False,
    details: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Edit:
    """Check what can be checked at once, then load, then erase with a bar; `make_images` None: as a demo needs."""
    from .. import flags, terminal
    from ..methods import METHODS, get
    from ..records import need_empty

    chosen: dict[str, Any] = flags.recipe(recipe) if recipe else {}
    name = method or str(chosen.get("method", complete.DEFAULT))
    given = {k: v for k, v in chosen.items() if k != "method"} | flags.parse(settings or ())
    if name not in METHODS:
        raise SettingError(f"unknown method {name!r}. Methods: {', '.join(METHODS)}.{nearest(name, METHODS)}")
    world = _known_world(model)
    concepts = _concepts(names, kind, details or {}, world)
    if not resume:
        need_empty(out)
    probe = None
    if until is not None:
        from ..probe import guide

        probe = guide(concepts, world, until)
    target = resolve(device)
    built = flags.build(get(name), given)
    if make_images is None:
        # the door refuses pictures that nobody would look at
        make_images = DEMO_PICTURES if built.needs.images or built.needs.retained else 0
    from ..backbones import load
    from ..door import erase as through

    loaded = load(model, device=target, **options or {})
    terminal.say(*terminal.plan(model, concepts, built, out, seed))
    if caution := built.caution(loaded) if hasattr(built, "caution") else "":
        terminal.say(f"note     {caution}")
    with terminal.bars() as tick:
        return through(
            loaded, concepts, built, seed=seed, out=out, resume=resume, make_images=make_images, probe=probe,
            progress=terminal.steps(tick), keep_state=keep_state,
        )  # fmt: skip


def _next(model: str, concepts: list[str], out: Path) -> list[str]:
    """Return the command that shows what an erasure did: an audit where a protocol can ask for the concepts by name."""
    from ..feedback.verdict import FORM, rejected

    world = _known_world(model)
    if world and all(world.canonical(c) for c in concepts):
        return ["expunge", "audit", str(out)]
    look = ["expunge", "generate", model, "--edit", str(out), "--out", "pictures", "--prompt"]
    if studies := [c for c in concepts if c.startswith(FORM)]:
        prompts = [prompt for _, prompt in rejected(Path(studies[0].removeprefix(FORM))) if prompt]
        return [*look, *(prompts or ["..."])[:1]]
    # a label of pictures or of a token, which the world's model cannot draw
    return [*look, "..." if world else concepts[0]]


def _known_world(model: str) -> World | None:
    """Return what a shipped model draws without loading its weights: a wrong concept is told in a moment."""
    from ..concept import World
    from ..records import CARD, Run
    from ..zoo.emoji import world as emoji
    from ..zoo.fashion import world as fashion

    if (Path(model) / CARD).is_file():
        # a one-step generator draws what the model that it was made of draws
        return _known_world(Run.open(model).card.model)
    # without the shipped weights `load` says so, which is the better message
    if model == "emoji" and (emoji.WEIGHTS / "model_index.json").is_file():
        return emoji.world()
    if model in ("fashion", fashion.ONE_STEP) and (fashion.WEIGHTS / "model_index.json").is_file():
        return World("fashion", fashion.FASHION.classes, (), {}, ("{c}",), (), labels=True)
    return None


def _concepts(names: list[str], kind: str, details: dict[str, Any], world: World | None) -> list[Concept]:
    from ..concept import Concept
    from ..feedback.verdict import FORM
    from ..feedback.verdict import concept as rated

    given = [f"--{k}" for k in ("images", "embedding") if details.get(k)]
    if given and len(names) > 1:
        raise ConceptError(
            f"{' and '.join(given)} show one concept, and {len(names)} are given: {', '.join(names)}. Give one "
            f"--concept with {given[0]}, and erase the others in runs of their own, or from Python."
        )
    usual = "class" if world and world.labels else "object"
    styles = [n for n in names if world and world.canonical(n) in world.styles]
    kinds: list[Any] = [kind or ("style" if n in styles else usual) for n in names]
    found = [
        rated(n, kind=k, **details) if n.startswith(FORM) else Concept(n, kind=k, **details)
        for n, k in zip(names, kinds, strict=True)
    ]
    for concept in found:
        concept.check(world)
    return found
