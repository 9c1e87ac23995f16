"""A hub id, without a network: a model that the hub's cache holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from expunge.backbones import load, tiny

COMMIT = "0" * 39 + "1"
CODE = """
import sys
from expunge.backbones import load
from expunge.errors import BadModel
for name in sys.argv[1:]:
    try:
        model = load(name)
        print(name, model.name, model.fingerprint(), *model.generate(["a"], seeds=[0]).shape)
    except BadModel as error:
        print(name, error)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as the hub's client lays it out, with a pipeline in it, and one that lacks a weight."""
    for name in ("tiny", "broken"):
        home = tmp_path / "hub" / f"models--nobody--{name}"
        tiny.save(home / "snapshots" / COMMIT)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)
    (file,) = (home / "snapshots" / COMMIT / "text_encoder").glob("*.safetensors")
    whole = load_file(file)
    whole.pop(next(k for k in whole if "final_layer_norm.weight" in k))
    save_file(whole, file, metadata={"format": "pt"})
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache(cache: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads where its cache is when it is imported."""
    wanted = load(tiny.save(tmp_path / "tiny")).fingerprint()
    done = subprocess.run(
        [sys.executable, "-c", CODE, "nobody/tiny", "nobody/broken", "nobody/else"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    found, broken, missing = done.stdout.splitlines()
    assert found == f"nobody/tiny nobody/tiny {wanted} 1 3 16 16"
    # transformers alone would make the weight up
    assert "lacks 1 weights of its text_encoder" in broken
    assert missing.startswith("nobody/else 'nobody/else' could not be loaded on disk, nor could it be had from the hub")
