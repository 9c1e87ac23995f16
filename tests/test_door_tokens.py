"""The door, for concepts that are no words: an embedding, or pictures."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from expunge import flags, methods, tokens
from expunge.backbones import tiny, toy
from expunge.backbones.unet import UNetModel
from expunge.concept import Concept, World
from expunge.door import CHECKPOINT, erase
from expunge.edits import Edit, load_edit
from expunge.errors import BadRun, ConceptError, Diverged, KeepsAll, NeedsError, PromptCut
from expunge.kernel.model import Sampling
from expunge.kernel.state import Step
from expunge.records import Run
from expunge.tokens import TOKEN

WINDOW = 64
STEPS = 5  # of an inversion
pytestmark = pytest.mark.usefixtures("one_thread")
SHORT: dict[str, Any] = {"batch": 2, "rollouts": 2, "sampling_steps": 3, "reuse": 1, "steps": 4}
CASES: dict[str, dict[str, Any]] = {"esd": SHORT, "sdd": SHORT, "uce": {}}
cases = pytest.mark.parametrize("case", CASES)


def made(case: str) -> Any:
    return flags.build(methods.get(case), CASES[case])


@pytest.fixture(scope="module")
def model() -> UNetModel:
    return tiny.model(window=WINDOW)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of three formats, sizes and modes."""
    there = tmp_path / "pictures"
    there.mkdir()
    for name, mode, size in (("a.png", "RGBA", (40, 20)), ("b.jpg", "L", (16, 30)), ("c.WEBP", "RGB", (7, 9))):
        generator = torch.Generator().manual_seed(len(mode))
        noise = torch.randint(0, 256, (size[1], size[0], 4), dtype=torch.uint8, generator=generator)
        image = Image.frombytes("RGBA", size, noise.numpy().tobytes())
        image.convert(mode).save(there / name, format="WEBP" if name.endswith("WEBP") else None)
    (there / "notes.txt").write_text("no picture")
    return there


@pytest.fixture(autouse=True)
def short_inversions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "STEPS", STEPS)


def same(a: Edit, b: Edit) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def embedding(model: UNetModel, word: str, path: Path) -> Path:
    save_file({"<anything>": model.soft.embedding(word)["text_encoder"].clone()}, path)
    return path


# ---------------------------------------------------------------------------------------------------------- embeddings


@cases
def test_an_embedding_of_a_word_is_erased_as_the_word(model: UNetModel, tmp_path: Path, case: str) -> None:
    before, path = model.fingerprint(), embedding(model, "bomb", tmp_path / "e.safetensors")
    word = erase(model, Concept("bomb", anchor="ball", keep=("drum",)), made(case), seed=1)
    soft = Concept("whatever", anchor="ball", keep=("drum",), embedding=path)
    edit = erase(model, soft, made(case), seed=1, out=tmp_path / "run")
    assert same(edit, word)
    assert not same(edit, erase(model, replace(soft, embedding=None), made(case), seed=1))
    assert model.fingerprint() == before
    assert not model.soft.held
    card = Run.open(tmp_path / "run").card
    assert Concept.from_json(card.concept) == soft
    assert card.concept["embedding"] == str(path)
    assert load_file(tmp_path / "run" / TOKEN).keys() == {"<whatever>"}


def test_two_text_encoders(tmp_path: Path) -> None:
    model = UNetModel(tiny.xl_pipeline(window=WINDOW), "xl", sampling=Sampling(4, 3.0, 16))
    vectors = model.soft.embedding("bomb")
    names = {"clip_l": vectors["text_encoder"], "clip_g": vectors["text_encoder_2"]}
    save_file({k: v.clone() for k, v in names.items()}, tmp_path / "e.safetensors")
    edit = erase(model, Concept("x y", embedding=tmp_path / "e.safetensors"), made("uce"), out=tmp_path / "run")
    assert same(edit, erase(model, Concept("bomb"), made("uce")))
    assert load_file(tmp_path / "run" / TOKEN).keys() == {"clip_l", "clip_g"}


def test_an_embedding_and_a_word_together(model: UNetModel, tmp_path: Path) -> None:
    soft = [Concept(f"it {i}", embedding=embedding(model, w, tmp_path / w)) for i, w in enumerate(("bomb", "dagger"))]
    edit = erase(model, [soft[0], Concept("gun"), soft[1]], made("uce"), out=tmp_path / "run")
    assert same(edit, erase(model, [Concept("bomb"), Concept("gun"), Concept("dagger")], made("uce")))
    found = [load_file(p).keys() for p in (tmp_path / "run" / TOKEN, tmp_path / "run" / "token-1.safetensors")]
    assert found == [{"<it-0>"}, {"<it-1>"}]


