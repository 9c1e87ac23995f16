"""Pictures that are drawn while people rate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from expunge import backbones
from expunge import draw as drawing
from expunge.cli.draw import work
from expunge.cli.rate import _drawing
from expunge.feedback import Study
from expunge.feedback.study import STOPPED


class Painter:
    """Draws each picture in one colour, which its prompt and seed decide."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, *, seeds, steps, guidance):
        self.asked.append((list(prompts), list(seeds), steps, guidance))
        shades = torch.tensor([(len(p) + 10 * s) / 255 for p, s in zip(prompts, seeds, strict=True)])
        return shades[:, None, None, None].expand(-1, 3, 16, 16)


def test_what_is_missing_is_drawn_in_order_and_can_be_rated(make_study):
    study = make_study(20, drawn=3, source={"model": "toy", "steps": 7})
    painter = Painter()
    assert drawing.draw(study, painter) == 17
    assert [i for _, seeds, *_ in painter.asked for i in seeds] == list(range(4, 21))
    assert max(len(seeds) for _, seeds, *_ in painter.asked) == drawing.BATCH
    assert painter.asked[0][2:] == (7, None)
    assert study.progress().ready == 20
    with Image.open(study.path(12)) as image:
        assert image.getpixel((0, 0)) == (9 + 120,) * 3
        # raters judge by looks
        assert image.info == {}
    assert drawing.draw(study, painter) == 0


def test_pictures_come_one_after_the_other(make_study):
    study, seen = make_study(12, drawn=0), []

    class Watched(Painter):
        def generate(self, prompts, **options):
            seen.append(study.progress().drawn)
            return super().generate(prompts, **options)

    drawing.draw(study, Watched())
    assert seen == [0, 8]


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_process_of_its_own_draws_and_dies_with_the_server(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "expunge.cli", "rate", "tiny", "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--out", str(folder), "-n", "5000", "--steps", "1", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout.readline().startswith("Open ")
        with Study.open(folder) as study:
            until(lambda: study.progress().ready >= 8)
            (child,) = children(server.pid)
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
            until(lambda: not alive(child), 10)
            assert study.progress().drawn < 5000


def test_what_goes_wrong_is_told_in_the_terminal_and_that_it_did_on_the_page(make_study, monkeypatch, capsys):
    study = make_study(3, drawn=1, source={"model": "no-such-model"})
    assert work(study, "cpu") == 2
    assert study.noted(STOPPED)
    assert "error: no pictures are drawn: there is no model at 'no-such-model'" in capsys.readouterr().err

    monkeypatch.setattr(backbones, "load", lambda *_, **__: Painter())
    study = make_study(3, drawn=1, name="good", source={"model": "toy"})
    assert work(study, "cpu") == 0
    assert not study.noted(STOPPED)
    assert study.progress().drawn == 3

    broken = make_study(1, drawn=0, name="broken", source={"model": "toy"})
    monkeypatch.setattr(Painter, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        work(broken, "cpu")
    assert broken.noted(STOPPED)


@pytest.mark.parametrize(
    ("code", "told"), [("import os; os.kill(os.getpid(), 9)", True), ("raise SystemExit(0)", False)]
)
def test_a_process_that_is_killed_is_told_of(make_study, monkeypatch, capsys, code, told):
    study = make_study(3, drawn=1, source={"model": "toy"})
    study.note(STOPPED, True)  # of an earlier run
    start = subprocess.Popen

    def instead(command, **options):
        return start([sys.executable, "-S", "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", instead)
    with _drawing(study, "cpu"):
        time.sleep(0.5) if not told else until(lambda: study.noted(STOPPED), 20)
    assert bool(study.noted(STOPPED)) == told
    assert ("no more pictures are drawn: the process ended with -9" in capsys.readouterr().err) == told
