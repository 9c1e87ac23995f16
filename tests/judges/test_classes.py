"""Judges of labelled pictures: shape, cost, safety, files."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from expunge.errors import BadModel
from expunge.judges.classes import ARCHITECTURES, REAL, ClassJudge, load_judge, load_panel, save_judge, save_real

CLASSES = tuple("abcdefghij")


def build(arch, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ClassJudge(arch, CLASSES).eval()


@pytest.fixture(params=ARCHITECTURES)
def judge(request):
    return build(request.param)


def pictures(n, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_budget(judge):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        judge(pictures(1))
    assert counter.get_total_flops() <= 45e6
    assert sum(p.numel() for p in judge.parameters()) <= 400_000


def test_architectures_differ():
    shapes = [[tuple(p.shape) for p in ClassJudge(a, CLASSES).parameters()] for a in ARCHITECTURES]
    assert len({str(s) for s in shapes}) == 3


def test_readings(judge):
    x = pictures(5)
    together = judge.read(x)
    assert together.shape == (5, 10)
    assert torch.allclose(together.sum(1), torch.ones(5))
    assert torch.allclose(judge.read(x, batch=2), together, atol=1e-6)
    assert judge.describe(x).shape == (5, judge.width)


def test_a_broken_picture_is_unread_and_spoils_no_other(judge):
    x = pictures(4)
    whole, described = judge.read(x), judge.describe(x)
    x[1, 0, 5, 5], x[2, 1] = math.nan, math.inf
    assert judge.read(x).isnan().any(1).tolist() == [False, True, True, False]
    assert torch.equal(judge.read(x)[[0, 3]], whole[[0, 3]])
    assert torch.equal(judge.describe(x)[[0, 3]], described[[0, 3]])


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 32, 32), (3, 32, 32)])
def test_other_shapes_are_refused(judge, shape):
    with pytest.raises(BadModel, match="32, 32"):
        judge.read(torch.zeros(shape))


def test_a_file_comes_back(judge, tmp_path):
    judge.name, judge.accuracy = "n", 0.93
    save_judge(judge, tmp_path / "j.safetensors", {"steps": 5})
    again = load_judge(tmp_path / "j.safetensors")
    assert (again.arch, again.classes, again.name, again.accuracy) == (judge.arch, CLASSES, "n", 0.93)
    assert torch.allclose(again.read(pictures(3)), judge.read(pictures(3)), atol=1e-2)
    assert len(again.hash) == 64


@pytest.fixture
def folder(tmp_path):
    for arch, name in (("b", "judge-b"), ("features", "features")):
        judge = build(arch)
        judge.name = "net64" if arch == "features" else name
        save_judge(judge, tmp_path / f"{name}.safetensors")
    network = load_judge(tmp_path / "features.safetensors")
    save_real(tmp_path / REAL, network.describe(pictures(20)), torch.arange(20) % 10, network)
    return tmp_path


def test_a_panel(folder):
    panel = load_panel(folder, "judge-b", "net64")
    assert (panel.real.shape, panel.labels.tolist()) == ((20, 64), [*range(10)] * 2)
    seen = panel.judge(pictures(3))
    assert torch.allclose(seen.features, panel.real[:3], atol=2e-3)
    assert seen.label.tolist() == panel.scorer.read(pictures(3)).argmax(1).tolist()


def test_what_a_panel_refuses(folder):
    with pytest.raises(BadModel, match="'net64'.*'other64'"):
        load_panel(folder, "judge-b", "other64")
    with pytest.raises(BadModel, match="protocol was made with 0000"):
        load_panel(folder, "judge-b", "net64", (("judge-b", "0" * 64),))
    with pytest.raises(BadModel, match=r"judge-a.safetensors is missing.*expunge.zoo.fashion"):
        load_panel(folder, "judge-a", "net64")
    (folder / "judge-b.safetensors").write_bytes((folder / "judge-b.safetensors").read_bytes()[:500])
    with pytest.raises(BadModel, match="damaged"):
        load_panel(folder, "judge-b", "net64")
    save_file({"x": torch.zeros(1)}, folder / "judge-b.safetensors")
    with pytest.raises(BadModel, match="not a judge of classes"):
        load_panel(folder, "judge-b", "net64")


def test_an_unknown_architecture():
    with pytest.raises(BadModel, match="'c' is not known"):
        ClassJudge("c", CLASSES)
