"""Commands that tell what there is: `methods`, `models`, `protocols`, `cite`, `doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from .. import complete
from .options import AsJson


def methods(as_json: AsJson = False) -> None:
    """List the methods: what each does, needs and cites, its settings and limits."""
    from .. import terminal
    from ..methods import describe, names

    found = [describe(name) for name in names()]
    _list(found, [line for m in found for line in terminal.method(m)], as_json)


def models(as_json: AsJson = False) -> None:
    """List the models that need no download, and what else MODEL may be."""
    found = [{"name": name, "about": about, "shipped": True} for name, about in complete.MODELS.items()]
    _list(found, [*(f"{m['name']:<8} {m['about']}" for m in found), complete.FORMS], as_json)


def protocols(as_json: AsJson = False) -> None:
    """List the protocols of `expunge audit`."""
    from .. import terminal
    from ..protocols import PROTOCOLS

    found = [p.describe() for p in PROTOCOLS.values()]
    _list(found, [line for p in found for line in terminal.listing(p)], as_json)


def cite(
    method: Annotated[str, typer.Argument(help="A method's name, or age, sara.", autocompletion=complete.papers)],
) -> None:
    """Print the BibTeX entry of a method's paper, or of a paper that methods implement by a setting (age, sara)."""
    from ..methods import paper

    typer.echo(paper(method).bibtex())


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine and this installation: versions, devices, memory, disk, cache, weights, missing extras."""
    from ..doctor import examine, lines

    found = examine()
    _list(found, lines(found), as_json)


def _list(found: Any, lines: Iterable[str], as_json: bool) -> None:
    typer.echo(json.dumps(found, indent=1, default=str) if as_json else "\n".join(lines))
