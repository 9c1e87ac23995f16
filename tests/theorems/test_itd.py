"""ItD: what it decides by is what its threshold was set on; neutral prompts are untouched; concepts are recognised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expunge import sae
from expunge.backbones import tiny, toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.edits import HookEdit
from expunge.errors import EmptySelection, NeedsError
from expunge.kernel.model import Model
from expunge.methods.itd import ItD, ordinary

# the tiny encoder is untrained and reads letters: what is to be erased has letters of its own
WORDS = ("zzz", "qqq", "cab", "dad", "egg", "fib", "ham", "jam", "leg", "milk")
TEMPLATES = ("{c}", "a {c}", "my {c}", "one {c}")
KEPT = WORDS[2:]
PROMPTS = [t.replace("{c}", w) for w in WORDS for t in TEMPLATES]
NEUTRAL = [p for p in PROMPTS if not p.endswith(WORDS[:2])]
TRAINING = sae.Training(expansion=16, k=10, steps=200, batch=16, lr=3e-3, patience=30)
ZZZ = Concept("zzz", templates=TEMPLATES, keep=KEPT)
QQQ = replace(ZZZ, name="qqq", names=("qqq",))


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder of the tiny model's text encoder, trained on a few words for a moment."""
    path = tmp_path_factory.mktemp("sae") / sae.FILE
    sae.train(tiny.model(), PROMPTS, path, TRAINING)
    return str(path)


def changed(model: Model, edit: HookEdit, prompts: list[str]) -> list[bool]:
    """Which prompts the model reads otherwise under an edit."""
    before = model.encode(prompts).tokens
    with edit.on(model):
        after = model.encode(prompts).tokens
    return [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]


def edit_of(made: object) -> HookEdit:
    assert isinstance(made, HookEdit)
    return made


@pytest.mark.parametrize(("fpr", "shared"), [(0.0, 0.0), (0.1, 0.1), (0.3, 0.1)])
def test_no_more_neutral_prompts_than_promised_are_changed(dictionary: str, fpr: float, shared: float) -> None:
    """The released code sets its threshold on other numbers than it compares, so its share is anybody's guess."""
    model = tiny.model()
    edit = edit_of(erase(model, ZZZ, ItD(sae=dictionary, fpr=fpr, shared=shared), seed=0))
    assert edit.card is not None
    figures = {k: v[0] for k, v in edit.card.losses.items()}
    deciding = ordinary([ZZZ.resolve()], sae.find(model, dictionary).held)[::2]
    hits = changed(model, edit, list(deciding))
    assert sum(hits) / len(hits) == pytest.approx(figures["false_positives"])
    assert sum(hits) / len(hits) <= fpr
    own = changed(model, edit, list(ZZZ.prompts()))
    assert sum(own) / len(own) == pytest.approx(figures["caught"])
    assert figures["caught"] >= 0.5
    # the before check: without a threshold the same features change more
    loose = HookEdit({k: replace(a, threshold=0.0) for k, a in edit.ablations.items()})
    assert sum(changed(model, loose, list(deciding))) > fpr * len(deciding)


def test_neutral_prompts_give_the_same_pictures_bit_for_bit(dictionary: str) -> None:
    model = tiny.model()
    edit = edit_of(erase(model, ZZZ, ItD(sae=dictionary, fpr=0.0), seed=0))
    recognised = [p for p in ZZZ.prompts() if changed(model, edit, [p])[0]]
    prompts = [recognised[0], *ordinary([ZZZ.resolve()], ())[::8], ""]
    ask = {"prompts": prompts, "seeds": range(len(prompts)), "steps": 2}
    base = model.generate(**ask)
    with edit.on(model):
        drawn = model.generate(**ask)
    assert (drawn[0] - base[0]).abs().max() > 1e-3
    assert torch.equal(drawn[1:], base[1:])


def test_several_concepts_by_one_edit(dictionary: str) -> None:
    model = tiny.model()
    method = ItD(sae=dictionary, fpr=0.0)
    alone = replace(ZZZ, keep=(*KEPT, "qqq"))
    one, both = (edit_of(erase(model, c, method, seed=0)) for c in (alone, [ZZZ, QQQ]))
    assert all(any(changed(model, both, list(c.prompts()))) for c in (ZZZ, QQQ))
    assert sum(changed(model, one, list(QQQ.prompts()))) < sum(changed(model, both, list(QQQ.prompts())))


def test_the_papers_threshold_lets_no_prompt_of_the_concept_pass(dictionary: str) -> None:
    model = tiny.model()
    method = ItD(sae=dictionary, fpr=0.0)
    by_rate, by_margin = (edit_of(erase(model, ZZZ, m, seed=0)) for m in (method, replace(method, margin=0.99)))
    prompts = list(ZZZ.prompts())
    assert all(changed(model, by_margin, prompts))
    assert by_margin.ablations["text_encoder"].threshold != by_rate.ablations["text_encoder"].threshold


def test_a_feature_of_neutral_prompts_is_not_chosen(dictionary: str) -> None:
    """With shared=0 the choice is the paper's difference of sets."""
    model = tiny.model()
    few, many = (edit_of(erase(model, ZZZ, ItD(sae=dictionary, shared=s, fpr=0.5), seed=0)) for s in (0.0, 1.0))
    strict, whole = (set(e.ablations["text_encoder"].features.tolist()) for e in (few, many))
    assert strict < whole
    found = sae.find(model, dictionary).saes["text_encoder"]
    choosing = list(ordinary([ZZZ.resolve()], sae.find(model, dictionary).held)[1::2])
    look = lambda p: sae.states(model, {"text_encoder": 1}, p)["text_encoder"]  # noqa: E731
    usual = ItD(sae=dictionary).frequency(look, found, choosing, 1)
    assert not usual[sorted(strict)].any()
    assert usual[sorted(whole - strict)].all()


def test_what_is_missing_is_told_with_the_way_to_get_it(dictionary: str) -> None:
    with pytest.raises(NeedsError, match=r"no sparse autoencoder beside the weights of 'tiny'.*expunge sae tiny"):
        erase(tiny.model(), ZZZ, ItD(), seed=0)
    with pytest.raises(NeedsError, match="trained on other text encoders"):
        erase(tiny.model(seed=1), ZZZ, ItD(sae=dictionary), seed=0)
    with pytest.raises(NeedsError, match="'toy' has no text encoder"):
        erase(toy.model(), ZZZ, ItD(sae=dictionary), seed=0)


def test_an_edit_that_would_do_nothing_is_none(dictionary: str) -> None:
    with pytest.raises(EmptySelection, match="no prompt of 'zzz' shows.*nothing would be erased.*Raise shared"):
        erase(tiny.model(), ZZZ, ItD(sae=dictionary, scale=1.0), seed=0)
