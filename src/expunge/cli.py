"""The command line. Torch and diffusers are imported inside commands, so that `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, complete
from .errors import ConceptError, ExpungeError, ExpungeWarning, SettingError, nearest

if TYPE_CHECKING:
    from .concept import Concept
    from .edits import Edit

GATE_FAILED = 3
EXPECTED_ERROR = 2
INTERRUPTED = 130
DEVICES = ("auto", "cpu", "cuda", "mps")
PROTOCOL = "emoji-v1"

app = typer.Typer(
    name="expunge",
    help="Erase concepts from diffusion models, prove it, report it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="emoji (shipped), a diffusers folder, a hub id, or a .safetensors checkpoint.",
        autocompletion=complete.models,
    ),
]
MethodName = Annotated[
    str, typer.Option("--method", "-m", help="One of `expunge methods`.", autocompletion=complete.method_names)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A method's setting, key=value; repeatable.", autocompletion=complete.settings),
]
Seed = Annotated[int, typer.Option(help="Two runs with one seed give the same edit.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=lambda: list(DEVICES))]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled checkpoints, which can run any code.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expunge {__version__}")
        raise typer.Exit


@app.callback()
def _expunge(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path("expunge-demo"),
    concept: Annotated[str, typer.Option(help="What to erase.", autocompletion=complete.concepts)] = "bomb",
    method: MethodName = "uce",
    settings: Settings = None,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
) -> None:
    """Erase a concept from the shipped model, prove it, and write a report: the main job, start to end."""
    from . import terminal
    from .audit import audit as prove
    from .records import Run
    from .report import build as write
    from .storage import write_atomic

    terminal.say("Plan: erase, then audit against the untouched model, then report; about 3 minutes on two cores.")
    edit = _erase(
        "emoji", [concept], method=method, settings=settings, out=out, device=device, seed=seed, resume=resume
    )
    with terminal.bars() as tick:
        scores = prove(out, PROTOCOL, device=_device(device), progress=tick)
    page = out / "report.html"
    write_atomic(page, write([Run.open(out)]).encode())
    terminal.say(terminal.verdict(edit.card.concept["name"] if edit.card else concept, scores))
    typer.echo(f"Report: {page}")


@app.command()
def erase(
    *,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder of the run; empty, or not there yet.")],
    concept: Annotated[list[str], typer.Option(help="What to erase; repeatable.", autocompletion=complete.concepts)],
    anchor: Annotated[str, typer.Option(help="What to draw instead.", autocompletion=complete.concepts)] = "",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="What to retain; repeatable, or separated by commas.", autocompletion=complete.concepts),
    ] = None,
    kind: Annotated[str, typer.Option(help="object, style, person or class; default: as the model knows it.")] = "",
    method: MethodName = "",
    settings: Settings = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of method and settings; --set wins.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures of the concept.")] = None,
    embedding: Annotated[Path | None, typer.Option(help="Token embedding of the concept (.safetensors).")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration folder of a single-file checkpoint.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    allow_pickle: Pickle = False,
) -> None:
    """Erase one concept or several from a model; the model itself is left untouched."""
    from . import terminal

    kept = tuple(k.strip() for line in keep or () for k in line.split(",") if k.strip())
    details = {"anchor": anchor, "keep": kept, "images": images, "embedding": embedding}
    options = {"allow_pickle": allow_pickle, "config": config}
    edit = _erase(
        model, concept, method=method, settings=settings, out=out, device=device, seed=seed, resume=resume,
        recipe=recipe, kind=kind, details=details, options=options,
    )  # fmt: skip
    if edit.card:
        terminal.say(terminal.outcome(edit.card))
    typer.echo(f"Run: {out}")
    terminal.say(f"Next: expunge audit {out}")


@app.command()
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
    device: Device = "auto",
    allow_pickle: Pickle = False,
) -> None:
    """Draw pictures: numbered PNGs and a contact sheet."""
    from contextlib import nullcontext

    from . import gate, terminal
    from .records import need_empty

    numbers = gate.seeds(seeds)
    need_empty(out)
    target = _device(device)
    from . import sheet
    from .backbones import load
    from .edits import load_edit

    base = load(model, device=target, allow_pickle=allow_pickle)
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


@app.command()
def audit(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of an erasure.")],
    protocol: Annotated[str, typer.Option(help="One of `expunge protocols`.")] = PROTOCOL,
    gate: Annotated[str, typer.Option(help="Rules such as ua>=0.95,ira>=0.95; exit code 3 when one fails.")] = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what a run erased and what it damaged, against the untouched model, on the same seeds."""
    from .gate import parse
    from .records import Run

    rules = parse(gate) if gate else ()
    opened = Run.open(run)
    opened.edit_path  # noqa: B018 (raises before any long work when the run holds no edit)
    from . import terminal
    from .audit import audit as prove

    with terminal.bars() as tick:
        scores = prove(run, protocol, device=_device(device), progress=tick)
    if as_json:
        typer.echo(json.dumps([s.to_json() for s in scores], indent=1))
    else:
        typer.echo("\n".join(terminal.table(scores)))
        terminal.say(terminal.verdict(opened.card.concept["name"], scores))
    if failures := [why for rule in rules if (why := rule.failure(scores))]:
        for why in failures:
            typer.echo(f"gate: {why}", err=True)
        raise typer.Exit(GATE_FAILED)


