"""The audit of a class-conditional model, on one that paints what its table says: every number is known beforehand."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from expunge.audit_classes import panel_of
from expunge.auditing import audit
from expunge.concept import Concept, World
from expunge.errors import BadModel, Unsupported
from expunge.judges.classes import ClassPanel
from expunge.protocols import PROTOCOLS
from expunge.records import Card, Run
from expunge.report import build

CLASSES = tuple(f"kind {c}" for c in "abcdefghij")
WORLD = World("fashion", CLASSES, (), {}, ("{c}",), (), labels=True)
RULES = replace(PROTOCOLS["fashion-v1"], id="fashion-small", targets=30, retained=12)
FID, KID, PRECISION, RECALL = (f"{m}_fashion64" for m in ("fid", "kid", "precision", "recall"))
NOISE = 40  # what is painted for no class
TARGET = 4


class Painter:
    """Paints classes: red tells the class, green and blue the seed."""

    name, painter = "painter", "a" * 64

    def __init__(self, world=WORLD):
        self.world, self.hash, self.painted, self.edit = world, "f" * 64, 0, None

    def generate(self, prompts, *, seeds, steps, guidance):
        assert steps is guidance is None
        self.painted += len(prompts)
        return torch.stack([self.picture(CLASSES.index(p), s) for p, s in zip(prompts, seeds, strict=True)])

    def picture(self, label, seed):
        label = self.edit(label) if self.edit else label
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))
        image[0] = math.nan if label == math.inf else label / 51
        return image


class Reader:
    """Reads what Painter paints; sure of what is in its table, of nothing else."""

    classes = CLASSES

    def read(self, images):
        code = (images[:, 0, 0, 0] * 51).nan_to_num(0).round().long()
        known = code < len(CLASSES)
        out = torch.full((len(images), len(CLASSES)), 1 / len(CLASSES))
        out[known] = 0.1 / (len(CLASSES) - 1)
        out[known, code[known]] = 0.9
        return out.masked_fill(~images.isfinite().flatten(1).all(1, keepdim=True), torch.nan)

    def describe(self, images):
        return torch.cat([images[:, :1, 0, 0] * 51, images[:, 1, 0, :3]], 1)


def real(n=40):
    painter = Painter()
    labels = torch.arange(len(CLASSES)).repeat_interleave(n)
    images = torch.stack([painter.picture(int(c), 10_000 + i) for i, c in enumerate(labels)])
    return Reader().describe(images), labels


PANEL = ClassPanel(Reader(), Reader(), *real())


class Change:
    """An edit: a function of the class while it is on."""

    def __init__(self, change):
        self.change = change

    @contextmanager
    def on(self, model):
        model.edit = self.change
        yield model
        model.edit = None


def instead(what):
    return Change(lambda label: what if label == TARGET else label)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setitem(PROTOCOLS, RULES.id, RULES)
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path / "run", Concept(CLASSES[TARGET], kind="class"))


def new_run(folder, *concepts):
    folder.mkdir()
    first, *rest = [c.to_json() for c in concepts]
    what = {"method": "sfd", "settings": {}, "concept": first, "also": rest}
    cost = {"seconds": 12.5, "peak_bytes": 1000}
    Run(folder).write_card(Card(**what, **cost, model="painter", base_hash="f" * 64, seed=0, version="0"))
    return folder


def prove(run, edit, model=None, **more):
    found = audit(run, RULES.id, model=model or Painter(), edit=edit, panel=PANEL, **more)
    return {s.metric: s for s in found}


def test_an_edit_that_does_nothing(run):
    s = prove(run, instead(TARGET))
    assert list(s) == list(RULES.metrics)
    assert (s["ua"].value, s["ua"].base, s["ua"].n, s["ira"].value, s["h"].value) == (0, 0, 30, 1, 0)
    assert (s["ira"].n, s[FID].n, s[PRECISION].n, s[RECALL].n) == (108, 108, 108, 108)
    assert s[FID].value == s[FID].base
    assert s[FID].value < 0.2
    assert s[FID].low < s[FID].value < s[FID].high
    assert min(s[PRECISION].value, s[RECALL].value) > 0.7
    assert s["probability"].value == pytest.approx(0.9)
    assert {v.p for k, v in s.items() if v.p is not None} == {1.0}


def test_a_perfect_edit(run):
    s = prove(run, instead(5))
    assert (s["ua"].value, s["ira"].value, s["h"].value) == (1, 1, 1)
    assert s["ua"].p < 1e-6
    assert s["probability"].value == pytest.approx(0.1 / 9)
    assert s["probability"].base == pytest.approx(0.9)
    assert s["entropy"].value == pytest.approx(s["entropy"].base)
    assert s[FID].value == s[FID].base
    assert (s["seconds"].value, s["peak_memory"].value) == (12.5, 1000)


def test_noise_is_told_from_another_class_by_its_entropy(run):
    s = prove(run, instead(NOISE))
    assert s["ua"].value == 1
    assert s["entropy"].value == pytest.approx(math.log(10))
    assert s["entropy"].base < 1


def test_damage_to_the_rest_shows_in_every_distance(run):
    base = prove(run, instead(TARGET))
    s = prove(run, Change(lambda label: NOISE if label in (1, 2, 3) else label))
    assert s["ira"].value == pytest.approx(6 / 9)
    assert s[FID].value > 10 * base[FID].value
    assert s[FID].p < 0.01
    assert s[PRECISION].value < base[PRECISION].value - 0.2
    rows = Run.open(run).neighbours
    assert {r["name"] for r in rows[:3]} == set(CLASSES[1:4])
    assert len(rows) == 9
    assert all(r["text_similarity"] is None and -1 <= r["image_similarity"] <= 1 for r in rows)


def test_lost_variety_shows_in_recall(run):
    base = prove(run, instead(TARGET))
    s = prove(run, Change(lambda label: 0 if label in (1, 2, 3) else label))
    assert s[RECALL].value < base[RECALL].value - 0.2
    assert s[RECALL].p < 0.01
    assert s[PRECISION].value > base[PRECISION].value - 0.05


def test_a_picture_that_cannot_be_scored_is_an_error_never_a_success(run):
    s = prove(run, instead(math.inf))
    assert (s["ua"].value, s["ua"].n, s["ua"].errors) == (0, 0, 30)
    assert (s["probability"].value, s["entropy"].errors) == (None, 30)
    assert s["ira"].errors == 0


def test_one_erased_class_in_place_of_another_is_no_success(tmp_path):
    run = new_run(tmp_path / "both", *(Concept(CLASSES[i], kind="class") for i in (TARGET, 5)))
    assert prove(run, instead(5))["ua"].value == 0
    s = prove(run, Change(lambda label: 0 if label in (TARGET, 5) else label))
    assert (s["ua"].value, s["ira"].n) == (1, 96)


def test_the_run_folder_afterwards_makes_a_report(run):
    prove(run, instead(5))
    opened = Run.open(run)
    assert {s.protocol for s in opened.scores} == {RULES.id}
    assert {r["role"] for r in opened.samples} >= {"target", "neighbour"}
    first = opened.outcomes[0]
    assert (first["base"]["object"], first["edited"]["object"]) == (CLASSES[TARGET], CLASSES[5])
    page = build([opened])
    assert CLASSES[TARGET] in page
    assert "FID to real pictures (fashion64)" in page
    assert "Other classes" in page
    # a protocol of classes has no CRA, and its verdict is not unknown for that
    assert "not fully measured" not in page


def test_of_a_distillation_retention_is_measured(run):
    Run(run).write_card(replace(Run(run).card, method="sid", concept={}))
    s = prove(run, instead(5))
    assert list(s) == [m for m in RULES.metrics if m not in ("ua", "h", "probability", "entropy")]
    assert (s["ira"].n, s["ira"].base, s["ira"].value) == (120, 1, 0.9)
    page = build([Run.open(run)])
    assert "Distilling painter" in page
    assert "FID to real pictures (fashion64)" in page


def test_base_pictures_are_shared_between_classes(run, tmp_path):
    first = Painter()
    prove(run, instead(5), first)
    n = len(Run.open(run).outcomes)
    assert (n, first.painted) == (138, 276)
    other = Painter()
    prove(new_run(tmp_path / "other", Concept("7", kind="class")), instead(5), other)
    # the 12 of the class that was the target are the first of its 30; the new target lacks 18
    assert other.painted == n + 18


def test_what_cannot_be_audited(run, tmp_path):
    with pytest.raises(Unsupported, match=r"'shoes'.*fashion-v1 \(fashion\)"):
        prove(run, instead(5), Painter(replace(WORLD, name="shoes")))
    with pytest.raises(Unsupported, match="judges models of the world 'emoji'; this model's world is 'fashion'"):
        audit(run, "emoji-v1", model=Painter(), edit=instead(5), panel=PANEL)
    style = new_run(tmp_path / "style", Concept(CLASSES[0], kind="object"))
    assert prove(style, Change(lambda label: 1 if label == 0 else label))["ua"].value == 1


def test_judges_come_from_the_models_folder_where_none_are_shipped(tmp_path):
    with pytest.raises(BadModel, match=str(tmp_path / "judge-b.safetensors")):
        panel_of(PROTOCOLS["cifar10-v1"], str(tmp_path))


def test_a_judge_that_does_not_know_the_world_is_refused(run):
    class Small(Reader):
        classes = CLASSES[:4]

    with pytest.raises(BadModel, match="kind e"):
        audit(run, RULES.id, model=Painter(), edit=instead(5), panel=replace(PANEL, scorer=Small()))
