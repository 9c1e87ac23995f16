"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import complete, devices

DEVICES, resolve = devices.DEVICES, devices.resolve

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="One of `expunge models`, a diffusers folder, a hub id, a .safetensors checkpoint, or the run of a "
        "one-step generator.",
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
Protocol = Annotated[
    str,
    typer.Option(
        help="One of `expunge protocols`; default: that of the model's world.", autocompletion=complete.protocols
    ),
]
Seed = Annotated[int, typer.Option(help="Two runs with one seed give the same edit.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=lambda: list(DEVICES))]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")]
KeepState = Annotated[
    bool, typer.Option("--keep-state", help="Keep what a finished run of sfd needs to go on to more steps.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Config = Annotated[Path | None, typer.Option(help="Configuration folder of a single-file checkpoint.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled checkpoints, which can run any code.")]
