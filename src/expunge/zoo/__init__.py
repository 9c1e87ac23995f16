"""Shipped worlds: small models that need no download, each with the recipe that made it."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ExpungeError


def run(app: Callable[[], object]) -> int:
    """Run a recipe's command line; an expected error is one line and exit code 2."""
    import typer

    try:
        app()
    except ExpungeError as error:
        typer.echo(f"error: {error}", err=True)
        return 2
    return 0
