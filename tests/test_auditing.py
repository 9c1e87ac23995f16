"""The audit on a model that paints what its table says: every number is known beforehand."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge import auditing
from expunge.auditing import asked, audit, shown
from expunge.concept import Concept, World
from expunge.errors import BadEdit, BadModel, BadRun, ConceptError, NotCached, StorageError, Unsupported
from expunge.judges.classifier import Reading
from expunge.judges.panel import Panel
from expunge.kernel.condition import Condition
from expunge.protocols import METRICS, PROTOCOLS, PictureSpec
from expunge.records import Card, Run
from expunge.storage import cache_root

STYLES = tuple(f"s{i}" for i in range(4))
OBJECTS = tuple(f"thing {chr(97 + i)}" for i in range(20))
WORLD = World("emoji", OBJECTS, STYLES, {"thing c": ("object cee",)}, (), ())
TARGET = "thing c"


class Painter:
    """Paints prompts: red tells the object, green the style, blue the seed."""

    def __init__(self, world=WORLD, name="painter"):
        self.world, self.name, self.hash, self.painter = world, name, "f" * 64, "a" * 64
        self.painted, self.edit = 0, None
        self.sampler, self.one_step = "DDIMScheduler, trailing", None

    def encode(self, prompts):
        # thing a, b, c, ... lie on a line: neighbours in the alphabet are neighbours here
        names = [
            next((w for w in (*OBJECTS, *STYLES) if w in p.split(" style")[0] or p.endswith(w)), "") for p in prompts
        ]
        at = torch.tensor([float(([*OBJECTS, *STYLES, ""]).index(n)) for n in names])
        return Condition(torch.stack([at.mul(0.3).cos(), at.mul(0.3).sin()], 1)[:, None])

    def generate(self, prompts, *, seeds, steps, guidance):
        assert (steps, guidance) == (20, 5.0)
        self.painted += len(prompts)
        images = torch.zeros(len(prompts), 3, 64, 64)
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            thing = next(i for i, o in enumerate(OBJECTS) if prompt.endswith(o))
            style = next((i for i, s in enumerate(STYLES) if f"a {s} style" in prompt), seed % len(STYLES))
            if self.edit:
                thing, style = self.edit(thing, style)
            image[0], image[1] = thing / 51, style / 51
            image[2] = torch.rand(64, 64, generator=torch.Generator().manual_seed(seed))
            if thing == math.inf:
                image[:] = math.nan
        return images


class Reader:
    """Reads what Painter paints; confident in what is in its table, not at all in anything else."""

    objects, styles = OBJECTS, STYLES

    def read(self, images):
        code = (images[:, :2, 0, 0] * 51).nan_to_num(0).round().long()
        known = code[:, 0] < len(OBJECTS)
        objects = torch.full((len(images), len(OBJECTS)), 0.1 / (len(OBJECTS) - 1))
        objects[known, code[known, 0]] = 0.9
        objects[~known] = 1 / len(OBJECTS)
        styles = torch.nn.functional.one_hot(code[:, 1], len(STYLES)).float()
        lost = ~images.isfinite().flatten(1).all(1, keepdim=True)
        return Reading(objects.masked_fill(lost, torch.nan), styles.masked_fill(lost, torch.nan))

    def prototypes(self):
        # every tenth of the alphabet looks alike, which is not what their prompts say
        return {o: np.array([math.cos(i % 10), math.sin(i % 10), 1.0]) for i, o in enumerate(OBJECTS)}

    def depths(self, images):
        return [images, torch.nn.functional.avg_pool2d(images, 16)]


PANEL = Panel(Reader(), Reader())


class Change:
    """An edit: a function of (object, style) while it is on."""

    def __init__(self, change):
        self.change = change

    @contextmanager
    def on(self, model):
        model.edit = self.change
        yield model
        model.edit = None


NOTHING = Change(lambda thing, style: (thing, style))
C = OBJECTS.index(TARGET)
PERFECT = Change(lambda thing, style: (0 if thing == C else thing, style))
NOISE = Change(lambda thing, style: (45 if thing == C else thing, style))
BROKEN = Change(lambda thing, style: (math.inf if thing == C else thing, style))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return a cache that tests share; what the cache itself does is tested on `fresh`."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("EXPUNGE_CACHE", str(drawn))
    return new_run(tmp_path / "run", Concept(TARGET))


@pytest.fixture
def fresh(run, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    return run


@pytest.fixture(scope="module")
def perfect(tmp_path_factory, drawn):
    """Return the folder and the scores of one audit of the perfect edit."""
    folder = new_run(tmp_path_factory.mktemp("perfect") / "run", Concept(TARGET))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_CACHE", str(drawn))
        return folder, prove(folder, PERFECT)


def new_run(folder, *concepts):
    folder.mkdir()
    Run(folder).write_card(new_card(*concepts))
    return folder


def new_card(*concepts):
    first, *rest = [c.to_json() for c in concepts]
    cost = {"seconds": 12.5, "peak_bytes": 1000}
    what = {"method": "sdd", "settings": {}, "concept": first, "also": rest}
    return Card(**what, **cost, model="painter", base_hash="f" * 64, seed=0, version="0")


def prove(run, edit, model=None, **more):
    return {s.metric: s for s in audit(run, model=model or Painter(), edit=edit, panel=PANEL, **more)}


def test_an_edit_that_does_nothing(run):
    s = prove(run, NOTHING)
    assert (s["ua"].value, s["ua"].base, s["ua"].p) == (0.0, 0.0, 1.0)
    assert (s["ira"].value, s["cra"].value, s["h"].value) == (1.0, 1.0, 0.0)
    assert s["fid"].value == pytest.approx(0, abs=1e-6)
    assert s["perceptual"].value == pytest.approx(0, abs=1e-9)


def test_a_perfect_edit(perfect):
    _, s = perfect
    assert (s["ua"].value, s["ira"].value, s["cra"].value, s["h"].value) == (1.0, 1.0, 1.0, 1.0)
    assert s["ua"].base == 0.0
    assert s["ua"].p < 1e-10
    assert s["ua"].low > 0.9
    assert s["perceptual"].value == pytest.approx(0, abs=1e-9)
    assert (s["seconds"].value, s["peak_memory"].value) == (12.5, 1000.0)
    assert list(s) == list(METRICS)


def test_noise_raises_ua_but_not_silently(run):
    s = prove(run, NOISE)
    assert s["ua"].value == 1.0
    assert s["degenerate_target"].value == 1.0
    assert s["degenerate_target"].base == 0.0
    assert 0 < s["degenerate"].value < 1


def test_a_picture_that_cannot_be_scored_is_an_error_never_a_success(run):
    s = prove(run, BROKEN)
    assert (s["ua"].value, s["ua"].n, s["ua"].errors) == (0.0, 0, 48)
    assert s["degenerate_target"].value == 1.0
    assert s["ira"].errors == 0
    rows = [r for r in Run.open(run).outcomes if r["role"] == "target"]
    assert {r["edited"]["object"] for r in rows} == {None}


def test_without_a_clip_model_the_score_is_an_error(perfect):
    score = perfect[1]["clip_score"]
    assert (score.value, score.n) == (None, 0)
    assert score.errors > 0


def test_damage_finds_the_hurt_neighbour(run):
    hurt = OBJECTS.index("thing d")
    s = prove(run, Change(lambda thing, style: (0 if thing in (C, hurt) else thing, style)))
    rows = Run.open(run).neighbours
    assert rows[0]["name"] == "thing d"
    assert rows[0]["damage"] == pytest.approx(0.9 - 0.1 / 19)
    assert max(r["damage"] for r in rows[1:]) == 0
    assert s["ira"].value < 1
    assert s["perceptual"].value > 0
    nearest_two = sorted((r for r in rows), key=lambda r: -r["text_similarity"])[:2]
    assert {r["name"] for r in nearest_two} == {"thing b", "thing d"}


def test_the_run_folder_afterwards(perfect):
    run, _ = perfect
    opened = Run.open(run)
    assert [s.metric for s in opened.scores] == list(METRICS)
    assert {s.protocol for s in opened.scores} == {"emoji-v1"}
    assert {r["role"] for r in opened.outcomes} == {"target", "retain"}
    assert {r["role"] for r in opened.samples} == {"target", "neighbour"}  # 20 objects: all of them are near
    assert len([r for r in opened.samples if r["role"] == "target"]) == 8
    for row in opened.samples:
        assert (run / "samples" / row["base"]).is_file()
        assert (run / "samples" / row["edited"]).is_file()
    assert (run / "samples/sheet.png").stat().st_size > 1000
    first = opened.outcomes[0]
    assert (first["base"]["object"], first["edited"]["object"]) == (TARGET, OBJECTS[0])


def test_the_second_audit_makes_no_base_pictures(fresh, tmp_path):
    first = Painter()
    scores = prove(fresh, PERFECT, first)
    n = len(Run.open(fresh).outcomes)
    assert first.painted == 2 * n
    second = Painter()
    assert prove(fresh, PERFECT, second) == scores
    assert second.painted == n
    other = Painter()
    prove(new_run(tmp_path / "other", Concept("thing k")), PERFECT, other)
    assert n < other.painted < 2 * n


def test_a_damaged_or_foreign_cache_is_not_trusted(fresh):
    prove(fresh, PERFECT)
    n = len(Run.open(fresh).outcomes)
    files = sorted(cache_root().rglob("*.png"))
    assert len(files) == n
    files[0].write_bytes(files[0].read_bytes()[:40])
    files[1].write_bytes(b"")
    again = Painter()
    assert prove(fresh, PERFECT, again)["ua"].value == 1.0
    assert again.painted == n + 2
    renamed = Painter()
    renamed.hash = "e" * 64
    Run.open(fresh).write_card(replace(Run.open(fresh).card, base_hash="e" * 64))
    prove(fresh, PERFECT, renamed)
    assert renamed.painted == 2 * n


def test_a_cache_that_cannot_be_written_costs_time_only(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "file"))
    with pytest.warns(NotCached, match="not kept"):
        assert prove(run, PERFECT)["ua"].value == 1.0


def test_broken_base_pictures_are_not_kept(fresh):
    class Faulty(Painter):
        def generate(self, prompts, **how):
            return super().generate(prompts, **how) * torch.nan

    s = prove(fresh, NOTHING, Faulty())
    assert s["ira"].n == 0
    assert s["fid"].value is None
    assert not list(cache_root().rglob("*.png"))


def test_a_style_is_judged_by_its_style(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("EXPUNGE_CACHE", str(drawn))
    run = new_run(tmp_path / "run", Concept("s1", kind="style"))
    s = prove(run, Change(lambda thing, style: (thing, 0 if style == 1 else style)))
    assert (s["ua"].value, s["ira"].value, s["cra"].value) == (1.0, 1.0, 1.0)
    assert s["ua"].base == 0.0
    assert {r["role"] for r in Run.open(run).outcomes} == {"style"}
    assert {r["name"] for r in Run.open(run).neighbours} == set(STYLES) - {"s1"}


def test_several_targets_are_each_their_own(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("EXPUNGE_CACHE", str(drawn))
    run = new_run(tmp_path / "run", Concept(TARGET), Concept("thing d"))
    assert prove(run, PERFECT)["ua"].value == 0.5


def test_one_erased_concept_in_place_of_another_is_no_success(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("EXPUNGE_CACHE", str(drawn))
    run = new_run(tmp_path / "run", Concept(TARGET), Concept("thing d"))
    d = OBJECTS.index("thing d")
    swapped = Change(lambda thing, style: (C + d - thing if thing in (C, d) else thing, style))
    gone = Change(lambda thing, style: (0 if thing in (C, d) else thing, style))
    assert (prove(run, swapped)["ua"].value, prove(run, gone)["ua"].value) == (0, 1)


def test_of_a_distillation_retention_is_measured(tmp_path, monkeypatch, drawn):
    monkeypatch.setenv("EXPUNGE_CACHE", str(drawn))
    run = new_run(tmp_path / "run", Concept(TARGET))
    Run(run).write_card(replace(Run(run).card, method="sid", concept={}))
    s = prove(run, PERFECT)
    assert list(s) == [m for m in METRICS if m not in ("ua", "h", "degenerate_target")]
    assert s["ira"].base == 1
    # the target's pictures are among the retained ones now, and they have changed
    assert s["ira"].value < 1
    assert s["cra"].value == 1
    assert {r["role"] for r in Run(run).outcomes} == {r["role"] for r in Run(run).samples} == {"retain"}
    assert Run(run).neighbours == []


def test_a_label_that_the_world_does_not_know_is_told_with_what_to_do(tmp_path):
    run = new_run(tmp_path / "run", Concept("my mascot", images=tmp_path))
    with pytest.raises(ConceptError, match=r"no object 'my mascot'.*expunge generate.*expunge rate"):
        prove(run, PERFECT)


def test_a_protocol_of_ones_own(run):
    small = replace(PROTOCOLS["emoji-v1"], id="small", targets=8, retained=10, near=2)
    prove(run, PERFECT)
    s = {s.metric: s for s in audit(run, small, model=Painter(), edit=PERFECT, panel=PANEL)}
    assert (s["ua"].protocol, s["ua"].n, s["ira"].n) == ("small", 8, 10)
    # one neighbour by its prompt, one by its look
    assert {r["concept"] for r in Run(run).outcomes if r["part"] == "neighbour"} == {"thing b", "thing m"}
    # its samples are fewer, and none of the former audit's are left
    named = {r[side] for r in Run(run).samples for side in ("base", "edited")}
    assert {p.name for p in (run / "samples").iterdir()} == named | {"index.json", "sheet.png"}


def test_another_sampler_is_refused_unless_it_is_a_one_step_generator_s(run):
    other = Painter()
    other.sampler = "EulerDiscreteScheduler, leading"
    with pytest.raises(Unsupported, match=r"emoji-v1 draws with DDIM.*comes with EulerDiscreteScheduler, leading"):
        prove(run, PERFECT, model=other)
    assert other.painted == 0
    other.one_step = object()
    assert prove(run, PERFECT, model=other)["ua"].value == 1


def test_synonyms_and_names_lead_to_the_world():
    card = new_card(Concept("object cee"), Concept("x", names=("thing a", "thing b")))
    assert asked(card, WORLD) == ("object", ("thing c", "thing a", "thing b"))


def test_mixed_kinds_are_refused():
    with pytest.raises(Unsupported, match="object, style"):
        asked(new_card(Concept(TARGET), Concept("s1", kind="style")), WORLD)


def test_progress_counts_pictures(fresh):
    seen = []
    prove(fresh, PERFECT, progress=lambda *step: seen.append(step))
    n = len(Run.open(fresh).outcomes)
    assert seen[0] == ("base pictures", 0, n)
    assert ("base pictures", n, n) in seen
    assert seen[-1] == ("edited pictures", n, n)


def test_what_cannot_be_audited(run, tmp_path):
    with pytest.raises(Unsupported, match="none that is known"):
        prove(run, PERFECT, Painter(world=None))
    with pytest.raises(Unsupported, match="'mine'"):
        prove(run, PERFECT, Painter(world=replace(WORLD, name="mine")))
    with pytest.raises(Unsupported, match="emoji-v1 judges models of the world 'emoji'"):
        audit(run, "emoji-v1", model=Painter(replace(WORLD, name="fashion")), edit=PERFECT, panel=PANEL)
    with pytest.raises(Unsupported, match="emoji-v1"):
        audit(run, "emoji-v9", model=Painter(), edit=PERFECT, panel=PANEL)
    with pytest.raises(BadRun):
        prove(tmp_path / "nowhere", PERFECT)
    other = Painter()
    other.hash = "0" * 64
    with pytest.raises(BadEdit, match="000000"):
        prove(run, PERFECT, other)
    assert not Run.open(run).scores


def test_a_judge_that_does_not_know_the_world_is_refused(run):
    class Small(Reader):
        objects = OBJECTS[:5]

    with pytest.raises(BadModel, match="thing"):
        audit(run, model=Painter(), edit=PERFECT, panel=Panel(Small(), Reader()))


def test_a_full_disk_leaves_no_scores(fresh, monkeypatch):
    def full(path, data):
        raise StorageError("disk full")

    monkeypatch.setattr(auditing, "write_atomic", full)
    with pytest.warns(NotCached, match="not kept"), pytest.raises(StorageError):
        prove(fresh, PERFECT)
    assert not Run.open(fresh).scores


def test_shown_pairs_are_targets_then_the_most_damaged_then_others():
    specs = [PictureSpec("target", "t", f"t{i}", i, "t", None) for i in range(48)]
    specs += [PictureSpec("neighbour", f"n{i // 2}", f"n{i}", i, "n", "s") for i in range(8)]
    specs += [PictureSpec("retain", f"r{i}", f"r{i}", i, "r", "s") for i in range(30)]
    pairs = shown(specs, ["n2", "n0", "n1", "n3"])
    assert [r for r, _ in pairs] == ["target"] * 8 + ["neighbour"] * 8 + ["retain"] * 8
    assert len(set(pairs)) == 24
    assert [specs[i].concept for _, i in pairs[8:12]] == ["n2", "n0", "n1", "n3"]


def test_the_judge_that_scores_is_not_the_one_whose_features_are_measured():
    assert PROTOCOLS["emoji-v1"].scorer != PROTOCOLS["emoji-v1"].trunk