def test_prompts_too_long_in_vectors_are_told(tmp_path: Path) -> None:
    short = tiny.model(window=16)
    path = embedding(short, "0123456789abcdef", tmp_path / "e.safetensors")
    with pytest.warns(PromptCut, match="does not see"):
        erase(short, Concept("x", embedding=path, templates=("{c}",)), made("uce"))


def test_placeholders_are_plain_and_distinct() -> None:
    taken: dict[str, Any] = {}
    for name in ("Van Gogh", "van-gogh", "VAN_GOGH", "<x>", "!?"):
        taken[tokens._placeholder(name, taken)] = {}
    assert list(taken) == ["<van-gogh>", "<van-gogh-2>", "<van-gogh-3>", "<x>", "<concept>"]


# ------------------------------------------------------------------------------------------------------------ pictures


@cases
def test_pictures_are_inverted_and_erased(model: UNetModel, tmp_path: Path, folder: Path, case: str) -> None:
    before, out, seen = model.fingerprint(), tmp_path / "run", list[Step]()
    concept = Concept("My Thing", images=folder)
    edit = erase(model, concept, made(case), seed=2, out=out, progress=seen.append)
    assert model.fingerprint() == before
    assert not model.soft.held
    assert [s.i for s in seen if "inversion" in s.losses] == list(range(5))
    updates = CASES[case].get("steps", 1)
    assert [s.i for s in seen if "inversion" not in s.losses] == list(range(updates))
    card = Run.open(out).card
    assert Concept.from_json(card.concept) == concept
    assert "inversion" not in card.losses
    assert {p.name for p in out.iterdir()} == {"card.json", "edit.safetensors", TOKEN}
    # the run is that of its token, and not that of its label
    again = erase(model, Concept("other", embedding=out / TOKEN), made(case), seed=2)
    assert same(edit, again)
    assert not same(edit, erase(model, Concept("My Thing"), made(case), seed=2))


def test_the_seed_decides(model: UNetModel, tmp_path: Path, folder: Path) -> None:
    concept = Concept("thing", images=folder)
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        erase(model, concept, made("uce"), seed=seed, out=tmp_path / name)
    one, two, other = (load_file(tmp_path / n / TOKEN)["<thing>"] for n in ("one", "two", "other"))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_diffusers_loads_the_token_of_a_run(tmp_path: Path, folder: Path) -> None:
    model, out = tiny.model(window=WINDOW), tmp_path / "run"
    edit = erase(model, Concept("thing", images=folder), made("uce"), out=out)
    ask: dict[str, Any] = {"prompts": ["a picture of <thing>"], "seeds": [0]}
    plain = model.generate(**ask)
    vectors = tokens.read(out / TOKEN, model.soft.widths)
    with edit.on(model), model.soft.tokens({"<thing>": vectors}):
        ours = model.generate(**ask)
    with edit.on(model):
        assert not torch.equal(model.generate(**ask), ours)
    model.pipe.load_textual_inversion(str(out / TOKEN))
    assert model.pipe.tokenizer.convert_tokens_to_ids("<thing>") == len(tiny.tokenizer())
    for name, value in edit.tensors().items():
        model.pipe.unet.get_parameter(name.removeprefix("unet.")).data.copy_(value)
    assert torch.equal(model.generate(**ask), ours)
    assert not torch.equal(plain, ours)


def test_pictures_win_over_a_name_that_the_world_knows(tmp_path: Path, folder: Path) -> None:
    model = tiny.model(window=WINDOW)
    model.world = World("toy", ("bomb", "pizza"), ("flat",), {"bomb": ("shell",)}, ("{c}", "a {x} {c}"), ("{c}",))
    concept = Concept("Shell", images=folder)
    targets = (concept.resolve(model.world),)
    with tokens.spoken(model, targets, made("uce"), {"seed": 0}, None, None) as told:
        assert told[0].prompts == ("<bomb>", "a flat <bomb>")
        assert (told[0].keeps, told[0].concept) == (targets[0].keeps, targets[0].concept)
    assert Concept("qqq", images=folder).resolve(model.world).keeps == (
        "bomb",
        "a flat bomb",
        "pizza",
        "a flat pizza",
        "flat",
    )


@pytest.fixture
def worldly() -> UNetModel:
    """A model that knows what it can draw."""
    model = tiny.model(window=WINDOW)
    model.world = World("toy", ("bomb", "pizza"), ("flat",), {"bomb": ("shell",)}, ("{c}",), ("{c}",))
    return model


def test_a_label_that_the_world_does_not_know_is_told_once(worldly: UNetModel, tmp_path: Path) -> None:
    paths = [embedding(worldly, word, tmp_path / word) for word in ("bomb", "pizza")]
    concepts = [Concept(name, embedding=path) for name, path in zip(("qqq", "rrr"), paths, strict=True)]
    with pytest.warns(KeepsAll) as caught:
        erase(worldly, concepts, made("uce"))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'qqq' and 'rrr' are unknown to the world 'toy'" in message
    assert "all its 2 objects and 1 styles are retained" in message
    assert "--keep" in message
    assert caught[0].filename == __file__


