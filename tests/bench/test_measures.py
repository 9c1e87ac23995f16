"""What claims are decided by: read from an audit, or measured beside it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from expunge.backbones import tiny
from expunge.bench import cells, measures
from expunge.bench.measures import Cell, Scene, value
from expunge.concept import World
from expunge.edits import WeightEdit
from expunge.edits.gated import GatedEdit
from expunge.edits.io import parameters
from expunge.judges.panel import load_panel
from expunge.kernel.model import Model
from expunge.methods.esd import ESD
from expunge.methods.neggrad import NegGrad
from expunge.methods.spm import SPM
from expunge.methods.ssd import SSD
from expunge.records import Card, Run, Score
from expunge.storage import write_json
from expunge.zoo.emoji.world import BENCH_TARGETS, WEIGHTS

OBJECTS = tuple(f"thing {i}" for i in range(12))
WORLD = World("emoji", ("bomb", *OBJECTS), ("flat", "mono"), {}, ("an emoji of {c}",), ("a {c} style emoji of {x}",))


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A cell of the tiny model in a small world."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measures, "SHORT", replace(cells.SHORT, steps=2, targets=2))
    monkeypatch.setattr(measures, "KEPT", 3)
    monkeypatch.setattr(cells, "SHOWN", 2)
    model = tiny.model(window=64)
    model.world = WORLD
    return Scene(model, None, Cell(ESD(), "bomb", 0), tmp_path / "run")


def scaled(model: Model, factor: float, part: str = "unet.conv_out") -> WeightEdit:
    """An edit that multiplies some weights."""
    return WeightEdit({k: v.detach() * factor for k, v in parameters(model).items() if k.startswith(part)})


def save(scene: Scene, edit: WeightEdit) -> None:
    card = Card(
        method="esd", settings={}, concept={"name": "bomb"}, model="tiny", base_hash=scene.model.hash, seed=0,
        version="0", seconds=7.0,
    )  # fmt: skip
    scene.folder.mkdir(exist_ok=True)
    edit.with_card(card).save(scene.folder / "edit.safetensors")
    Run(scene.folder).write_card(card)
    rate = {"protocol": cells.SHORT.id, "n": 2}
    Run(scene.folder).write_scores(
        [
            Score(metric="ua", value=0.75, base=0.0, **rate),
            Score(metric="ira", value=0.6, base=0.8, **rate),
            Score(metric="fid", value=None, **rate),
        ]
    )


def test_values_come_from_scores_card_outcomes_and_measures(scene: Scene) -> None:
    assert value(scene.folder, "ua") is None
    save(scene, scaled(scene.model, 1.0))
    assert value(scene.folder, "ua") == 0.75
    assert value(scene.folder, "ira") == 0.6
    assert value(scene.folder, "ira / base") == pytest.approx(0.75)
    assert value(scene.folder, "ua / base") is None
    assert value(scene.folder, "fid") is None
    assert value(scene.folder, "seconds") == 7.0
    assert math.isnan(measures.neighbours(scene)["neighbours"])
    seen = [("neighbour", "a", "a"), ("neighbour", "b", "c"), ("neighbour", "b", None), ("neighbour", "d", "d")]
    rows = [{"part": p, "object": o, "edited": {"object": e}} for p, o, e in (*seen, ("retain", "e", "x"))]
    Run(scene.folder).write_outcomes(rows)
    assert measures.neighbours(scene) == {"neighbours": 0.5}
    assert value(scene.folder, "updates") is None
    write_json(scene.folder / measures.MEASURES, {"updates": 3.0, "identical": None})
    assert value(scene.folder, "updates") == 3.0
    assert value(scene.folder, "identical") is None
    write_json(scene.folder / cells.REFUSED, {"error": "no"})
    assert value(scene.folder, "seconds") is None


def test_unconditional_change_is_relative(scene: Scene) -> None:
    model, z = scene.model, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert measures.unconditional(model, scaled(model, 1.0), z) == 0
    # the last layer doubled doubles every prediction
    assert measures.unconditional(model, scaled(model, 2.0), z) == pytest.approx(1.0, rel=1e-5)
    save(scene, scaled(model, 3.0))
    assert measures.null_change(scene)["null change"] == pytest.approx(2.0, rel=1e-5)
    assert model.fingerprint() == model.hash


def test_identical_counts_pictures_to_the_last_bit(scene: Scene) -> None:
    for factor, share in ((1.0, 1.0), (1.01, 0.0)):
        save(scene, scaled(scene.model, factor))
        assert measures.identical(scene) == {"identical": share}


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (SSD(draws=2, rollouts=1, sampling_steps=2), 0),
        (ESD(steps=3, batch=2, rollouts=1, sampling_steps=2), 3),
        (NegGrad(steps=2, batch=2), 2),
    ],
)
def test_updates_are_counted_not_believed(scene: Scene, method: Any, steps: int) -> None:
    """A card counts SSD's draws as steps."""
    assert measures.updates(replace(scene, cell=Cell(method, "bomb", 0))) == {"updates": steps}
    # the counter is gone
    assert not _global_optimizer_post_hooks


