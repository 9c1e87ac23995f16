"""What makes two runs the same: not only the names of the files that they learn from, but what these hold."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import pytest
import torch
from annotated_types import Ge
from PIL import Image
from safetensors.torch import save_file

from expunge import sae
from expunge.backbones import load, tiny
from expunge.concept import Concept
from expunge.distill import SiD
from expunge.door import erase
from expunge.edits import Edit, WeightEdit
from expunge.errors import BadRun
from expunge.feedback import Study
from expunge.kernel.model import Model
from expunge.kernel.state import State, Step
from expunge.methods import METHODS, get
from expunge.methods.base import FILE, File, Needs
from expunge.records import Run

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [f"{a} {b}" for a in ("a", "my", "red", "big", "no") for b in ("cat", "dog", "bomb", "house", "tree")]


@dataclass(frozen=True, kw_only=True)
class Fake:
    steps: Annotated[int, Ge(0), "updates"] = 3
    vectors: Annotated[int, Ge(1), "vectors of a soft token"] = 1
    inversion: Annotated[int, Ge(0), "updates of an inversion"] = 1
    words: Annotated[File, "file of words"] = ""
    sae: Annotated[File, "file of an autoencoder"] = ""

    family: ClassVar[str] = "fake"
    needs: ClassVar[Needs] = Needs()

    def fit(self, model: Model, _targets: Any, state: State) -> Generator[Step, None, Edit]:
        student = state.keep("student", model.denoiser.unlock("text-readers"))
        name, weight = next(iter(student.weights.items()))
        for i in state.steps(self.steps):
            with torch.no_grad():
                weight.add_(torch.rand(weight.shape, generator=state.generator))
            yield Step(i, self.steps, {"walk": 1.0})
        return WeightEdit({f"unet.{name}": weight.detach().clone()})


@dataclass(frozen=True, kw_only=True)
class Seeing(Fake):
    needs: ClassVar[Needs] = Needs(images=True, autoencoder=True)


@dataclass(frozen=True, kw_only=True)
class Holding(Fake):
    needs: ClassVar[Needs] = Needs(retained=True, autoencoder=True)


@dataclass(frozen=True, kw_only=True)
class Sparse(Fake):
    needs: ClassVar[Needs] = Needs(encoders=True, sae=True)


Way = tuple[Model, Concept, Fake, str, Callable[[], Any]]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model(window=64)


def folder(path: Path) -> Path:
    path.mkdir()
    for i in (0, 1):
        Image.new("RGB", (16, 16), (200 * i, 40, 90)).save(path / f"{i}.png")
    return path


def train(model: Model, path: Path, seed: int) -> None:
    path.unlink(missing_ok=True)
    sae.train(model, PROMPTS, path, sae.Training(expansion=2, k=2, steps=1, batch=4), seed=seed)


def study(path: Path) -> Path:
    pictures = [p.read_bytes() for p in sorted(folder(path.with_name("drawn")).iterdir())] * 20
    with Study.create(path, [("a bomb", i) for i in range(40)], concept="bomb") as opened:
        for i, data in enumerate(pictures, 1):
            opened.put(i, data)
            opened.rate("ann", i, "concept" if i % 2 else "not")
    return path


def rate(path: Path) -> None:
    with Study.open(path) as opened:
        for who in ("bob", "cid"):
            opened.rate(who, 2, "concept")


def ways(way: str, model: Model, there: Path) -> Way:
    """Return a run that learns from a file, what its contents are called, and what changes them."""
    file, bomb = there / "file", Concept("bomb")
    if way == "setting":
        file.write_text("one\ntwo\n")
        return model, bomb, Fake(words=str(file)), "words", lambda: file.write_text("one\nsix\n")
    if way == "autoencoder":
        train(model, file, 0)
        return model, bomb, Sparse(sae=str(file)), "sae", lambda: train(model, file, 1)
    if way == "autoencoder beside the weights":
        base, beside = load(tiny.save(there / "model")), there / "model" / sae.FILE
        train(base, beside, 0)
        return base, Concept("bomb", templates=("a {c}",)), Sparse(), "sae", lambda: train(base, beside, 1)
    if way == "embedding":
        file = there / "bomb.safetensors"
        vectors = model.need_text().embedding("bomb")["text_encoder"].clone()
        save_file({"<bomb>": vectors}, file)
        token = Concept("bomb", embedding=file)
        return model, token, Fake(), "embedding of 'bomb'", lambda: save_file({"<bomb>": 2 * vectors}, file)
    if way == "study":
        study(file)
        return model, Concept("bomb", images=file), Seeing(), "images of 'bomb'", lambda: rate(file)
    folder(file)

    def other() -> None:
        Image.new("RGB", (16, 16), "white").save(file / "1.png")

    seen, kept, told = Concept("bomb", images=file), Concept("bomb", keep_images=file), "images of 'bomb'"
    pictured: dict[str, Way] = {
        "pictures": (model, seen, Seeing(), told, other),
        "pictures to invert": (model, seen, Fake(), told, other),
        "caption": (model, seen, Seeing(), told, lambda: (file / "1.txt").write_text("a red bomb")),
        "pictures to retain": (model, kept, Holding(), f"keep_{told}", other),
    }
    return pictured[way]


@pytest.mark.parametrize(
    "way",
    [
        "setting", "autoencoder", "autoencoder beside the weights", "embedding", "study", "pictures", "caption",
        "pictures to invert", "pictures to retain",
    ],
)  # fmt: skip
def test_other_contents_are_another_run(model: Model, tmp_path: Path, way: str) -> None:
    model, concept, method, label, change = ways(way, model, tmp_path)
    out = tmp_path / "run"

    def stop(step: Step) -> None:
        if "walk" in step.losses and step.i == 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"out": out, "save_every": 0}
    with pytest.raises(KeyboardInterrupt):
        erase(model, concept, method, progress=stop, **options)
    change()
    differs = rf"cannot be resumed. It differs in contents of {label}: \w{{12}} then, \w{{12}} now\.$"
    with pytest.raises(BadRun, match=differs):
        erase(model, concept, method, resume=True, **options)


def test_the_same_contents_are_the_same_run_and_a_finished_one_has_its_own(model: Model, tmp_path: Path) -> None:
    model, concept, method, _, change = ways("setting", model, tmp_path)
    out, file = tmp_path / "run", Path(method.words)
    edit = erase(model, concept, method, out=out)
    file.write_text(file.read_text())
    again = erase(model, concept, method, out=out, resume=True)
    assert again.tensors().keys() == edit.tensors().keys()
    assert set(Run.open(out).card.contents) == {"words"}
    change()
    with pytest.raises(BadRun, match="contents of words"):
        erase(model, concept, method, out=out, resume=True)
    file.unlink()
    with pytest.raises(BadRun, match=r"contents of words: \w{12} then, none now"):
        erase(model, concept, method, out=out, resume=True)


def test_a_run_without_files_has_no_contents(model: Model, tmp_path: Path) -> None:
    erase(model, Concept("bomb"), Fake(), out=tmp_path / "run")
    assert Run.open(tmp_path / "run").card.contents == {}


@pytest.mark.parametrize("method", [*map(get, METHODS), SiD])
def test_settings_that_name_a_file_say_so(method: Any) -> None:
    hints = get_type_hints(method, include_extras=True)
    for field in fields(method):
        marks = hints[field.name].__metadata__
        assert any(m is FILE for m in marks) == any(isinstance(m, str) and m.startswith("file of") for m in marks)
