"""Concepts that people rated, from the study to the edit."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from expunge import flags, methods, studies, tokens
from expunge.backbones import tiny, toy
from expunge.backbones.unet import UNetModel
from expunge.concept import Concept, Targets, World
from expunge.door import erase
from expunge.edits import Edit, load_edit
from expunge.errors import BadStudy, ConceptError, KeepsNothing, NeedsError, WeakReward
from expunge.feedback import Study
from expunge.feedback.agreement import Estimate
from expunge.judges.embedding import embedding
from expunge.kernel.state import Step
from expunge.pictures import captions, files
from expunge.records import REWARD, Run
from expunge.reward import Quality, fit
from expunge.tokens import TOKEN

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT: dict[str, Any] = {"batch": 2, "rollouts": 2, "sampling_steps": 3, "reuse": 1, "steps": 3, "inversion": 4}
HOT, COLD = ("fire", "lava", "sun"), ("sky", "sea", "ice")
PROMPTS = HOT + COLD


def made(name: str, **changes: Any) -> Any:
    method = methods.get(name)
    return flags.build(method, {k: v for k, v in (SHORT | changes).items() if k in method.__dataclass_fields__})


def picture(i: int) -> bytes:
    """Red or blue with some noise, by the prompt."""
    generator = torch.Generator().manual_seed(i)
    pixels = torch.rand(16, 16, 3, generator=generator) * 80
    pixels[..., 0 if PROMPTS[i % 6] in HOT else 2] += 150
    data = io.BytesIO()
    Image.fromarray(pixels.byte().numpy()).save(data, "PNG")
    return data.getvalue()


def make(folder: Path, n: int = 36, rated: int = 30, concept: str = "heat", wrong: float = 0.0) -> Path:
    """A study of n pictures, the first of which two raters have rated; red ones are rejected."""
    luck = torch.rand(n, generator=torch.Generator().manual_seed(3)) < wrong
    with Study.create(folder, [(PROMPTS[i % 6], i) for i in range(n)], concept=concept) as study:
        for i in range(n):
            study.put(i + 1, picture(i))
        for i in range(rated):
            hot = (PROMPTS[i % 6] in HOT) ^ bool(luck[i])
            study.rate("ann", i + 1, "concept" if hot else "not")
            study.rate("bob", i + 1, "unsure" if i % 7 == 0 else "concept" if hot else "not")
    return folder


@pytest.fixture(scope="module")
def model() -> UNetModel:
    return tiny.model(window=64)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("studies") / "heat")


@pytest.fixture(scope="module")
def run(model: UNetModel, study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure of the study by HFI."""
    out = tmp_path_factory.mktemp("runs") / "hfi"
    erase(model, Concept("heat", images=study), made("hfi", steps=6, lr=0.01), seed=2, out=out)
    return out


