"""Command `erase`: a process that is killed, and `--resume`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from expunge import cli
from expunge.backbones import tiny
from expunge.edits import load_edit
from expunge.records import CARD, CHECKPOINT, Run

pytestmark = pytest.mark.usefixtures("one_thread")
# long enough that nobody who polls misses the middle, and no update is long
UPDATES = 30
SETTINGS = (f"steps={UPDATES}", "batch=1", "rollouts=1", "sampling_steps=2")
PATIENCE = 120.0  # seconds; a machine with other work takes long to import torch


def command(model: Path, out: Path, *options: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("-s", setting)]
    words = ["--concept", "bomb", "--keep", "drum", "--method", "sdd", *settings, "--seed", "3", "--device", "cpu"]
    return ["erase", str(model), *words, "--out", str(out), *options]


def test_a_killed_erasure_goes_on_and_ends_as_if_undisturbed(tmp_path: Path) -> None:
    model, out, calm = tiny.save(tmp_path / "model"), tmp_path / "killed", tmp_path / "calm"
    child = subprocess.Popen(
        [sys.executable, "-m", "expunge", *command(model, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + PATIENCE
    while not (out / CHECKPOINT).exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert (out / CHECKPOINT).exists()
    assert not (out / CARD).exists()
    # without --resume nothing of it is touched
    assert cli.main(command(model, out)) == 2
    assert cli.main(command(model, out, "--resume")) == 0
    assert cli.main(command(model, calm)) == 0
    resumed, undisturbed = (load_edit(Run.open(run).edit_path).tensors() for run in (out, calm))
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(weight, undisturbed[name]) for name, weight in resumed.items())
    assert Run.open(out).card.steps == UPDATES
    assert not (out / CHECKPOINT).exists()
