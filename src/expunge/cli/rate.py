"""Command `rate`."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import complete
from ..errors import NeedsError, SettingError
from .options import DEVICES, Device

if TYPE_CHECKING:
    from ..feedback import Study
    from ..feedback.plan import Plan

LOOPBACK = "127.0.0.1"
PORT = "port"  # a note of the study
RATERS = 3
# what a command that only goes on with a study need not say of it
UNSAID = {"concept": "", "ask": "", "pairs": False, "blur": False, "wanted": RATERS, "seed": 0}
NAMES = {"ask": "question", "wanted": "number of raters"}


def rate(
    *,
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="What draws the pictures.", autocompletion=complete.models)
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder of the study: a new one, or one to go on with.")],
    concept: Annotated[str, typer.Option(help="What to look for; prompts are made from it.")] = "",
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder of PNGs to rate; no model is needed.")] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, max=10_000, help="Pictures to draw.")] = 60,
    ask: Annotated[str, typer.Option(help="The question raters read; default: from the concept.")] = "",
    raters: Annotated[int, typer.Option(min=1, max=1000, help="People who shall rate everything.")] = RATERS,
    pairs: Annotated[bool, typer.Option("--pairs", help="Let raters pick the worse of two pictures.")] = False,
    blur: Annotated[bool, typer.Option("--blur", help="Blur pictures until they are pointed at.")] = False,
    seed: Annotated[int, typer.Option(help="Decides every rater's order.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="Guidance scale.")] = None,
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes the last one again, or a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
) -> None:
    """Let people rate pictures in a browser; pictures are drawn while they rate. The same command goes on later."""
    from ..feedback import Study
    from ..feedback.plan import fill
    from ..feedback.study import DATABASE

    server = _web()
    if device not in DEVICES:
        raise SettingError(f"unknown device {device!r}. Devices: {', '.join(DEVICES)}.")
    about = {"concept": concept, "ask": ask, "pairs": pairs, "blur": blur, "wanted": raters, "seed": seed}
    sampling = {"steps": steps, "guidance": guidance}
    new = not (out / DATABASE).is_file()
    plan = _plan(model, concept, prompts, pictures, number, sampling, new)
    if new and plan:
        study = Study.create(out, plan.planned, files=plan.files, source=plan.source, **about)  # type: ignore[arg-type]
    else:
        study = Study.open(out)
    with study:
        if model and model != study.source.get("model"):
            raise SettingError(f"the pictures of {out} come from {study.source}, not from {model!r}.")
        if not new:
            _check_same(study, plan, about, sampling)
        fill(study)
        token = server.secret(out)
        with _listening(study, host, port) as sock:
            address = server.address(sock, token)
            _tell(study, address, drawn=bool(model), open_to_others=host not in server.LOOPBACK)
            if browser:
                webbrowser.open(address)
            # the server ends in good order, then lets the interrupt go on
            with suppress(KeyboardInterrupt), _drawing(study, device if model else ""):
                server.serve(study, sock, token)
        typer.echo(f"Stopped. {len(study.ratings())} ratings in {out}; the same command goes on.", err=True)


def _web() -> Any:
    try:
        from ..feedback import server
    except ModuleNotFoundError as error:
        raise NeedsError(
            f"the rating page needs {error.name}, which is not installed. Install it: pip install 'expunge[web]'."
        ) from error
    return server


def _plan(
    model: str,
    concept: str,
    prompts: Path | None,
    pictures: Path | None,
    number: int,
    sampling: dict[str, Any],
    new: bool,
) -> Plan | None:
    """Return what the study shall hold; None where the command only goes on with one."""
    from ..feedback import plan
    from .erase import _known_world

    if pictures and (model or prompts or any(v is not None for v in sampling.values())):
        raise SettingError(
            f"the pictures are in {pictures}, so give neither MODEL nor --prompts, --steps or --guidance."
        )
    if pictures:
        return plan.of_folder(pictures)
    if not (prompts or concept):
        if new:
            raise SettingError("there is nothing to rate. Give MODEL and --prompts or --concept, or --pictures.")
        return None
    if not model:
        raise SettingError("no MODEL to draw with. Give one, such as emoji, or a folder of --pictures.")
    world = _known_world(model)
    asked = plan.of_prompts(plan.read_prompts(prompts), number) if prompts else plan.of_concept(concept, world, number)
    return plan.Plan(asked, source={"model": model, **sampling})


def _check_same(study: Study, plan: Plan | None, about: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Check that whatever a command says of its study is so of the one that is there."""
    said = {k: v for k, v in about.items() if v != UNSAID[k] or (plan and k != "ask")}
    found = {k: vars(study)[k] for k in about}
    if plan:
        said |= {"source": plan.source, "prompts or seeds": plan.planned}
        found |= {"source": study.source, "prompts or seeds": [(p.prompt, p.seed) for p in study.pictures()]}
    else:
        said |= {k: v for k, v in sampling.items() if v is not None}
        found |= {k: study.source.get(k) for k in sampling}
    if other := [NAMES.get(k, k) for k, v in said.items() if found[k] != v]:
        raise SettingError(
            f"{study.folder} holds a study with another {' and '.join(other)}. Choose another --out or, to go on with "
            "that study, give its MODEL and --out only."
        )


def _listening(study: Study, host: str, port: int) -> socket.socket:
    """Return a listening socket; without a port to take, at the study's last one, so that open pages go on."""
    from ..feedback import server

    sock, last = None, study.noted(PORT)
    if not port and last:
        with suppress(SettingError):  # somebody else has it now
            sock = server.listen(host, last)
    sock = sock or server.listen(host, port)
    study.note(PORT, sock.getsockname()[1])
    return sock


def _tell(study: Study, address: str, *, drawn: bool, open_to_others: bool) -> None:
    from .. import terminal

    progress = study.progress()
    terminal.say(f"Study    {progress.items} {'pairs' if study.pairs else 'pictures'}: {study.ask}")
    if not drawn and progress.drawn < progress.pictures:
        terminal.say(f"Missing  {progress.pictures - progress.drawn} pictures are not drawn yet; give MODEL to go on.")
    if open_to_others:
        terminal.say("Note     whoever has this address can rate, and it travels unencrypted: trusted networks only.")
    terminal.say("Ends     with Ctrl+C; every answer is stored at once.")
    typer.echo(f"Open     {address}")


@contextmanager
def _drawing(study: Study, device: str) -> Iterator[None]:
    """Draw what is missing in a process of its own, as long as the server runs; "" draws nothing."""
    from ..feedback.study import STOPPED

    study.note(STOPPED, None)
    if not device or all(p.drawn for p in study.pictures()):
        yield
        return
    command = [sys.executable, "-m", "expunge.cli.draw", str(study.folder), device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        ends = threading.Event()

        def watch() -> None:
            if child.wait() and not ends.is_set() and not study.noted(STOPPED):
                # killed, so it could not say so itself
                typer.echo(f"error: no more pictures are drawn: the process ended with {child.returncode}", err=True)
                study.note(STOPPED, True)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ends.set()
            child.terminate()
            watcher.join()