@pytest.fixture(autouse=True)
def short_inversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of methods that have no setting for it."""
    monkeypatch.setattr(tokens, "STEPS", 4)


def same(a: Edit, b: Edit) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def told(model: UNetModel, *concepts: Concept, method: Any = "uce") -> tuple[Targets, ...]:
    targets = tuple(c.resolve(model.world) for c in concepts)
    method = made(method) if isinstance(method, str) else method
    with tokens.spoken(model, targets, method, {"seed": 0, "settings": SHORT}, None, None) as spoken:
        return spoken


# -------------------------------------------------------------------------------------------------------- study -> edit


def test_a_study_says_what_to_reject_and_what_to_keep(model: UNetModel, study: Path) -> None:
    (target,) = told(model, Concept("heat", images=study))
    assert set(target.rejected) == set(HOT)
    assert set(target.keeps) == set(COLD)
    assert all("<heat>" in p for p in (*target.prompts, *target.bare))
    (target,) = told(model, Concept("heat", images=study, keep=("snow",)))
    assert not set(target.keeps) & set(COLD)
    assert any("snow" in k for k in target.keeps)


def test_the_token_is_inverted_from_the_rejected_pictures(study: Path) -> None:
    """Also from those that nobody rated; weights are what the reward model says of them."""
    looks = embedding()
    verdict, images, weights = studies.learn(study, looks, looks.name, 16)
    assert len(images) == len(weights) == 18  # of 36 pictures, 30 of which are rated
    assert bool((images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))).all())
    assert 0.5 < weights.min() <= weights.max() <= 1
    assert verdict == studies.Verdict.from_json(json.loads(json.dumps(verdict.__dict__)))


def test_the_run_holds_a_token_and_how_good_the_reward_model_is(model: UNetModel, run: Path, study: Path) -> None:
    vectors = load_file(run / TOKEN)
    assert {k: v.shape for k, v in vectors.items()} == {"<heat>": (2, 16)}
    (record,) = Run.open(run).reward
    assert (record["concept"], record["study"], record["pairs"]) == ("heat", str(study), False)
    assert (record["raters"], record["rated"], record["rejected"], record["used"]) == (2, 30, 15, 18)
    assert record["auc"]["low"] > 0.7
    assert record["auc"]["value"] == 1
    assert 0 <= record["calibration"] < 0.3
    assert record["curve"][-1]["ratings"] == 24
    assert min(record["reliability"]) > 0.8
    assert "ann" not in (run / REWARD).read_text()
    assert set(Run.open(run).card.losses) == {"steer", "keep"}
    assert model.fingerprint() == Run.open(run).card.base_hash


@pytest.mark.parametrize("name", ["uce", "esd", "sdd"])
def test_every_method_takes_a_study(model: UNetModel, study: Path, tmp_path: Path, name: str) -> None:
    edit = erase(model, Concept("heat", images=study), made(name), seed=0, out=tmp_path / "run")
    base = {f"unet.{k}": v for k, v in model.modules()["unet"].state_dict().items()}
    assert any(not torch.equal(v, base[k]) for k, v in edit.tensors().items())
    assert (tmp_path / "run" / REWARD).is_file()


def test_a_method_that_learns_from_pictures_gets_the_rejected_ones(model: UNetModel, study: Path) -> None:
    assert len(files(study)) == 15
    assert set(captions(study, ("",))) == set(HOT)
    concept = Concept("heat", images=study, keep=("snow",))
    edit = erase(model, concept, made("erasediff"), seed=0, make_images=2)
    assert any(v.abs().sum() for v in edit.tensors().values())


def test_what_one_study_rejects_no_other_keeps(model: UNetModel, study: Path, tmp_path: Path) -> None:
    with Study.create(tmp_path / "s", [(PROMPTS[i % 6], i) for i in range(30)]) as cold:
        for i in range(30):
            cold.put(i + 1, picture(i))
            cold.rate("ann", i + 1, "concept" if PROMPTS[i % 6] in COLD else "not")
    concepts = Concept("heat", images=study), Concept("frost", images=tmp_path / "s")
    assert [set(t.keeps) for c in concepts for t in told(model, c)] == [set(COLD), set(HOT)]
    with pytest.warns(KeepsNothing, match="heat and .*/s, so nothing to retain"):
        both = told(model, *concepts)
    assert [set(t.rejected) for t in both] == [set(HOT), set(COLD)]
    assert [t.keeps for t in both] == [(), ()]


@pytest.fixture(scope="module")
def one_prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one prompt, most of whose pictures people reject: none is left that they accept."""
    folder = tmp_path_factory.mktemp("studies") / "fire"
    with Study.create(folder, [("fire", i) for i in range(24)], concept="heat") as opened:
        for i in range(24):
            opened.put(i + 1, picture(6 * i + (0 if i % 3 else 3)))  # red, and a blue one now and then
            opened.rate("ann", i + 1, "concept" if i % 3 else "not")
    return folder