@app.command()
def report(
    *,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of audited runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one run or several."""
    from .records import Run
    from .report import build
    from .storage import write_atomic

    write_atomic(out, build([Run.open(r) for r in runs]).encode())
    typer.echo(f"Report: {out}")


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods: what each does, needs and cites, its settings and limits."""
    from . import terminal
    from .methods import describe, names

    found = [describe(name) for name in names()]
    _list(found, [line for m in found for line in terminal.method(m)], as_json)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models that need no download, and what else MODEL may be."""
    found = [{"name": name, "about": about, "shipped": True} for name, about in complete.MODELS.items()]
    _list(found, [*(f"{m['name']:<8} {m['about']}" for m in found), complete.FORMS], as_json)


@app.command()
def protocols(as_json: AsJson = False) -> None:
    """List the protocols of `expunge audit`."""
    from . import terminal
    from .protocols import PROTOCOLS

    found = [p.describe() for p in PROTOCOLS.values()]
    _list(found, [line for p in found for line in terminal.listing(p)], as_json)


@app.command()
def cite(
    method: Annotated[str, typer.Argument(help="A method's name.", autocompletion=complete.method_names)],
) -> None:
    """Print the BibTeX entry of a method's paper."""
    from .methods import get

    typer.echo(get(method).paper.bibtex())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine and this installation: versions, devices, memory, disk, cache, weights, missing extras."""
    from .doctor import examine, lines

    found = examine()
    _list(found, lines(found), as_json)


def _list(found: Any, lines: Iterable[str], as_json: bool) -> None:
    typer.echo(json.dumps(found, indent=1, default=str) if as_json else "\n".join(lines))


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
    details: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Edit:
    """Check what can be checked at once, then load, then erase with a bar."""
    from . import flags, terminal
    from .methods import METHODS, get
    from .records import need_empty

    chosen: dict[str, Any] = flags.recipe(recipe) if recipe else {}
    name = method or str(chosen.get("method", complete.DEFAULT))
    given = {k: v for k, v in chosen.items() if k != "method"} | flags.parse(settings or ())
    if name not in METHODS:
        raise SettingError(f"unknown method {name!r}. Methods: {', '.join(METHODS)}.{nearest(name, METHODS)}")
    concepts = _concepts(names, kind, details or {}, _known_world(model))
    if not resume:
        need_empty(out)
    target = _device(device)
    built = flags.build(get(name), given)
    from .backbones import load
    from .door import erase as through

    loaded = load(model, device=target, **options or {})
    terminal.say(*terminal.plan(model, concepts, built, out, seed))
    with terminal.bars() as tick:
        return through(loaded, concepts, built, seed=seed, out=out, resume=resume, progress=terminal.steps(tick))


def _known_world(model: str) -> Any:
    """Return the shipped world without loading its weights: a wrong concept is told in a moment, not after seconds."""
    from .zoo.emoji import world

    # without the shipped weights `load` says so, which is the better message
    return world.world() if model == "emoji" and (world.WEIGHTS / "model_index.json").is_file() else None


def _concepts(names: list[str], kind: str, details: dict[str, Any], world: Any) -> list[Concept]:
    from .concept import Concept

    given = [f"--{k}" for k in ("images", "embedding") if details.get(k)]
    if given and len(names) > 1:
        raise ConceptError(
            f"{' and '.join(given)} show one concept, and {len(names)} are given: {', '.join(names)}. Give one "
            f"--concept with {given[0]}, and erase the others in runs of their own, or from Python."
        )
    styles = [n for n in names if world and world.canonical(n) in world.styles]
    kinds: list[Any] = [kind or ("style" if n in styles else "object") for n in names]
    found = [Concept(n, kind=k, **details) for n, k in zip(names, kinds, strict=True)]
    for concept in found:
        concept.check(world)
    return found


def _device(wanted: str) -> str:
    """Return the device to use; "auto" takes the fastest there is.

    Raises:
        SettingError: unknown, or not on this machine.
    """
    if wanted not in DEVICES:
        raise SettingError(f"unknown device {wanted!r}. Devices: {', '.join(DEVICES)}.{nearest(wanted, DEVICES)}")
    if wanted == "cpu":
        return wanted
    import torch

    known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [name for name, is_here in known.items() if is_here]
    if wanted not in ("auto", *here):
        raise SettingError(f"there is no {wanted} device here. Devices here: {', '.join(here)}.")
    return here[0] if wanted == "auto" else wanted


def _show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, ExpungeWarning):
        typer.echo(f"warning: {message}", err=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (2: expected error, 3: gate failed, 130: interrupted)."""
    # they log through their own handlers, past Python's warnings; what matters of it we say ourselves
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # short spins: docs/dev/log.md, "Threads"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ExpungeWarning)
        warnings.showwarning = _show
        try:
            app(arguments, prog_name="expunge")
        except ExpungeError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            return EXPECTED_ERROR
        except SystemExit as end:
            if end.code == INTERRUPTED:
                typer.echo("interrupted; an erasure goes on with the same command and --resume", err=True)
            return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
