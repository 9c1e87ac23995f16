"""Pictures that methods learn from: drawn once or read, told what they show, never the same on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from expunge import methods, pictures, sheet
from expunge.backbones import tiny, toy
from expunge.concept import Concept, Targets, World
from expunge.door import erase
from expunge.edits import Edit, WeightEdit
from expunge.errors import BadRun, ConceptError, NeedsError, SettingError, Unsupported
from expunge.kernel.lessons import Lessons
from expunge.kernel.model import Model
from expunge.kernel.state import State, Step
from expunge.methods.base import Needs
from expunge.pictures import IMAGES, INDEX
from expunge.records import Run

BOMB = Concept("bomb", anchor="cat", keep=("cat", "dog"))
SHORT: dict[str, Any] = {"steps": 4, "batch": 3, "lr": 0.01}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "erasediff": ("erasediff", SHORT),
    "erasediff-noise": ("erasediff", SHORT | {"target": "noise"}),
    "neggrad": ("neggrad", SHORT),
    "salun": ("salun", SHORT | {"draws": 2}),
    "salun-soft": ("salun", SHORT | {"threshold": "soft"}),
}


@dataclass(frozen=True, kw_only=True)
class Looking:
    """A method that keeps what it is shown, and changes nothing."""

    seen: ClassVar[list[tuple[Targets, ...]]] = []
    family: ClassVar[str] = "fake"
    needs: ClassVar[Needs] = Needs(text=False, images=True, retained=True)

    def fit(self, _model: Model, targets: Any, state: State) -> Generator[Step, None, Edit]:
        self.seen.append(tuple(targets))
        for i in state.steps(1):
            yield Step(i, 1, {})
        return WeightEdit({})


@dataclass(frozen=True, kw_only=True)
class Glancing(Looking):
    """One that needs nothing to retain."""

    needs: ClassVar[Needs] = Needs(text=False, images=True)


@pytest.fixture
def model() -> toy.ToyModel:
    return toy.model("v")


def made(case: str) -> Any:
    name, settings = CASES[case]
    return methods.get(name)(**settings)


def look(model: Model, *concepts: Concept, method: Any = None, **options: Any) -> tuple[Targets, ...]:
    erase(model, concepts, method or Looking(), **options)
    return Looking.seen.pop()


def same(a: Edit, b: Edit) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def folder(path: Path, n: int, seed: int = 0, size: int = 6) -> Path:
    path.mkdir()
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        data = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=g)
        Image.frombytes("RGB", (size, size), data.numpy().tobytes()).save(path / f"{i}.png")
    return path


# ------------------------------------------------------------------------------------------------------------ drawing


def test_draws_both_sets_and_keeps_them(model: toy.ToyModel, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", list[Step]()
    (target,) = look(model, BOMB, out=out, make_images=20, progress=seen.append)
    assert target.pictures is not None
    assert target.retained is not None
    assert target.pictures.latents.shape == target.retained.latents.shape == (20, 3, 4, 4)
    assert set(target.pictures.prompts) <= set(target.prompts)
    assert len(set(target.pictures.prompts)) == min(20, len(target.prompts))  # each before one comes twice
    assert set(target.retained.prompts) == set(target.keeps)
    assert [(s.i, s.n) for s in seen if "drawn" in s.losses] == [(15, 40), (19, 40), (35, 40), (39, 40)]
    for role, images in (("forget", target.pictures), ("retain", target.retained)):
        files = pictures.files(out / IMAGES / role)
        assert len(files) == 20
        assert pictures.captions(out / IMAGES / role, ("",)) == images.prompts
        assert torch.equal(model.latents(pictures.pictures(out / IMAGES / role, 4)), images.latents)
        # a picture is what its prompt and its seed draw
        with Image.open(files[3]) as opened:
            again = model.generate([opened.info["prompt"]], seeds=[int(opened.info["seed"])])
        # float32 sums in batches of 16 and of 1, then 8 bits
        torch.testing.assert_close(model.latents(again)[0], images.latents[3], atol=0.009, rtol=0)


def test_several_concepts_are_drawn_apart_and_retained_together(model: toy.ToyModel) -> None:
    one, two = look(model, BOMB, replace(BOMB, name="dagger", names=("dagger",)), make_images=3)
    assert all(t.pictures is not None and len(t.pictures.latents) == 3 for t in (one, two))
    assert one.pictures is not None
    assert two.pictures is not None
    assert not set(one.pictures.prompts) & set(two.pictures.prompts)
    assert one.retained is not None
    assert len(one.retained.latents) == 6
    assert two.retained is None


@pytest.mark.parametrize("case", CASES)
def test_folder_or_not_the_same_seed_gives_the_same_edit(case: str, tmp_path: Path) -> None:
    one, two = (erase(toy.model("v"), BOMB, made(case), seed=3, out=o, make_images=5) for o in (None, tmp_path / "run"))
    assert same(one, two)
    assert not same(one, erase(toy.model("v"), BOMB, made(case), seed=4, make_images=5))


def test_everything_is_encoded_once(model: toy.ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, real = [0], model.latents

    def counted(images: torch.Tensor) -> torch.Tensor:
        encoded[0] += len(images)
        return real(images)

    monkeypatch.setattr(model, "latents", counted)
    erase(model, BOMB, made("salun"), make_images=5)
    assert encoded[0] == 5 + 5 + 1  # both sets, and the look whether the model can encode at all


# ----------------------------------------------------------------------------------------------------------- resuming


class Stop(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize(("case", "at"), [(c, at) for c in CASES for at in (0, 2)] + [("salun", 4), ("salun", 6)])
def test_a_resumed_run_is_bit_identical_and_draws_nothing_again(
    case: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: Step) -> None:
        if "drawn" not in step.losses and step.i == at:
            raise Stop

    options: dict[str, Any] = {"seed": 1, "out": tmp_path, "make_images": 5, "save_every": 0}
    with pytest.raises(Stop):
        erase(toy.model("v"), BOMB, made(case), progress=stop, **options)
    model = toy.model("v")
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("drawn again"))
    resumed = erase(model, BOMB, made(case), resume=True, **options)
    assert same(resumed, erase(toy.model("v"), BOMB, made(case), seed=1, make_images=5))


def test_killed_while_drawing(tmp_path: Path) -> None:
    out, drawn = tmp_path / "run", [0]

    def stop(step: Step) -> None:
        if step.losses.get("drawn") == 36:
            raise Stop

    with pytest.raises(Stop):
        erase(toy.model("v"), BOMB, made("erasediff"), out=out, make_images=20, progress=stop)
    (out / IMAGES / "retain" / "0009.png").unlink()  # a chunk that was not finished
    with pytest.raises(BadRun, match="make_images: 20 then, 30 now"):
        erase(toy.model("v"), BOMB, made("erasediff"), out=out, make_images=30, resume=True)
    model = toy.model("v")
    real = model.generate

    def counted(prompts: Any, **options: Any) -> torch.Tensor:
        drawn[0] += len(prompts)
        return real(prompts, **options)

    model.generate = counted  # type: ignore[method-assign]
    resumed = erase(model, BOMB, made("erasediff"), out=out, make_images=20, resume=True)
    assert drawn[0] == 16 + 4  # its chunk, and the one that was to come
    assert same(resumed, erase(toy.model("v"), BOMB, made("erasediff"), make_images=20))


def test_a_finished_run_is_that_of_its_pictures(model: toy.ToyModel, tmp_path: Path) -> None:
    edit = erase(model, BOMB, made("erasediff"), out=tmp_path, make_images=4)
    assert Run.open(tmp_path).card.make_images == 4
    assert same(edit, erase(model, BOMB, made("erasediff"), out=tmp_path, make_images=4, resume=True))
    with pytest.raises(BadRun, match="make_images: 4 then, 5 now"):
        erase(model, BOMB, made("erasediff"), out=tmp_path, make_images=5, resume=True)


def test_an_index_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / IMAGES).mkdir()
    (tmp_path / IMAGES / INDEX).write_text("{")
    with pytest.raises(BadRun, match=r"index\.json cannot be read"):
        pictures.former(tmp_path)


# ------------------------------------------------------------------------------------------------------------ folders


def test_folders_of_pictures(model: toy.ToyModel, tmp_path: Path) -> None:
    """A text beside a picture says what it shows; else its own prompt; else the concept, or nothing."""
    mine, others = folder(tmp_path / "mine", 4), folder(tmp_path / "others", 3, seed=1)
    (mine / "1.txt").write_text("a bright bomb \n")
    (others / "2.txt").write_text("dog")
    sheet.save(tmp_path / "told", torch.rand(2, 3, 4, 4), ["red", "blue"], [1, 2], columns=2)
    assert (tmp_path / "told" / "sheet.png").exists()
    concept = replace(BOMB, images=mine, keep_images=others)
    (target,) = look(model, concept)
    assert target.pictures is not None
    bare = concept.bare()
    assert target.pictures.prompts == (bare[0], "a bright bomb", bare[2], bare[0])
    assert torch.equal(target.pictures.latents, model.latents(pictures.pictures(mine, 4)))
    assert target.retained is not None
    assert target.retained.prompts == ("", "", "dog")
    (target,) = look(model, replace(concept, keep_images=tmp_path / "told"))
    assert target.retained is not None
    assert target.retained.prompts == ("red", "blue")  # and the sheet is no picture


def test_what_no_folder_gives_is_drawn(model: toy.ToyModel, tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine", 2)
    (target,) = look(model, replace(BOMB, images=mine), make_images=3, out=tmp_path / "run")
    assert target.pictures is not None
    assert target.retained is not None
    assert (len(target.pictures.latents), len(target.retained.latents)) == (2, 3)
    assert {p.name for p in (tmp_path / "run" / IMAGES).iterdir()} == {"retain", INDEX}


def test_folders_of_two_concepts_are_retained_together(model: toy.ToyModel, tmp_path: Path) -> None:
    mine = [folder(tmp_path / f"mine{i}", 2, seed=i) for i in range(2)]
    others = [folder(tmp_path / f"others{i}", 3, seed=5 + i) for i in range(2)]
    first, second = replace(BOMB, images=mine[0], keep_images=others[0]), Concept("dagger", images=mine[1])
    (one, two) = look(model, first, replace(second, keep_images=others[1]))
    assert one.retained is not None
    assert len(one.retained.latents) == 6
    (one, two) = look(model, first, replace(second, keep_images=others[0]))
    assert one.retained is not None
    assert len(one.retained.latents) == 3
    assert two.retained is None


def test_an_embedding_is_what_drawn_pictures_show(tmp_path: Path) -> None:
    """Words that are vectors reach the prompts that pictures are drawn from."""
    from safetensors.torch import save_file

    model = tiny.model(window=64)
    save_file({"x": model.soft.embedding("bomb")["text_encoder"].clone()}, tmp_path / "e.safetensors")
    (target,) = look(model, Concept("it", keep=("cat",), embedding=tmp_path / "e.safetensors"), make_images=2)
    assert target.pictures is not None
    assert all("<it>" in p for p in (*target.pictures.prompts, *target.bare))


# ----------------------------------------------------------------------------------------------------------- refusals


def test_missing_pictures_are_told_with_the_way_to_them(model: toy.ToyModel, tmp_path: Path) -> None:
    for method in (made("erasediff"), made("salun"), Glancing()):
        with pytest.raises(NeedsError, match=r"needs pictures of 'bomb'.*--images DIR.*--make-images 64"):
            erase(model, BOMB, method, out=tmp_path / "run")
    mine = folder(tmp_path / "mine", 2)
    with pytest.raises(NeedsError, match=r"pictures to retain.*--keep-images.*--make-images 64"):
        erase(model, replace(BOMB, images=mine), made("salun"), out=tmp_path / "run")
    assert look(model, replace(BOMB, images=mine), method=Glancing())[0].retained is None
    with pytest.raises(NeedsError, match=r"nothing is kept.*--keep"):
        erase(model, Concept("bomb"), made("salun"), out=tmp_path / "run", make_images=4)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NeedsError, match="needs pictures of 'bomb'"):
        erase(model, replace(BOMB, images=empty), made("salun"), out=tmp_path / "run")
    with pytest.raises(NeedsError, match="holds no pictures to retain"):
        erase(model, replace(BOMB, images=mine, keep_images=empty), made("salun"), out=tmp_path / "run")
    with pytest.raises(ConceptError, match="there is nothing at"):
        erase(model, replace(BOMB, images=mine, keep_images=tmp_path / "none"), made("salun"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_that_make_no_sense(model: toy.ToyModel) -> None:
    with pytest.raises(SettingError, match="out of range"):
        erase(model, BOMB, made("salun"), make_images=-1)
    with pytest.raises(SettingError, match="learns from no pictures"):
        erase(model, BOMB, methods.get("esd")(), make_images=4)


def test_the_same_pictures_cannot_be_forgotten_and_retained(model: toy.ToyModel, tmp_path: Path) -> None:
    mine, copy = folder(tmp_path / "mine", 2), tmp_path / "copy"
    shutil.copytree(mine, copy)
    for retained in (mine, copy):
        with pytest.raises(ConceptError, match=r"is to be retained and, as .*, to be forgotten"):
            erase(model, replace(BOMB, images=mine, keep_images=retained), made("salun"))
    # one picture in common is enough
    (copy / "0.png").unlink()
    with pytest.raises(ConceptError, match="to be forgotten"):
        erase(model, replace(BOMB, images=mine, keep_images=copy), made("salun"))
    dagger = Concept("dagger", images=copy, keep=("cat", "dog"))
    with pytest.raises(ConceptError, match="of another concept"):
        erase(model, [replace(BOMB, images=mine), dagger], made("salun"), make_images=2)
    # what is retained may be given twice
    other = folder(tmp_path / "other", 2, seed=3)
    assert look(model, replace(BOMB, images=mine, keep_images=other))


def test_a_model_that_cannot_encode_pictures(model: toy.ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise Unsupported("it has none.")

    monkeypatch.setattr(model, "latents", fail)
    with pytest.raises(NeedsError, match="salun needs an autoencoder"):
        erase(model, BOMB, made("salun"), make_images=2)


def test_a_broken_picture_is_named(model: toy.ToyModel, tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine", 1)
    (mine / "x.png").write_bytes(b"no picture")
    with pytest.raises(ConceptError, match=r"x\.png cannot be read"):
        erase(model, replace(BOMB, images=mine), made("salun"), make_images=2)


# ------------------------------------------------------------------------------------------------------------ lessons


def test_stand_ins(model: toy.ToyModel) -> None:
    """The anchor's prompt where there is an anchor, else that of a random retained picture."""
    with_anchor, without = BOMB, Concept("dagger", keep=("cat", "dog"))
    targets = look(model, with_anchor, without, make_images=4)
    seen = Lessons(model, targets, State(0), 2)
    k = torch.arange(len(seen.c)).repeat(60)
    tokens = seen.instead(k).tokens
    one, two = targets[0].pictures, targets[1].pictures
    assert one is not None
    assert two is not None
    assert len(seen.c) == len({*one.prompts, *two.prompts})
    for row, prompt in enumerate(dict.fromkeys((*one.prompts, *two.prompts))):
        got = tokens[k == row]
        if prompt in one.prompts:
            want = model.encode(prompt.replace("bomb", "cat")).tokens
            assert torch.equal(got, want.expand_as(got))
        else:
            rows = {json.dumps(t.tolist()) for t in seen.r.tokens}
            assert {json.dumps(t.tolist()) for t in got} == rows


@pytest.mark.parametrize("name", ["erasediff", "neggrad", "salun", "ssd"])
def test_conditions_need_not_be_text(model: toy.ToyModel, name: str) -> None:
    """A model of labels has neither templates nor a text encoder."""
    model.reads_text = False
    model.world = World("labels", ("bomb", "cat", "dog"), (), {}, ("{c}",), ("{c}",))
    short = {"draws": 4, "steps": 2, "batch": 2}
    method = methods.get(name)
    known = {k: v for k, v in short.items() if k in {s["name"] for s in methods.describe(name)["settings"]}}
    made_images = 2 if method.needs.images else 0
    before = model.network.to_mean.weight.detach().clone()
    with erase(model, Concept("bomb", kind="class"), method(**known), make_images=made_images).on(model):
        assert not torch.equal(model.network.to_mean.weight, before)
    with pytest.raises(NeedsError, match="uce needs a model that reads text"):
        erase(model, Concept("bomb", kind="class"), methods.get("uce")())
