"""Shape, cost and safety of the judges' networks; their accuracy is measured where they are trained."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from expunge.errors import BadModel
from expunge.judges.classifier import Judge, load_judge, save_judge

OBJECTS, STYLES = 304, 8


@pytest.fixture(params=["a", "b"])
def judge(request):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Judge(request.param, OBJECTS, STYLES).eval()


def pictures(n, seed=0):
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_budget(judge):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        judge(pictures(1))
    assert counter.get_total_flops() <= 48e6
    assert sum(p.numel() for p in judge.parameters()) <= 600_000


def test_shapes(judge):
    objects, styles = judge(pictures(2))
    assert (objects.shape, styles.shape) == ((2, OBJECTS), (2, STYLES))
    assert torch.equal(judge.features(pictures(2)), judge.depths(pictures(2))[-1].mean((2, 3)))


def test_architectures_differ():
    a, b = (set(Judge(arch, 5, 2).state_dict()) for arch in "ab")
    assert a != b


def test_a_reading_does_not_depend_on_the_batch(judge):
    x = pictures(5)
    together, alone = judge.read(x), judge.read(x[3:4])
    assert torch.allclose(together.objects[3], alone.objects[0], atol=1e-6)
    assert torch.allclose(judge.read(x, batch=2).styles, together.styles, atol=1e-6)


def test_a_broken_picture_is_unread_and_spoils_no_other(judge):
    x = pictures(4)
    whole = judge.read(x)
    x[1, 0, 5, 5], x[2, 1] = math.nan, math.inf
    broken = judge.read(x)
    assert broken.object[[1, 2]].tolist() == broken.style[[1, 2]].tolist() == [-1, -1]
    assert broken.confidence.isnan().tolist() == [False, True, True, False]
    assert torch.equal(broken.objects[[0, 3]], whole.objects[[0, 3]])


def test_probability_of_a_name(judge):
    judge.objects = tuple(f"thing {i}" for i in range(OBJECTS))
    x = pictures(2)
    assert torch.allclose(judge.probability(x, "thing 7"), judge.read(x).objects[:, 7])
    with pytest.raises(BadModel, match="unheard"):
        judge.probability(x, "unheard")


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 32, 32)])
def test_other_pictures_are_refused(judge, shape):
    with pytest.raises(BadModel, match="64"):
        judge.read(torch.zeros(shape))


def test_round_trip_keeps_readings_names_and_gives_a_hash(judge, tmp_path):
    judge.objects = tuple(f"thing {i}" for i in range(OBJECTS))
    judge.accuracy = {"object": 0.99}
    save_judge(judge, tmp_path / "j.safetensors")
    loaded = load_judge(tmp_path / "j.safetensors")
    assert (loaded.arch, loaded.objects, loaded.styles) == (judge.arch, judge.objects, judge.styles)
    assert loaded.accuracy == {"object": 0.99}
    assert len(loaded.hash) == 64
    # stored in half precision
    assert torch.allclose(loaded.read(pictures(2)).objects, judge.read(pictures(2)).objects, atol=1e-3)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_missing_cut_off_and_foreign_files_are_refused(judge, tmp_path):
    file = tmp_path / "j.safetensors"
    with pytest.raises(BadModel, match="missing"):
        load_judge(file)
    save_judge(judge, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BadModel, match="damaged"):
        load_judge(file)
    file.write_bytes(b"not a judge")
    with pytest.raises(BadModel, match="damaged"):
        load_judge(file)


def test_unknown_architecture():
    with pytest.raises(BadModel, match="a, b"):
        Judge("c", 2, 2)


def test_it_learns_two_colours(judge):
    x = torch.zeros(8, 3, 64, 64)
    x[:4, 0], x[4:, 2] = 1, 1
    y = torch.tensor([0] * 4 + [1] * 4)
    judge.train()
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    before = judge.read(x).object
    for _ in range(8):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(judge(x)[0], y).backward()
        optimizer.step()
    assert not torch.equal(before, y)
    assert torch.equal(judge.read(x).object, y)
