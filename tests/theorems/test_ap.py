"""AP holds what erasing hurts most, AGE erases towards it, in the world whose optimum is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.backbones import toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import SettingError
from expunge.kernel.path import Kind
from expunge.kernel.state import Step
from expunge.methods import ap
from expunge.methods.ap import AP
from expunge.methods.esd import ESD

CONVERGED = 1e-2  # means are of order 1; what Adam at this rate leaves after the steps below
TRAIN: dict[str, Any] = {"lr": 0.05, "batch": 8, "rollouts": 4, "sampling_steps": 10}
# its prompts say "red" as well, so that erasing them splits the change between the two words
RED_BOMB = Concept("bomb", templates=("{c} red",))


def mean(model: toy.ToyModel, prompt: str) -> torch.Tensor:
    """The colour that a prompt stands for."""
    c = model.encode(prompt).tokens
    layer = model.network.to_mean
    return (c.sum(1) @ layer.weight.T + layer.bias).detach()[0]


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("green\ncat\nred\nhouse\n")
    return str(path)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_ap_holds_the_word_that_esd_harms(kind: Kind, words: str) -> None:
    model = toy.model(kind)
    red, null = mean(model, "red"), mean(model, "")
    wanted = null - (mean(model, "bomb red") - null)
    harm = {}
    for method in (ESD(steps=160, **TRAIN), AP(steps=160, vocabulary=words, adversarial=3.0, **TRAIN)):
        with erase(model, RED_BOMB, method, seed=0).on(model):
            torch.testing.assert_close(mean(model, "bomb red"), wanted, atol=5 * CONVERGED, rtol=0)
            harm[type(method)] = (mean(model, "red") - red).norm().item()
    assert harm[ESD] > 0.3
    assert harm[AP] < harm[ESD] / 10


@pytest.mark.parametrize(
    "changes", [{"adversary": "gumbel", "search_lr": 0.1, "ascent": 3}, {"space": "x0"}, {"rank": 2}]
)
def test_ap_holds_it_by_every_setting(changes: dict[str, Any], words: str) -> None:
    model = toy.model("eps")
    red = mean(model, "red")
    harm = []
    for weight in (0.0, 3.0):
        method = AP(steps=120, vocabulary=words, adversarial=weight, tau=0.5, **changes, **TRAIN)
        with erase(model, RED_BOMB, method, seed=0).on(model):
            harm.append((mean(model, "red") - red).norm().item())
    assert harm[0] > 0.3
    assert harm[1] < harm[0] / 3


@pytest.mark.parametrize("space", ["native", "x0"])
def test_the_search_measures_what_the_held_term_does(space: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, adversary = [], ap.adversary
    monkeypatch.setattr(ap, "adversary", lambda *a, **known: (asked.append(known["space"]), adversary(*a, **known))[1])
    erase(toy.model("eps"), RED_BOMB, AP(steps=1, vocabulary=words, space=space, **TRAIN), seed=0)
    assert asked == [space]


def test_ap_erases_several_concepts_each_with_its_adversary(words: str) -> None:
    model = toy.model("v")
    concepts = [RED_BOMB, Concept("dagger", templates=("{c} green",))]
    before = {w: mean(model, w) for w in ("bomb red", "dagger green", "red", "green")}
    with erase(model, concepts, AP(steps=200, vocabulary=words, adversarial=3.0, **TRAIN), seed=0).on(model):
        for w in ("bomb red", "dagger green"):
            torch.testing.assert_close(mean(model, w), -before[w], atol=5 * CONVERGED, rtol=0)
        for w in ("red", "green"):
            torch.testing.assert_close(mean(model, w), before[w], atol=5 * CONVERGED, rtol=0)


def test_age_erases_towards_a_word_of_the_vocabulary(words: str) -> None:
    """Nothing here changes but the concept, so the nearest word stays the target; AP's target is the empty prompt."""
    model = toy.model("flow")
    green, null = mean(model, "green"), mean(model, "")
    assert min((green - null).norm(), (green - mean(model, "bomb")).norm()) > 0.1
    concept = Concept("bomb", templates=("{c}", "{c} dark"))
    method = AP(eta=0.0, adaptive=True, steps=160, vocabulary=words, **TRAIN)
    with erase(model, concept, method, seed=0).on(model):
        torch.testing.assert_close(mean(model, "bomb"), green, atol=5 * CONVERGED, rtol=0)
        # the rest of a prompt stays
        torch.testing.assert_close(mean(model, "bomb dark"), mean(model, "green dark"), atol=5 * CONVERGED, rtol=0)


def test_age_moves_to_the_word_that_is_harmed(words: str) -> None:
    """While AGE's first target is "green", erasing "bomb red" harms "red", which then becomes the target."""
    model = toy.model("eps")
    method = AP(eta=0.0, adaptive=True, steps=120, vocabulary=words, adversarial=3.0, **TRAIN)
    start, wanted = mean(model, "green red"), 2 * mean(model, "red")
    with erase(model, RED_BOMB, method, seed=0).on(model):
        found = mean(model, "bomb red")
    assert (found - wanted).norm() < 0.2 < (start - wanted).norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive": True, "adversary": "pgd"}, "towards a word"),
        ({"adaptive": True, "anchor": "cat"}, "'bomb' has the anchor 'cat'"),
        ({"vocabulary": "no.txt"}, "cannot be read"),
        ({"adversary": "fgsm"}, "exact, gumbel or pgd"),
    ],
)
def test_what_makes_no_sense_is_told_at_once(changes: dict[str, Any], message: str) -> None:
    model, seen = toy.model(), list[Step]()
    anchor = changes.pop("anchor", "")
    with pytest.raises(SettingError, match=message):
        erase(model, Concept("bomb", anchor=anchor), AP(**changes), progress=seen.append)
    assert not seen


@pytest.mark.parametrize("changes", [{"adaptive": True}, {"adversary": "gumbel"}, {"adversary": "pgd"}])
def test_ap_resumes_bit_for_bit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = toy.model("v")
    method = AP(
        steps=5, batch=2, rollouts=2, sampling_steps=2, reuse=1, every=1, ascent=1, lr=1e-2, vocabulary=words, **changes
    )  # fmt: skip
    wanted = erase(model, RED_BOMB, method, seed=3).tensors()

    def stop(step: Step) -> None:
        if step.i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(model, RED_BOMB, method, seed=3, out=tmp_path / "run", save_every=0, progress=stop)
    seen: list[Step] = []
    found = erase(model, RED_BOMB, method, seed=3, out=tmp_path / "run", resume=True, progress=seen.append).tensors()
    assert [s.i for s in seen] == [3, 4]
    assert all(torch.equal(found[k], v) for k, v in wanted.items())
