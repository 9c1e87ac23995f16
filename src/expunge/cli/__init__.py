"""The command line. Torch and diffusers are imported inside commands, so that `--help` is instant."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import ExpungeError, ExpungeWarning
from . import bench
from .audit import audit, report
from .distill import distill
from .erase import demo, erase
from .feedback import feedback
from .generate import generate
from .lists import cite, doctor, methods, models, protocols
from .rate import rate
from .sae import sae

EXPECTED_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="expunge",
    help="Erase concepts from diffusion models, prove it, report it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


# in the order of `expunge --help`
for command in (
    *(demo, erase, distill, generate, audit, report, rate, feedback, sae),
    *(methods, models, protocols, cite, doctor),
):
    app.command()(command)
app.add_typer(bench.app, name="bench")


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
                typer.echo("interrupted; commands that have --resume go on with it where they were", err=True)
            return int(end.code or 0)
    return 0
