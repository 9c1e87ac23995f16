import math

import pytest
import torch

from expunge.errors import BadModel
from expunge.judges.classifier import Judge, save_judge
from expunge.judges.clip import load_clip
from expunge.judges.panel import Panel, load_panel
from expunge.zoo.emoji.world import WEIGHTS


@pytest.fixture
def folder(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for arch in "ab":
            save_judge(Judge(arch, 4, 2), tmp_path / f"judge-{arch}.safetensors")
    return tmp_path


def test_panel_measures_everything_and_marks_a_broken_picture(folder):
    panel = load_panel(folder, "judge-b", "judge-a")
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = panel.judge(x, panel.texts(["x"] * 3))
    x[1] = math.nan
    broken = panel.judge(x, panel.texts(["x"] * 3))
    assert (panel.scorer.arch, panel.trunk.arch, panel.clip) == ("b", "a", None)
    for before, after in ((whole.features, broken.features), *zip(whole.depths, broken.depths, strict=True)):
        assert before.isfinite().all()
        assert after[1].isnan().all()
        assert torch.allclose(after[[0, 2]], before[[0, 2]], atol=1e-5)
    assert whole.cosines.isnan().all()


class Words:
    """Towers in which a picture's brightness must match the length of its prompt."""

    def images(self, images):
        return images.mean((1, 2, 3))[:, None] * torch.tensor([[1.0, 0.0]])

    def texts(self, prompts):
        return torch.tensor([[float(len(p)), 0.0] for p in prompts])


def test_towers_give_cosines_except_of_broken_pictures(folder):
    panel = load_panel(folder, "judge-b", "judge-a")
    x = torch.ones(2, 3, 64, 64)
    x[1] = math.nan
    panel = Panel(panel.scorer, panel.trunk, Words())
    cosines = panel.judge(x, panel.texts(["one", "two"])).cosines
    assert cosines[0] == 1
    assert cosines[1].isnan()


def test_a_pinned_judge_must_be_that_one(folder):
    true = load_panel(folder, "judge-b", "judge-a").scorer.hash
    assert load_panel(folder, "judge-b", "judge-a", (("judge-b", true),)).scorer.hash == true
    with pytest.raises(BadModel, match="comparable"):
        load_panel(folder, "judge-b", "judge-a", (("judge-b", "0" * 64),))


def test_pinned_towers_must_be_those():
    clip = load_clip(WEIGHTS)
    assert load_panel(WEIGHTS, "judge-b", "judge-a", (("clip", clip.hash),)).clip.hash == clip.hash
    with pytest.raises(BadModel, match="clip in .* comparable"):
        load_panel(WEIGHTS, "judge-b", "judge-a", (("clip", "0" * 64),))


def test_clip_may_be_absent_but_not_half_there(tmp_path):
    assert load_clip(tmp_path) is None
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text("{}")
    with pytest.raises(BadModel, match="Reinstall"):
        load_clip(tmp_path)