def test_a_label_of_pictures_is_told_too(worldly: UNetModel, folder: Path) -> None:
    with pytest.warns(KeepsAll, match="'qqq' is unknown"):
        erase(worldly, Concept("qqq", images=folder), made("uce"))


@pytest.mark.parametrize(
    ("label", "details", "preserve"),
    [
        ("qqq", {"keep": ("pizza",)}, 1.0),
        ("Shell", {}, 1.0),
        ("qqq", {"names": ("bomb",)}, 1.0),
        ("qqq", {"synonyms": ("Bomb",)}, 1.0),
        ("qqq", {}, 0.0),
    ],
)
def test_a_label_that_excludes_or_keeps_nothing_is_not_told(
    worldly: UNetModel, tmp_path: Path, label: str, details: dict[str, Any], preserve: float
) -> None:
    concept = Concept(label, embedding=embedding(worldly, "bomb", tmp_path / "e.safetensors"), **details)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erase(worldly, concept, methods.get("uce")(preserve=preserve))


def test_a_model_of_no_known_world_keeps_nothing(model: UNetModel, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erase(model, Concept("qqq", embedding=embedding(model, "bomb", tmp_path / "e.safetensors")), made("uce"))


def test_pictures_become_centre_squares_on_white(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (30, 10), (255, 0, 0, 255))
    wide.paste((0, 0, 255, 0), (10, 0, 20, 10))
    wide.save(tmp_path / "a.png")
    Image.new("L", (5, 5), 51).save(tmp_path / "b.png")
    found = tokens.pictures(tmp_path, 8)
    assert found.shape == (2, 3, 8, 8)
    assert bool((found[0, :, :, 1:-1] == 1).all())
    assert torch.allclose(found[1], torch.full((3, 8, 8), 0.2))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("content", [b"", b"no picture at all", "half"])
def test_a_bad_picture_is_named(model: UNetModel, tmp_path: Path, folder: Path, content: Any) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "bad.png").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ConceptError, match=r"bad\.png cannot be read"):
        erase(model, Concept("thing", images=folder), made("uce"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_pictures(model: UNetModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for images, message in ((tmp_path, "holds no pictures of 'a'.*jpg"), (tmp_path / "notes.txt", "is no folder")):
        with pytest.raises(ConceptError, match=message):
            erase(model, Concept("a", images=images), made("uce"))


def test_one_folder_is_not_two_concepts(model: UNetModel, folder: Path) -> None:
    with pytest.raises(ConceptError, match="'a' and 'b' are given by the same"):
        erase(model, [Concept("a", images=folder), Concept("b", images=folder)], made("uce"))


def test_a_model_without_soft_tokens(folder: Path) -> None:
    with pytest.raises(NeedsError, match="reads no such tokens"):
        erase(toy.model(), Concept("a", images=folder), made("uce"))


def test_an_embedding_of_another_width(model: UNetModel, tmp_path: Path) -> None:
    save_file({"<x>": torch.zeros(2, 24)}, tmp_path / "e.safetensors")
    with pytest.raises(ConceptError, match=r"e\.safetensors fits another model.*2x24.*16 \(text_encoder\)"):
        erase(model, Concept("a", embedding=tmp_path / "e.safetensors"), made("uce"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_a_pickled_embedding_is_refused_unread(model: UNetModel, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"e.{suffix}"
    torch.save({"<x>": torch.zeros(16)}, path)
    with pytest.raises(ConceptError, match="can run any code.*Convert it to .safetensors"):
        erase(model, Concept("a", embedding=path), made("uce"))


def test_an_inversion_that_diverges(tmp_path: Path, folder: Path) -> None:
    broken = tiny.model(window=WINDOW)
    broken.denoiser.module.get_submodule("conv_out").register_forward_hook(lambda _m, _i, out: out * float("nan"))
    with pytest.raises(Diverged, match="inversion of the pictures of 'thing' diverged at step 0"):
        erase(broken, Concept("thing", images=folder), made("uce"), out=tmp_path / "run")
    assert not broken.soft.held


# -------------------------------------------------------------------------------------------------------------- resume


def stop(at: str, i: int) -> Any:
    """Stop a run at an update of the inversion or of the method."""

    def progress(step: Step) -> None:
        if ("inversion" in step.losses) == (at == "inversion") and step.i == i:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("at", "i"), [("inversion", 2), ("method", 0), ("method", 2)])
def test_resumes_bit_identically(model: UNetModel, tmp_path: Path, folder: Path, at: str, i: int) -> None:
    concept, method, out = Concept("thing", images=folder), made("sdd"), tmp_path / "run"
    wanted = erase(model, concept, method, seed=4, out=tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        erase(model, concept, method, seed=4, out=out, save_every=0, progress=stop(at, i))
    assert (out / TOKEN).exists() == (at == "method")
    seen: list[Step] = []
    edit = erase(model, concept, method, seed=4, out=out, resume=True, progress=seen.append)
    assert same(edit, wanted)
    assert same(load_edit(Run.open(out).edit_path), wanted)
    assert (out / TOKEN).read_bytes() == (tmp_path / "undisturbed" / TOKEN).read_bytes()
    assert any("inversion" in s.losses for s in seen) == (at == "inversion")


# Like the killer of `test_door`: one process imports torch, learns nothing itself, and forks a child a kill.
KILLER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_door_tokens import STEPS, WINDOW, made
import torch
from expunge import storage, tokens
from expunge.backbones import tiny
from expunge.concept import Concept
from expunge.door import erase
torch.set_num_threads(1)
tokens.STEPS = STEPS
erase(tiny.model(window=WINDOW), Concept("bomb"), made("uce"))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(images, out, at, n):
    real = os.replace
    def replace(a, b):
        if at == "before" and Path(b).name == tokens.TOKEN:
            die()
        real(a, b)
        if at == "after" and Path(b).name == tokens.TOKEN:
            die()
    storage.os.replace = replace
    def progress(step):
        if at == ("inversion" if "inversion" in step.losses else "method") and step.i == n:
            die()
    concept = Concept("thing", images=images)
    erase(tiny.model(window=WINDOW), concept, made("sdd"), seed=4, out=out, save_every=0, progress=progress)

for job in sys.argv[4:]:
    if not (pid := os.fork()):
        try:
            at, _, n = job.partition(":")
            child(Path(sys.argv[2]), Path(sys.argv[3]) / job, at, int(n or -1))
        finally:
            os._exit(1)
    print(job, os.waitpid(pid, 0)[1])
"""
KILLS = ["inversion:2", "before", "after", "method:1"]  # before, after: around the appearance of the token's file


def test_resumes_bit_identically_after_kill_9(model: UNetModel, tmp_path: Path, folder: Path) -> None:
    wanted = erase(model, Concept("thing", images=folder), made("sdd"), seed=4, out=tmp_path / "undisturbed")
    token = (tmp_path / "undisturbed" / TOKEN).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(folder), str(tmp_path), *KILLS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.splitlines() == [f"{job} 9" for job in KILLS], done.stdout + done.stderr[-3000:]
    for job in KILLS:
        out, seen = tmp_path / job, list[Step]()
        assert (out / TOKEN).exists() == (job in ("after", "method:1"))
        edit = erase(
            model, Concept("thing", images=folder), made("sdd"), seed=4, out=out, resume=True, progress=seen.append
        )
        assert same(edit, wanted)
        assert (out / TOKEN).read_bytes() == token
        inverted = [s.i for s in seen if "inversion" in s.losses]
        assert inverted == ([] if job in ("after", "method:1") else list(range(STEPS)))
        # the kill fell after the second update's checkpoint
        assert [s.i for s in seen if "inversion" not in s.losses] == ([2, 3] if job == "method:1" else [0, 1, 2, 3])
        assert {p.name for p in out.iterdir()} == {"card.json", "edit.safetensors", TOKEN}


@pytest.fixture
def halted(model: UNetModel, tmp_path: Path, folder: Path) -> Path:
    """A run that died between its inversion and its first checkpoint."""
    out = tmp_path / "halted"
    erase(model, Concept("thing", images=folder), made("sdd"), seed=4, out=out)
    for file in out.iterdir():
        if file.name != TOKEN:
            file.unlink()
    return out


def test_a_run_with_a_token_alone_goes_on(model: UNetModel, tmp_path: Path, folder: Path, halted: Path) -> None:
    concept, seen, made_at = Concept("thing", images=folder), list[Step](), os.stat(halted / TOKEN).st_mtime_ns
    wanted = erase(model, concept, made("sdd"), seed=4)
    edit = erase(model, concept, made("sdd"), seed=4, out=halted, resume=True, progress=seen.append)
    assert same(edit, wanted)
    assert not any("inversion" in s.losses for s in seen)
    assert os.stat(halted / TOKEN).st_mtime_ns == made_at
    assert not (halted / CHECKPOINT).exists()


def test_a_token_of_another_run_is_not_used(model: UNetModel, folder: Path, halted: Path) -> None:
    with pytest.raises(BadRun, match="seed: 4 then, 5 now"):
        erase(model, Concept("thing", images=folder), made("sdd"), seed=5, out=halted, resume=True)
    (halted / TOKEN).write_bytes(b"broken")
    with pytest.raises(BadRun, match="cannot be read"):
        erase(model, Concept("thing", images=folder), made("sdd"), seed=4, out=halted, resume=True)
