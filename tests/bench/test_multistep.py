"""The multi-step experiment: where it ends in the exact Gaussian world, and what its command keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge.backbones import toy
from expunge.bench import multistep
from expunge.bench.multistep import NAME, MultiStep
from expunge.concept import Concept
from expunge.door import erase
from expunge.kernel.denoiser import Denoiser
from expunge.kernel.identity import Distillation, Distilling
from expunge.kernel.model import Model
from expunge.kernel.state import State
from expunge.records import Run, Score

CONCEPT = Concept("bomb", templates=("{c}",), anchor="cat", keep=("dog",))
METHOD = MultiStep(group="cross-attention", steps=350, lr=0.01, fake_lr=0.05, batch=8, decay=0.97)
CONVERGED = 0.05  # means are of order 1; what sign-like updates of this rate leave


def colour(model: Model, prompt: str) -> Tensor:
    """The mean colour of a prompt's pictures."""
    return model.generate([prompt] * 8, seeds=range(8)).mean((0, 2, 3)) * 2 - 1


def game(model: Model) -> Distillation:
    return Distillation(model, State(0), Distilling(group="cross-attention"))


def test_the_concept_becomes_its_anchor_and_the_model_is_still_sampled_in_steps() -> None:
    model = toy.model("v")
    before = {word: colour(model, word) for word in ("bomb", "cat", "dog")}
    assert (before["bomb"] - before["cat"]).norm() > 0.5
    with erase(model, CONCEPT, METHOD, seed=0).on(model):
        assert model.one_step is None
        torch.testing.assert_close(colour(model, "bomb"), before["cat"], atol=CONVERGED, rtol=0)
        torch.testing.assert_close(colour(model, "dog"), before["dog"], atol=CONVERGED, rtol=0)
    assert model.fingerprint() == model.hash


def test_only_the_last_call_of_a_rollout_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = toy.model("v"), list[bool]()
    played = game(model)
    plain = Denoiser.__call__

    def counted(self: Denoiser, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return plain(self, x_t, t, c)  # type: ignore[arg-type]

    monkeypatch.setattr(Denoiser, "__call__", counted)
    x = MultiStep(sampling_steps=4).sample(played, model.encode(["cat"] * 16))
    assert calls == [False, False, False, True]
    assert x.requires_grad
    assert x.shape == (16, 3, 4, 4)


def test_what_has_scores_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, audited = toy.model("v"), list[str]()

    def audit(folder: Path, *, model: Model) -> None:
        audited.append(folder.name)
        shared = {"protocol": "emoji-v1", "value": 1.0, "n": 4, "base": 0.5}
        Run(folder).write_scores([Score(metric=m, **shared) for m in ("ua", "ira", "cra", "h")])

    monkeypatch.setattr(multistep, "audit", audit)
    monkeypatch.setattr(multistep, "Concept", lambda name, kind: Concept(name, kind=kind, keep=("dog",)))
    method = MultiStep(group="cross-attention", steps=1, batch=2)
    text = [multistep.run(model, ["bomb", "cat"], tmp_path, method, lambda *_: None) for _ in range(2)]
    assert audited == ["bomb", "cat"]
    assert text[0] == text[1]
    assert f"| {NAME} | 2 objects | 1.000 " in text[0]
