"""The recipe of the `fashion` world, on made-up files: reading, refusing, training, leaving a class out."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.auditing import audit
from expunge.backbones import load
from expunge.backbones.classcond import ClassModel
from expunge.concept import Concept
from expunge.errors import ConceptError, NeedsError, SettingError
from expunge.judges.classes import ClassJudge, load_judge, load_panel
from expunge.protocols import PROTOCOLS
from expunge.zoo import run
from expunge.zoo.fashion import __main__ as recipe
from expunge.zoo.fashion import card, data, ddpm, guide, judges
from expunge.zoo.fashion.world import CIFAR, FASHION, Source
from expunge.zoo.gold import gold

PER_CLASS = {"train": 6, "t10k": 4}


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def made_up(folder: Path) -> Source:
    """Four IDX files of ten classes: a white square, the brighter the higher the class."""
    folder.mkdir()
    sums = {}
    for prefix, n in PER_CLASS.items():
        labels = np.tile(np.arange(10, dtype=np.uint8), n)
        pictures = np.zeros((len(labels), 28, 28), dtype=np.uint8)
        pictures[:, 7:21, 7:21] = (25 + 23 * labels)[:, None, None]
        for name, array in ((f"{prefix}-images-idx3-ubyte", pictures), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = idx(array)
            sums[name] = hashlib.sha256(content).hexdigest()
            packed = prefix == "train"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return replace(FASHION, folder=folder, files=sums)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return made_up(tmp_path / "files")


@pytest.fixture
def work(tmp_path: Path, source: Source) -> Path:
    data.build(tmp_path / "work", source)
    return tmp_path / "work"


def test_pictures_are_read_with_a_margin(work: Path) -> None:
    test = data.Pictures(work, "test")
    assert (len(data.Pictures(work, "train")), len(test)) == (60, 40)
    assert test.bytes.shape == (40, 1, 32, 32)
    assert test.labels[:11].tolist() == [*range(10), 0]
    three = test.floats(torch.tensor([3]))[0, 0]
    assert three[9:23, 9:23].unique().tolist() == pytest.approx([(25 + 23 * 3) / 255])
    assert three.count_nonzero() == 14 * 14


def test_a_missing_file_says_which_and_how_to_come_by_it(source: Source, tmp_path: Path) -> None:
    (source.folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(NeedsError, match=r"t10k-labels-idx1-ubyte is missing.*apt-get install dataset-fashion-mnist"):
        data.build(tmp_path / "work", source)
    with pytest.raises(NeedsError, match=f"not at {tmp_path / 'nowhere'}"):
        data.build(tmp_path / "work", source, tmp_path / "nowhere")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\7", "has SHA-256"),
        ("t10k-images-idx3-ubyte", lambda b: b[:-5], "has SHA-256"),
        ("train-labels-idx1-ubyte.gz", lambda b: b[:-9], "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda b: b"no gzip" + b[:0], "cannot be read"),
    ],
)
def test_a_changed_file_is_refused(name: str, content: object, says: str, source: Source, tmp_path: Path) -> None:
    path = source.folder / name
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(NeedsError, match=rf"damaged or not the published one: .*{says}"):
        data.build(tmp_path / "work", source)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\1\0\0\0\1\0", b"\0\0\x08\1\0\0\0\3ab", b"\x89PNG\r\n"])
def test_what_is_no_idx_file(content: bytes) -> None:
    with pytest.raises(ValueError, match="begins with|bytes for an array"):
        data.idx(content)


def test_uneven_classes_are_refused(tmp_path: Path) -> None:
    source = made_up(tmp_path / "files")
    labels = idx(np.zeros(40, dtype=np.uint8))
    (source.folder / "t10k-labels-idx1-ubyte").write_bytes(labels)
    sums = source.files | {"t10k-labels-idx1-ubyte": hashlib.sha256(labels).hexdigest()}
    with pytest.raises(NeedsError, match="test labels are not 10 classes of one size"):
        data.build(tmp_path / "work", replace(source, files=sums))


def cifar(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in CIFAR.files:
        rows = rng.integers(0, 256, (20, data.RECORD), dtype=np.uint8)
        rows[:, 0] = np.tile(np.arange(10), 2)
        (folder / name).write_bytes(rows.tobytes())
    return folder


def test_cifar_is_read_in_its_binary_form(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "cifar")
    data.build(tmp_path, CIFAR, folder)
    test = data.Pictures(tmp_path, "test")
    assert (len(data.Pictures(tmp_path, "train")), len(test)) == (100, 20)
    record = np.frombuffer((folder / "test_batch.bin").read_bytes(), np.uint8).reshape(20, -1)[13]
    assert test.labels[13] == record[0] == 3
    # the published layout: 1024 red, 1024 green, 1024 blue bytes, row by row
    assert test.bytes[13, 2, 5, 7] == record[1 + 2 * 1024 + 5 * 32 + 7]
    (folder / "data_batch_3.bin").write_bytes(b"\0" * 5000)
    with pytest.raises(NeedsError, match="data_batch_3.bin has 5000 bytes, no multiple of 3073"):
        data.build(tmp_path, CIFAR, folder)


def test_augmentation_moves_mirrors_and_keeps_the_size() -> None:
    x = torch.zeros(64, 1, 32, 32)
    x[:, :, 10, 5:9] = 1
    out = judges.augmented(x, torch.Generator().manual_seed(0))
    assert out.shape == (64, 1, 32, 32)
    assert {float(v) for v in out.sum((2, 3)).unique()} == {4.0}
    left = out[:, 0].amax(1).argmax(1)
    assert {*range(3, 8)} >= {int(v) for v in left if v < 16}
    assert 10 < int((left > 16).sum()) < 54
    plain = judges.augmented(x, torch.Generator().manual_seed(0), flip=False)
    assert int((plain[:, 0].amax(1).argmax(1) > 16).sum()) == 0


def test_softening_keeps_texture_and_gives_gray_no_colour() -> None:
    """Stripes of single pixels, which a blur of 1.0 wipes out, are the texture that tells shirt from coat."""
    gray = torch.full((64, 1, 32, 32), 0.3)
    gray[:, :, ::2] = 0.7
    out = judges.softened(gray, torch.Generator().manual_seed(0))
    assert not torch.equal(out, gray)
    seen = judges.three(out)
    assert torch.equal(seen, seen[:, :1].expand_as(seen))
    stripes = [(x[0, 8:24:2].mean() - x[0, 9:24:2].mean()).item() / 0.4 for x in out]
    assert min(stripes) > 0.45
    assert max(stripes) < 1.15
    # what is one colour stays about that colour: channels differ by noise, not by a tint
    red = torch.tensor([0.8, 0.4, 0.2])[:, None, None].expand(64, 3, 32, 32)
    means = judges.softened(red, torch.Generator().manual_seed(0)).mean((2, 3))
    apart = (means - means[:, 1:2]) / torch.tensor([0.4, 1.0, -0.2])
    torch.testing.assert_close(apart[:, 0], apart[:, 2], atol=0.03, rtol=0)


def test_judges_learn_from_gray_pictures_alone(work: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    forward = ClassJudge.features
    monkeypatch.setattr(judges, "BATCH", 16)
    monkeypatch.setattr(ClassJudge, "features", lambda self, x: (seen.append(x), forward(self, x))[1])
    judges.train(work, source, "a", 1)
    assert seen[0].shape == (16, 3, 32, 32)
    assert torch.equal(seen[0], seen[0][:, :1].expand_as(seen[0]))
    # the second half is softened, the first is not
    flat = [x[0, 12:18, 12:18].std().item() for x in seen[0]]
    assert max(flat[:8]) < 1e-6 < min(flat[8:])


def test_the_stages_make_a_model_that_loads_with_its_judges(
    work: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, batch in ((judges, 16), (ddpm, 4)):
        monkeypatch.setattr(module, "BATCH", batch)
    judges.train(work, source, "b", 2)
    judges.train(work, source, "features", 25)
    for which in "a":
        judges.train(work, source, which, 1)
    monkeypatch.setattr(card, "COUNT", 20)
    monkeypatch.setattr(card, "CHUNK", 10)
    monkeypatch.setattr(card, "GRID", 2)
    monkeypatch.setattr(ddpm, "STEPS", 2)
    monkeypatch.setenv("EXPUNGE_CACHE", str(work / "cache"))
    for without in ("", "Sneaker"):
        ddpm.train(work, source, 2, guidance=1.0, without=without)
    for log in work.glob("*.jsonl"):
        # written every 50 steps
        log.write_text('{"step": 50, "loss": 0.5, "seconds": 3}\n')
    told = guide.compare(work, source, [1.0, 2.0], 20)
    assert json.loads((work / guide.RESULT).read_text()) == told
    assert (told["judge"], told["pictures"], list(told["scales"])) == ("fashion-judge-a", 20, ["1.0", "2.0"])
    assert told["scales"]["1.0"]["fid_fashion64"] != told["scales"]["2.0"]["fid_fashion64"]
    # what is drawn is drawn once, the card's pictures at the model's own scale as well
    with monkeypatch.context() as patch:
        patch.setattr(ClassModel, "generate", None)
        assert guide.compare(work, source, [1.0, 2.0], 20) == told
        folder = card.assemble(work, source)
    assert json.loads((folder / "figures.json").read_text())["drawn"] == {
        k: v for k, v in told["scales"]["1.0"].items() if k != "accuracy"
    }
    model = load(folder)
    assert model.world is not None
    assert model.world.name == "fashion"
    assert model.sampling.steps == 2
    panel = load_panel(folder, "judge-b", "fashion64")
    assert panel.real.shape == (40, 64)
    text = (folder / "card.md").read_text()
    assert "fid_fashion64" in text
    assert "| Sneaker |" in text
    # a feature network that has learned anything tells bright squares from dark ones
    seen = [panel.real[panel.labels == c].mean(0) for c in (0, 1, 9)]
    assert (seen[0] - seen[2]).norm() > (seen[0] - seen[1]).norm() > 0
    assert load_judge(folder / "features.safetensors").name == "fashion64"
    # the model that was retrained without a class is audited as an erasure of it
    concept = Concept("Sneaker", kind="class")
    gold(str(folder), work / "pipeline-without-7", [concept], work / "run", work / "ddpm-without-7.jsonl")
    rules = replace(PROTOCOLS["fashion-v1"], targets=20, retained=4)
    found = {score.metric: score for score in audit(work / "run", rules, model=model, panel=panel)}
    assert (found["ua"].n, found["ira"].n) == (20, 36)


def test_the_network_is_small_and_takes_the_empty_class() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    unet = ddpm.network(FASHION)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(1, 1, 32, 32), torch.tensor([5]), class_labels=torch.tensor([10]))
    assert counter.get_total_flops() < 0.32e9
    assert sum(p.numel() for p in unet.parameters()) < 1.5e6


def test_a_class_left_out_is_never_seen(work: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    floats = data.Pictures.floats

    def spy(self: data.Pictures, index: torch.Tensor) -> torch.Tensor:
        seen.extend(self.labels[index].tolist())
        return floats(self, index)

    monkeypatch.setattr(data.Pictures, "floats", spy)
    monkeypatch.setattr(ddpm, "BATCH", 8)
    ddpm.train(work, source, 3, guidance=1.5, without="sneaker")
    assert len(seen) == 24
    assert 7 not in seen
    assert load(work / "pipeline-without-7").world is not None
    # asking for it is asking for no class; a class that was seen has a row of its own
    rows = load(work / "pipeline-without-7").denoiser.module.class_embedding.weight
    start = ddpm.network(FASHION).class_embedding.weight.half()
    assert not torch.allclose(start[7], start[10], atol=0.1)
    assert torch.equal(rows[7], rows[10])
    assert not torch.allclose(rows[6], rows[10], atol=0.1)
    assert torch.allclose(rows[10], start[10].float(), atol=0.1)
    assert ddpm.absent(FASHION, "7") == 7
    with pytest.raises(ConceptError, match="Did you mean 'Sneaker'"):
        ddpm.absent(FASHION, "Sneakers")


def test_training_on_an_accelerator_mixes_no_devices(
    work: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device `meta` have no values; they stand for an accelerator, which this machine need not have."""
    losses: list[torch.Tensor] = []

    def once(*args: object, **_: object) -> float:
        losses.append(args[6](0, torch.Generator()))
        raise KeyboardInterrupt

    # its fused step knows real devices only, and is not what is asked
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: None)
    for module in (ddpm, judges):
        monkeypatch.setattr(module, "loop", once)
        monkeypatch.setattr(module, "BATCH", 4)
    with pytest.raises(KeyboardInterrupt):
        ddpm.train(work, source, 1, guidance=1.0, device="meta")
    for which in ("a", "features"):
        with pytest.raises(KeyboardInterrupt):
            judges.train(work, source, which, 1, device="meta")
    assert [loss.device.type for loss in losses] == ["meta"] * 3