def test_a_study_that_keeps_nothing_is_told(model: UNetModel, study: Path, one_prompt: Path) -> None:
    fire = Concept("fire", images=one_prompt)
    with pytest.warns(KeepsNothing, match=r"people accept no prompt of .*fire.*--keep") as caught:
        told(model, fire, method="hfi")
    assert len(caught) == 1
    with pytest.raises(NeedsError, match=r"ssd weighs .* people accept no prompt of .*fire.*--keep"):
        told(model, fire, method="ssd")
    for concepts, method in (
        ([replace(fire, keep=("sea",))], made("hfi")),
        ([fire, Concept("heat", images=study)], made("hfi")),
        ([fire], made("hfi", preserve=0)),
        ([fire], made("sfd", prompts="prompts.txt")),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            told(model, *concepts, method=method)


def test_a_study_is_not_told_that_its_label_is_unknown(study: Path) -> None:
    """What is kept comes from the study, not from the world."""
    worldly = tiny.model(window=64)
    worldly.world = World("toy", ("bomb", "pizza"), ("flat",), {}, ("{c}",), ("{c}",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erase(worldly, Concept("heat", images=study), made("uce"))


# --------------------------------------------------------------------------------------------------------------- tokens


def drawn(pipe: Any, prompt: str, negative: str | None = None) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    return pipe(prompt, negative_prompt=negative, latents=noise, **options).images.float()


def test_the_token_loads_in_plain_diffusers_and_draws_the_same(model: UNetModel, run: Path) -> None:
    pipe = tiny.pipeline(window=64)
    pipe.set_progress_bar_config(disable=True)
    plain = drawn(pipe, "a cat")
    pipe.load_textual_inversion(run / TOKEN)
    ask: dict[str, Any] = {"seeds": [5]}
    with tokens.readable(model, str(run / TOKEN)) as word:
        assert word == "<heat>"
        ours = model.generate([f"a {word}"], **ask), model.generate(["a cat"], negative=word, **ask)
    theirs = drawn(pipe, "a <heat>"), drawn(pipe, "a cat", "<heat>")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (theirs[1] - plain).abs().max() > 1e-4
    assert not model.soft.held


def test_a_token_made_elsewhere_is_readable_too(model: UNetModel, tmp_path: Path, run: Path) -> None:
    save_file({"emb_params": load_file(run / TOKEN)["<heat>"]}, tmp_path / "Bad Hands.safetensors")
    with tokens.readable(model, str(tmp_path / "Bad Hands.safetensors")) as word:
        assert word == "<bad-hands>"
        assert len(model.encode(f"a {word}"))
    for prompt in (None, "", "a cat", "heat"):
        with tokens.readable(model, prompt) as word:
            assert word == prompt


def test_what_is_no_token_is_refused(model: UNetModel, tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConceptError, match="cannot be read"), tokens.readable(model, str(tmp_path / "no.safetensors")):
        pass
    with pytest.raises(NeedsError, match="reads none"), tokens.readable(toy.model(), str(run / TOKEN)):
        pass


# -------------------------------------------------------------------------------------------------- resume and refusals


@pytest.mark.parametrize(("at", "i"), [("inversion", 2), ("steer", 2)])
def test_resumes_bit_identically_while_people_go_on_rating(
    model: UNetModel, study: Path, tmp_path: Path, run: Path, at: str, i: int
) -> None:
    own = shutil.copytree(study, tmp_path / "study")

    def stop(step: Step) -> None:
        if at in step.losses and step.i == i:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"seed": 2, "out": tmp_path / "run", "save_every": 0}
    concept, method = Concept("heat", images=own), made("hfi", steps=6, lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        erase(model, concept, method, progress=stop, **options)
    if at == "steer":  # the token is there, so what is said from now on is for another run
        with Study.open(own) as opened:
            opened.rate("cid", 31, "not")
    edit = erase(model, concept, method, resume=True, **options)
    assert same(edit, load_edit(run))
    assert len(Run.open(tmp_path / "run").reward) == 1


@pytest.mark.parametrize(
    ("rated", "message"),
    [(0, "Missing: 20 in all, 5 rejected, 5 accepted"), (12, "Missing: 8 in all"), (3, "has 3 rated pictures")],
)
def test_too_few_ratings_are_refused_before_anything(
    model: UNetModel, tmp_path: Path, rated: int, message: str
) -> None:
    folder = make(tmp_path / "study", rated=rated)
    with pytest.raises(BadStudy, match=message):
        erase(model, Concept("heat", images=folder), made("hfi"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_may_know_nothing_is_told(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = embedding()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        studies.learn(study, looks, "x", 16)
    for auc, message in (
        (Estimate(0.61, 0.48, 0.74, 30), r"AUC on unseen pictures 0\.61 \[0\.48, 0\.74\], and 0\.5 is chance"),
        (Estimate(None, None, None, 0), "AUC on unseen pictures is unknown"),
        (Estimate(0.49, 0.40, 0.58, 30), "It leads nothing, then"),
    ):
        monkeypatch.setattr(studies, "evaluate", lambda *_, auc=auc: Quality(auc, None))
        with pytest.warns(WeakReward, match=message) as told:
            verdict, _, _ = studies.learn(study, looks, "x", 16)
        # what is no better than chance may lead nothing; of what is not known it is not said
        assert bool(verdict.critic) == (auc.value != 0.49)
        assert ("leads nothing" in str(told[0].message)) == (auc.value == 0.49)


def test_answers_stand_alone_where_the_model_sees_no_pattern(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(x: Any, votes: Any) -> Any:
        found = fit(x, votes)
        return replace(found, weights=0 * found.weights)

    monkeypatch.setattr(studies, "fit", blind)
    verdict, images, weights = studies.learn(study, embedding(), "x", 16)
    assert verdict.record["blind"]
    assert len(images) == verdict.record["used"] == 15  # the marked ones; of the unrated six nothing is known
    assert float(weights.min()) > 0.9
    assert set(verdict.rejected) == set(HOT)


def test_a_study_is_no_folder_of_pictures_to_retain(model: UNetModel, study: Path) -> None:
    with pytest.raises(ConceptError, match="pictures that people reject beside those they accept"):
        erase(model, Concept("bomb", keep_images=study), made("uce"))


def test_a_model_without_tokens_refuses_a_study(study: Path) -> None:
    with pytest.raises(NeedsError, match="reads no such tokens"):
        erase(toy.model(), Concept("heat", images=study), made("hfi"))


def test_the_learning_curve_of_a_study(study: Path) -> None:
    with Study.open(study) as opened:
        rows = studies.Lesson.of(opened, embedding()).curve()
    assert [r["ratings"] for r in rows] == [24]
    assert rows[0]["low"] < rows[0]["value"] <= 1


def test_the_command_line_takes_a_study(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from expunge import cli

    short = [f"--set={k}={v}" for k, v in SHORT.items()]
    erased = ["erase", "tiny", "--concept", f"study:{study}", "--method", "hfi", *short, "--out", str(tmp_path / "run")]
    assert cli.main(erased) == 0
    card = Run.open(tmp_path / "run").card
    assert (card.concept["name"], card.concept["images"]) == ("heat", str(study))
    assert (tmp_path / "run" / TOKEN).is_file()
    capsys.readouterr()
    assert cli.main(["feedback", str(study), "--curve", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["reward"]["curve"]
    assert (row["ratings"], row["value"]) == (24, 1)
    few = make(tmp_path / "few", rated=7)
    assert (
        cli.main(["erase", "tiny", "--concept", f"study:{few}", "--method", "hfi", "--out", str(tmp_path / "no")]) == 2
    )
    assert "Missing: 13 in all" in capsys.readouterr().err


def test_the_critic_says_what_the_reward_model_says(model: UNetModel, study: Path) -> None:
    """Of pictures that the autoencoder decodes, and with a gradient; from the numbers that the token's file keeps."""
    (target,) = told(model, Concept("heat", images=study), method="hfi")
    assert target.critic is not None
    assert set(target.accepted) == set(COLD)
    with Study.open(study) as opened:
        lesson = studies.Lesson.of(opened, embedding(), 16)
    reward = fit(lesson.x, lesson.votes)
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = embedding()(model.pictures(z)).double().numpy()
    found = target.critic.logit(z).detach()
    torch.testing.assert_close(found.double(), torch.from_numpy(reward.logit(seen)), atol=1e-3, rtol=1e-3)
    assert 0 < target.critic.low < reward.cut < target.critic.high < 1
    gate, slope = target.critic.judged(z)
    assert gate.shape == (4,)
    assert slope.shape == z.shape
    torch.testing.assert_close(slope.square().mean((1, 2, 3)), torch.ones(4))


@pytest.mark.parametrize(("blind", "steer"), [(False, 1.0), (True, 1.0), (False, 0.0)])
def test_the_token_is_erased_where_no_critic_leads_and_what_people_accept_is_kept(
    model: UNetModel, study: Path, monkeypatch: pytest.MonkeyPatch, blind: bool, steer: float
) -> None:
    if blind:
        monkeypatch.setattr(studies, "fit", lambda *given: replace(fit(*given), weights=0 * fit(*given).weights))
    seen: set[str] = set()
    erase(
        model, Concept("heat", images=study), made("hfi", steer=steer), progress=lambda step: seen.update(step.losses)
    )
    led = not blind and steer > 0
    assert seen == {"inversion", "keep", "steer" if led else "distil"}
