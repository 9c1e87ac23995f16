"""A look midway: the averaged generator of a run that goes on, as a finished run of its own."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from . import checkpoint
from .door import Drive
from .edits import GeneratorEdit
from .errors import BadRun
from .records import CHECKPOINT, need_empty
from .storage import filling

METHODS = ("sid", "sfd")  # whose checkpoints hold a generator


def snapshot(run: Path | str, out: Path | str) -> GeneratorEdit:
    """Write what a distillation's last checkpoint holds as the finished run of so many updates, bit for bit.

    The run itself is only read, and may go on meanwhile. `expunge.load(out)` is the generator as a model.

    Args:
        run: folder of a distillation, or an erasure by SFD, that is under way, was interrupted, or kept its state.
        out: empty, or not there. It appears whole or not at all; what going on would need is not in it.

    Raises:
        BadRun: `run` holds no generator, or none yet; `out` holds files.
        StorageError: the disk is full.
    """
    run, out = Path(run), Path(out)
    need_empty(out)
    path = run / CHECKPOINT
    if not path.is_file():
        raise BadRun(
            f"{run} holds no state to take a generator from: {CHECKPOINT} is missing. Give the folder of a "
            "distillation that is under way or was interrupted; a finished one is a generator as it is."
        )
    with checkpoint.reading(path) as part:
        request, model, done = part("request"), part("model"), part("done")
        losses, seconds = part("losses"), part("seconds")
        game, weights = part("fit", "game"), part("fit", "ema")
    if request["method"] not in METHODS:
        raise BadRun(
            f"{run} is a run of {request['method']!r}, which makes no generator. Give one of `expunge distill`."
        )
    if game is None or weights is None or model is None:
        raise BadRun(
            f"{run} holds no generator yet: the first checkpoint with one comes some minutes after the start. Wait; if "
            "an older version of expunge began the run, let this one go on with it first (--resume)."
        )
    settings = request["settings"] | {"steps": max(0, done - game["alone"])}
    tensors = {f"{game['component']}.{k}": v for k, v in weights.items()}
    edit = GeneratorEdit.from_tensors(tensors | {"t": torch.tensor(game["t"])}, None)
    with filling(out) as folder:
        drive = Drive(
            request | {"settings": settings}, model, folder, 0.0, None, None, keep_state=False, losses=losses,
            done=done, before=seconds, began=time.monotonic(),
        )  # fmt: skip
        finished = drive.finish(edit, 0)
    assert isinstance(finished, GeneratorEdit)
    return finished
