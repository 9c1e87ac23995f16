"""The benchmark of speed: what the plain loop holds and sees, and the rows of its file."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from expunge.backbones import tiny
from expunge.backbones.unet import UNetModel
from expunge.bench import speed
from expunge.errors import Unsupported

WINDOW = 64
UPDATES = 2


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> UNetModel:
    """A tiny model whose window holds the benchmark's prompts; every cell loads one like it."""
    monkeypatch.setattr(speed, "load", lambda _: tiny.model(window=WINDOW))
    return tiny.model(window=WINDOW)


@pytest.mark.parametrize("method", speed.METHODS)
def test_the_plain_loop_holds_two_networks_and_learns_from_a_sample_an_update(
    model: UNetModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    copies, called, learned = list[nn.Module](), set[int](), list[int]()
    before, plain_call = copy.deepcopy(model.denoiser.module.state_dict()), model.denoiser.call

    def kept(module: nn.Module) -> nn.Module:
        copies.append(copy.deepcopy(module))
        return copies[-1]

    def call(module: nn.Module, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        called.add(id(module))
        if torch.is_grad_enabled():
            learned.append(len(x))
        return plain_call(module, x, *rest)

    monkeypatch.setattr(speed, "copy", SimpleNamespace(deepcopy=kept))
    model.denoiser.call = call
    assert speed.plain(model, method, UPDATES) == UPDATES
    assert learned == [1] * UPDATES
    assert len(copies) == 1
    assert called == {id(model.denoiser.module), id(copies[0])}
    trained = {n for n, p in model.denoiser.module.named_parameters() if not torch.equal(p, before[n])}
    assert trained
    assert all("attn2" in n for n in trained)
    # ESD's second network is the original, SDD's follows the student
    assert {n for n, p in copies[0].named_parameters() if not torch.equal(p, before[n])} == (
        trained if method == "sdd" else set()
    )


def test_every_cell_is_a_row_and_the_plain_loop_is_what_the_others_are_compared_with(
    model: UNetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, told = list[list[str]](), list[str]()

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command[1:])
        name, kind, method, updates = command[3:]
        found = json.dumps(speed.cell(name, kind, method, int(updates)))
        return SimpleNamespace(returncode=0, stdout=f"a line\n{found}")

    memory = iter(range(0, 10_000, 7))
    monkeypatch.setattr(speed, "resident", lambda: float(next(memory)))
    monkeypatch.setattr(subprocess, "run", run)
    rows = speed.measure(model.name, UPDATES, tmp_path / "speed.json", told.append)
    assert json.loads((tmp_path / "speed.json").read_text()) == rows
    assert list(rows) == [f"{method} {kind}" for method in speed.METHODS for kind in speed.KINDS]
    assert commands[1] == ["-m", "expunge.bench.speed", "tiny", "ours", "esd", str(UPDATES)]
    assert len(told) == len(rows)
    plain, ours, single = ({"seconds_per_update", "seconds_per_sample", "mb_above_model"} for _ in speed.KINDS)
    for fields in (ours, single):
        fields |= {"speedup_per_sample", "memory_ratio"}
    assert [row.keys() for row in rows.values()] == [plain, ours, single] * len(speed.METHODS)
    for method in speed.METHODS:
        base, other, one = (rows[f"{method} {kind}"] for kind in speed.KINDS)
        # a sample an update: the plain loop and ours of batch 1; ours as it is sees more
        assert base["seconds_per_update"] == base["seconds_per_sample"]
        assert one["seconds_per_update"] == one["seconds_per_sample"]
        assert other["seconds_per_update"] > other["seconds_per_sample"]
        assert one["speedup_per_sample"] == base["seconds_per_sample"] / one["seconds_per_sample"]
        assert one["memory_ratio"] == 1.0


def test_a_cell_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nBadModel: no such thing")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Unsupported, match="the cell esd plain .* failed on 'nothing': BadModel: no such thing"):
        speed.measure("nothing", 1, tmp_path / "speed.json", print)
    assert not (tmp_path / "speed.json").exists()