def test_readings_are_the_scoring_judges_and_none_of_what_cannot_be_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    aimed, kept = scene.specs()
    assert [s.object for s in aimed] == ["bomb"] * 2
    assert len(kept) == 3
    assert all(s.object in OBJECTS for s in kept)
    panel = load_panel(WEIGHTS, cells.SHORT.scorer, cells.SHORT.trunk)
    paint = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    paint[1] = torch.nan
    monkeypatch.setattr(measures, "draw", lambda *_: paint)
    found = measures.readings(replace(scene, panel=panel), kept)
    assert [r is None for r in found] == [False, True, False]
    assert found[0] == panel.scorer.objects[int(panel.scorer.read(paint).object[0])]


def test_pruning_takes_the_smallest_of_every_tensor() -> None:
    values = {"a": torch.tensor([[0.1, -5.0], [3.0, -0.2]]), "b": torch.tensor([10.0, -20.0, 30.0, 40.0])}
    found = measures.pruned(values, 0.5)
    assert found["a"].tolist() == [[0.0, -5.0], [3.0, 0.0]]
    assert found["b"].tolist() == [0.0, 0.0, 30.0, 40.0]


def test_both_edit_and_base_are_pruned_and_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = scene.model, "unet.conv_out.weight"
    base = parameters(model)[name].detach().clone()
    save(scene, scaled(model, 2.0, name))
    zeros, largest = [], []

    def stand_in(_: Scene, specs: Any) -> list[str | None]:
        live = parameters(model)[name].detach()
        zeros.append((live == 0).float().mean().item())
        largest.append((live.abs().max() / base.abs().max()).item())
        # of each role one is right, and what cannot be read is no success of either
        return [None if i == 1 else s.object for i, s in enumerate(specs)]

    monkeypatch.setattr(measures, "readings", stand_in)
    assert not (base == 0).any()
    found = measures.pruning(scene)
    assert zeros == pytest.approx([measures.SHARE] * 2, abs=1 / base.numel())
    assert largest == pytest.approx([2.0, 1.0])
    assert found == {"ua pruned": 0.0, "ua lost by pruning": 0.75, "accuracy of the pruned base": 0.8}
    assert torch.equal(parameters(model)[name], base)


# ------------------------------------------------------------------------------------------------- membranes together

BRIEF = SPM(steps=1, batch=2, rollouts=1, sampling_steps=2)


