"""A probe ends a fit when the concept is gone, and a resumed fit as the undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import probe as probe_module
from expunge.backbones import toy
from expunge.concept import Concept
from expunge.door import erase
from expunge.errors import BadRun, ConceptError, Diverged, SettingError, Unsupported
from expunge.judges.classifier import load_judge
from expunge.kernel.state import Probe, State, Step
from expunge.methods.ant import ANT
from expunge.methods.esd import ESD
from expunge.methods.salun import SalUn
from expunge.probe import guide, visible
from expunge.protocols import protocol
from expunge.records import Run
from expunge.zoo.emoji import world as emoji

BOMB = Concept("bomb", templates=("{c}",), keep=("cat",))
SHORT: dict[str, Any] = {"lr": 0.05, "batch": 2, "rollouts": 2, "sampling_steps": 4}
TRAIN: dict[str, Any] = {"eta": 0.0, "lr": 0.05, "batch": 8, "rollouts": 2, "sampling_steps": 6}


def colour(model: toy.ToyModel) -> float:
    """How far the concept is from having none."""
    return float((model.encode("bomb").tokens.sum(1) @ model.network.to_mean.weight.T).norm())


def counted(calls: list[float]) -> Callable[[Any], float]:
    def measure(model: toy.ToyModel) -> float:
        assert not torch.is_grad_enabled()
        calls.append(colour(model))
        return calls[-1]

    return measure


def test_ends_when_the_concept_is_gone(tmp_path: Path) -> None:
    model, seen = toy.model("v"), list[Step]()
    before = colour(model)
    bound = before / 4
    probe = Probe(colour, until=bound, every=5)
    edit = erase(model, BOMB, ESD(steps=200, **TRAIN), out=tmp_path, probe=probe, progress=seen.append)
    card = Run.open(tmp_path).card
    looks = card.losses["probe"]
    assert 10 < card.steps < 200
    assert card.steps % 5 == 0
    assert looks[-1] <= bound < min(looks[:-1])
    assert len(looks) == card.steps // 5
    assert [s.i for s in seen if "probe" in s.losses] == list(range(5, card.steps, 5))
    assert colour(model) == before
    with edit.on(model):
        assert colour(model) == looks[-1]
    # the looks disturb nothing: without them the same number of updates gives the same edit
    plain = erase(toy.model("v"), BOMB, ESD(steps=card.steps, **TRAIN)).tensors()
    assert all(torch.equal(plain[k], v) for k, v in edit.tensors().items())


@pytest.mark.parametrize("method", [ANT(maps=3, steps=6, **SHORT), SalUn(draws=2, steps=6, batch=2, lr=0.05)])
@pytest.mark.parametrize("every", [1, 2])
def test_a_probe_does_not_look_while_nothing_is_trained(method: Any, every: int) -> None:
    """Both begin with three maps of the untouched network: a concept that nobody sees would end the fit there."""
    model, looks = toy.model("v"), list[float]()
    probe = Probe(lambda now: looks.append(colour(now)) or 0.0, until=0.5, every=every)
    edit = erase(model, BOMB, method, probe=probe, make_images=3 if method.needs.images else 0)
    assert edit.card is not None
    assert edit.card.steps == 3 + every
    assert len(looks) == 1
    assert looks[0] != colour(model)


def test_a_bound_that_is_not_reached_ends_nothing() -> None:
    edit = erase(toy.model("v"), BOMB, ESD(steps=12, **TRAIN), probe=Probe(colour, until=-1.0, every=5))
    assert edit.card is not None
    assert edit.card.steps == 12
    assert len(edit.card.losses["probe"]) == 2


@pytest.mark.parametrize("at", [3, 4, 5, 11])
def test_resumed_with_a_probe(at: int, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: Step) -> None:
        if step.i == at:
            raise Stop

    bound = colour(toy.model("v")) / 2
    options: dict[str, Any] = {"out": tmp_path, "save_every": 0, "probe": Probe(colour, until=bound, every=5)}
    method = ESD(steps=100, **TRAIN)
    with pytest.raises(Stop):
        erase(toy.model("v"), BOMB, method, progress=stop, **options)
    with pytest.raises(BadRun, match="probe:"):
        erase(toy.model("v"), BOMB, method, out=tmp_path, resume=True)
    calls: list[float] = []
    again = Probe(counted(calls), until=bound, every=5)
    resumed = erase(toy.model("v"), BOMB, method, resume=True, **(options | {"probe": again}))
    undisturbed = erase(toy.model("v"), BOMB, method, probe=options["probe"])
    assert resumed.card is not None
    assert undisturbed.card is not None
    assert calls == undisturbed.card.losses["probe"][-len(calls) :]
    assert all(torch.equal(resumed.tensors()[k], v) for k, v in undisturbed.tensors().items())
    assert (resumed.card.steps, resumed.card.losses) == (undisturbed.card.steps, undisturbed.card.losses)


@pytest.mark.parametrize("bad", [{"every": 0}, {"until": float("nan")}, {"until": float("inf")}])
def test_absurd_probes(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="a probe needs"):
        Probe(**({"measure": colour, "until": 0.1} | bad))


def test_a_probe_that_measures_nan_is_told() -> None:
    with pytest.raises(Diverged, match="'probe' was NaN"):
        erase(toy.model("v"), BOMB, ESD(steps=9, **TRAIN), probe=Probe(lambda _: float("nan"), until=0.1, every=2))


def test_a_fit_that_draws_before_its_first_update_resumes_from_the_very_start() -> None:
    """The first checkpoint is taken before a fit has made its objects: their draws are made again, not skipped."""

    def draws(state: State) -> list[float]:
        made = [torch.rand((), generator=state.generator).item()]
        return made + [torch.rand((), generator=state.generator).item() for _ in state.steps(2)]

    fresh = State(7)
    saved = fresh.state_dict()
    assert draws(State.load(saved)) == draws(fresh)


class Judge:
    """Reads brightness as the probability of everything."""

    def probability(self, images: torch.Tensor, name: str) -> torch.Tensor:
        assert name == "bomb"
        return images.mean((1, 2, 3))


def test_a_judge_looks_at_the_same_pictures_each_time() -> None:
    model = toy.model("v")
    measure = visible(Judge(), BOMB, model.world, pictures=6, seed=5)
    prompts = [p for p in BOMB.prompts()]
    want = model.generate([prompts[i % len(prompts)] for i in range(6)], seeds=range(5, 11)).mean().item()
    assert measure(model) == measure(model) == pytest.approx(want)
    with torch.no_grad():
        model.network.to_mean.weight.add_(0.5)
    assert measure(model) > want + 0.01


def test_a_judge_looks_for_the_most_visible_of_several() -> None:
    model = toy.model("v")

    class Two:
        def probability(self, images: torch.Tensor, name: str) -> torch.Tensor:
            return torch.full((len(images),), {"bomb": 0.2, "dagger": 0.7}[name])

    assert visible(Two(), [BOMB, Concept("dagger")], None, pictures=2)(model) == pytest.approx(0.7)


@pytest.mark.parametrize(("concepts", "pictures"), [([], 4), ([BOMB], 0)])
def test_a_look_at_nothing_is_refused(concepts: list[Concept], pictures: int) -> None:
    with pytest.raises(SettingError, match="sees nothing"):
        visible(Judge(), concepts, None, pictures=pictures)


def test_the_judge_that_guides_is_not_the_one_that_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[Any]()

    def load(path: Path) -> Any:
        read.append(load_judge(path))
        return read[-1]

    monkeypatch.setattr(probe_module, "load_judge", load)
    probe = guide([BOMB, Concept("mono", kind="style")], emoji.world(), until=0.25)
    assert (probe.until, probe.every) == (0.25, 25)
    rules = protocol("emoji-v1")
    assert [j.hash for j in read] == [dict(rules.hashes)[rules.trunk]] != [dict(rules.hashes)[rules.scorer]]


@pytest.mark.parametrize(
    ("concept", "known", "until", "error", "message"),
    [
        (BOMB, True, 1.5, SettingError, "no probability"),
        (BOMB, True, float("nan"), SettingError, "no probability"),
        (BOMB, False, 0.05, Unsupported, "no protocol judges this model"),
        (Concept("my look", embedding=Path("look.safetensors")), True, 0.05, ConceptError, "has a name for 'my look'"),
    ],
)
def test_what_no_judge_can_guide(
    concept: Concept, known: bool, until: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        guide(concept, emoji.world() if known else None, until)
    guide(BOMB, emoji.world(), 0.05)
