"""Checkpoints: any nested state comes back as it was, types and all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import checkpoint
from expunge.errors import BadRun


def test_round_trip(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    state: dict[str, Any] = {
        "adam": {0: {"step": torch.tensor(3.0), "m": base.view(2, 3).T}, 1: {}},
        "views": [base[:3], base[3:], base],
        "pair": (1, None, True, "x", 0.1 + 0.2),
        "odd": [math.inf, -math.inf],
        "tensor": {"tensor": "t0"},
        "generator": torch.Generator().manual_seed(1).get_state(),
        "half": torch.tensor([1.0], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }
    checkpoint.save(tmp_path / "s", state)
    found = checkpoint.load(tmp_path / "s")
    assert str(found) == str(state)
    assert found["pair"] == state["pair"]
    assert torch.equal(found["adam"][0]["m"], state["adam"][0]["m"])
    assert found["half"].dtype == torch.bfloat16


def test_nan_survives_and_is_seen(tmp_path: Path) -> None:
    state = {"x": math.nan, "w": torch.tensor([math.nan])}
    checkpoint.save(tmp_path / "s", state)
    assert math.isnan(checkpoint.load(tmp_path / "s")["x"])
    assert not checkpoint.finite(state)
    assert checkpoint.finite({"w": torch.ones(2), "n": torch.tensor(3)})


def test_strangers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold object"):
        checkpoint.save(tmp_path / "s", {"a": object()})
    assert not (tmp_path / "s").exists()


def test_a_part_is_read_of_the_state_that_was_there_at_first(tmp_path: Path) -> None:
    path = tmp_path / "s"
    checkpoint.save(path, {"n": 1, "fit": {"psi": {"w": torch.ones(2)}, "step": 3}})
    with checkpoint.reading(path) as part:
        assert part("n") == 1
        # a run under way replaces it
        checkpoint.save(path, {"n": 2, "fit": {"psi": {"w": torch.zeros(2)}}})
        assert torch.equal(part("fit", "psi")["w"], torch.ones(2))
        assert (part("fit", "step"), part("fit", "theta"), part("none", "at all")) == (3, None, None)
    assert checkpoint.load(path)["n"] == 2


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"no state")
    with pytest.raises(BadRun, match="cannot be read"), checkpoint.reading(tmp_path / "s"):
        pass