def test_membranes_of_all_cells_are_joined_wherever_their_edits_lie(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, joined, looks, erase, join = [], [], list[tuple[int, list[Any]]](), measures.erase, GatedEdit.joined
    work, model, rules = scene.folder.parent, scene.model, cells.SHORT

    def erased(model: Model, concept: Any, method: Any, **rest: Any) -> Any:
        made.append(concept.name)
        return erase(model, concept, method, **rest)

    def drawn(model: Model, _rules: Any, specs: Any, _tick: Any) -> Any:
        looks.append((len(model.denoiser.module._forward_pre_hooks), list(specs)))
        return specs

    def audit(folder: Path, *_: Any, **__: Any) -> None:
        Run(folder).write_scores([Score(protocol=rules.id, metric="ua", value=0.75, n=2)])

    def cell(name: str) -> Scene:
        own = Cell(BRIEF, name, 0)
        return replace(scene, cell=own, folder=own.folder(work))

    monkeypatch.setattr(measures, "JOINED", ("bomb", *OBJECTS[:3]))
    monkeypatch.setattr(measures, "erase", erased)
    monkeypatch.setattr(GatedEdit, "joined", lambda edits: (joined.append(list(edits)), join(edits))[1])
    monkeypatch.setattr(cells, "audit", audit)
    for name in ("base_pictures", "draw"):
        monkeypatch.setattr(measures, name, drawn)
    # a judge that takes the first picture it is shown for another object, whether it is a target or not
    monkeypatch.setattr(measures, "read", lambda _, specs: ["another", *(s.object for s in specs[1:])])
    for name in ("bomb", OBJECTS[0]):
        cells.fill(model, None, BRIEF, cell(name).concept, cell(name).folder, rules=rules)
    write_json(cell(OBJECTS[2]).folder / cells.REFUSED, {"error": "no"})

    found, other = (measures.composing(cell(name)) for name in ("bomb", OBJECTS[0]))
    assert [[e.card.concept["name"] for e in edits] for edits in joined] == [["bomb", *OBJECTS[:2]]] * 2
    assert made == [OBJECTS[1]]
    (plain, base), (hooked, edited), (_, rest), _ = looks
    assert plain < hooked
    assert [s.object for s in edited[:2]] == ["bomb"] * 2
    assert edited[2:] == base
    assert not {"bomb", *OBJECTS[:3]} & {s.object for s in (*base, *rest)}
    assert base
    assert rest
    assert not set(base) & set(rest)
    assert found["ua composed"] == other["ua composed"] == 0.5
    assert found["ua lost by composing"] == pytest.approx(0.75 - 0.5)
    assert found["others of the base"] == pytest.approx(1 - 1 / len(base))
    assert found["others composed"] == 1.0


def test_composed_objects_are_no_targets_of_the_bench() -> None:
    assert len(measures.JOINED) == len(set(measures.JOINED)) == 20
    assert not set(measures.JOINED) & set(BENCH_TARGETS)


def test_a_membrane_is_looked_at_on_a_fine_tune_of_its_base(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    model, looks = scene.model, list[tuple[bool, int]]()
    base = parameters(model)["unet.conv_out.weight"].detach().clone()

    def stand_in(_: Scene, specs: Any) -> list[str | None]:
        moved = not torch.equal(parameters(model)["unet.conv_out.weight"], base)
        looks.append((moved, len(model.denoiser.module._forward_pre_hooks)))
        # with the membrane one target of two is gone, and one retained picture of three with it
        gone = len(looks) == 2
        return ["another" if gone and i in (0, 2) else s.object for i, s in enumerate(specs)]

    monkeypatch.setattr(measures, "readings", stand_in)
    monkeypatch.setattr(measures, "JOINED", OBJECTS[:3])
    monkeypatch.setattr(measures, "TUNE", NegGrad(beta=0.0, steps=2, batch=2))
    monkeypatch.setattr(cells, "audit", lambda *_, **__: None)
    own = replace(scene, cell=Cell(BRIEF, "bomb", 0))
    cells.fill(model, None, BRIEF, own.concept, own.folder, rules=cells.SHORT)
    Run(own.folder).write_scores([Score(protocol=cells.SHORT.id, metric="ua", value=0.75, n=2)])
    found = measures.moving(own)
    assert looks == [(True, 0), (True, 1)]
    assert torch.equal(parameters(model)["unet.conv_out.weight"], base)
    assert found == pytest.approx(
        {"ua moved": 0.5, "ua lost by moving": 0.25, "target before": 1.0, "others before": 1.0, "others moved": 2 / 3}
    )