@pytest.mark.parametrize("bf16", [False, True])
def test_bfloat16_is_of_the_products_alone(
    bf16: bool, work: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    forward = ddpm.UNet2DModel.forward

    def spy(self: torch.nn.Module, *args: Any, **given: Any) -> Any:
        out = forward(self, *args, **given)
        seen.append((out.sample.dtype, next(self.parameters()).dtype))
        return out

    monkeypatch.setattr(ddpm.UNet2DModel, "forward", spy)
    monkeypatch.setattr(ddpm, "BATCH", 4)
    ddpm.train(work, source, 1, guidance=1.0, bf16=bf16)
    assert seen == [(torch.bfloat16 if bf16 else torch.float32, torch.float32)]
    seen.clear()
    look = ClassJudge.forward

    def read(self: ClassJudge, images: torch.Tensor) -> torch.Tensor:
        out = look(self, images)
        if self.training:
            seen.append((out.dtype, next(self.parameters()).dtype))
        return out

    monkeypatch.setattr(ClassJudge, "forward", read)
    monkeypatch.setattr(judges, "BATCH", 16)
    judges.train(work, source, "a", 1, bf16=bf16)
    assert seen == [(torch.bfloat16 if bf16 else torch.float32, torch.float32)]


@pytest.mark.parametrize("stage", ["ddpm", "judges", "features", "all"])
def test_a_device_that_is_not_here_is_told_first(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(lambda: recipe.app([stage, "--work", str(tmp_path / "work"), "--device", "cuda"])) == 2
    assert capsys.readouterr().err.startswith("error: there is no cuda device here. Devices here: ")
    assert not (tmp_path / "work").exists()


def test_options_reach_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    for module in (ddpm, judges):
        monkeypatch.setattr(module, "train", lambda *_, **names: given.append(names))
    for stage in ("ddpm", "judges", "features"):
        recipe.app([stage, "--work", str(tmp_path), "--device", "cpu", "--lr", "2e-4"], standalone_mode=False)
    assert [(names["lr"], names["device"]) for names in given] == [(2e-4, "cpu")] * 4


@pytest.mark.parametrize("scales", ["", "1,,2", "1,x", "0.5", "nan", "2,inf"])
def test_what_is_no_guidance_scale(scales: str) -> None:
    assert guide.read_scales("1, 1.25,2.5,1") == [1, 1.25, 2.5]
    with pytest.raises(SettingError, match="is no guidance scale: numbers of at least 1"):
        guide.read_scales(scales)


def test_guide_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match=r"pipeline is missing. Run the stage `ddpm`"):
        guide.compare(tmp_path, FASHION, [1.0], 1000)
    with pytest.raises(SettingError, match="--count 9 is too few: at least 10"):
        guide.compare(tmp_path, FASHION, [1.0], 9)


def test_a_snapshot_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match=r"ddpm\.ckpt is missing"):
        ddpm.snapshot(tmp_path, FASHION, 1.0)


def test_the_command_line_tells_an_error_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["data", "--work", str(tmp_path), "--source", str(tmp_path / "no")]
    assert run(lambda: recipe.app(asked)) == 2
    assert capsys.readouterr().err.startswith("error: Fashion-MNIST is not at")
    with pytest.raises(SettingError, match="Worlds: fashion, cifar10"):
        recipe.place("mnist", tmp_path)


def test_completion_knows_the_classes() -> None:
    from types import SimpleNamespace

    from expunge import complete

    asked = SimpleNamespace(params={"model": "fashion"})
    assert complete.concepts(asked, "s") == ["Sandal", "Shirt", "Sneaker"]
    assert ("fashion" in complete.MODELS) == (complete.FASHION / "model_index.json").is_file()
