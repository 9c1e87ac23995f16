"""The bench of classes: its command on a small world from end to end, what its tables say, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from expunge import audit_classes, cli
from expunge.backbones import load, tiny
from expunge.backbones.classcond import ClassModel, Labels
from expunge.bench import cells, class_table, classes, onestep
from expunge.bench.class_table import ALONE, Row, faster, rows, standing
from expunge.bench.classes import ANCHORS, ARMS, RETRAIN, Bench, built, starts_in_steps
from expunge.concept import Concept, World
from expunge.distill import SiD, distill
from expunge.errors import Unsupported
from expunge.judges.classes import REAL, ClassJudge, save_judge, save_real
from expunge.kernel.model import Model
from expunge.metrics.rates import wilson
from expunge.protocols import PROTOCOLS, ClassProtocol
from expunge.records import Run, Score
from expunge.storage import write_json
from expunge.zoo.fashion.world import SOURCES
from expunge.zoo.gold import gold

CLASSES = ("T-shirt/top", "Ankle boot", "Dress", "Bag", "Coat")
RULES = replace(PROTOCOLS["fashion-v1"], targets=6, retained=2, hashes=())
assert isinstance(RULES, ClassProtocol)
FID, KID, RECALL = (RULES.sets[m] for m in ("fid", "kid", "recall"))
QUICK = (
    "neggrad alpha=0 steps=1 batch=2",
    "ssd draws=2 rollouts=2 sampling_steps=2",
    "erasediff target=noise steps=0 batch=2",
    "uce",  # reads text
    "sfd steps=1 batch=2 probe=0",
)
SFD = QUICK[-1]
ASKED = ["Dress", "T-shirt/top"]


def pipeline(folder: Path, seed: int = 0) -> Path:
    """Write a small model of a part of the world `fashion`, and judges that have learned nothing beside it."""
    pipe = tiny.class_pipeline(seed=seed)
    pipe.unet.register_to_config(sample_size=32)  # the size that judges read
    ClassModel(pipe, "fashion", Labels("fashion", CLASSES, steps=2)).save(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        scorer, network = ClassJudge("b", CLASSES).eval(), ClassJudge("features", CLASSES).eval()
    network.name = RULES.network
    save_judge(scorer, folder / f"{RULES.scorer}.safetensors")
    save_judge(network, folder / "features.safetensors")
    pictures = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_real(folder / REAL, network.describe(pictures), torch.arange(20) % len(CLASSES), network)
    return folder


@dataclass(frozen=True)
class Place:
    """A model, its one-step generator, retrained models, and where the bench works."""

    model: Path
    generator: Path
    gold: Path
    work: Path
    known: Path

    def bench(self, *options: str, work: Path | None = None) -> int:
        """Run the command on all of it."""
        given = {"--model": self.model, "--work": work or self.work, "--known": self.known}
        return cli.main(["bench", "classes", *(str(x) for pair in given.items() for x in pair), *options])

    def whole(self, *options: str, work: Path | None = None) -> int:
        """Run the command with everything it takes."""
        given = ("--methods", ",".join(QUICK), "--classes", "Dress,0", "--generator", str(self.generator))
        return self.bench(*given, "--gold", str(self.gold), *options, work=work)

    def open(self, work: Path | None = None) -> Bench:
        """Return what the command makes of it."""
        return classes.opened(str(self.model), str(self.generator), self.gold, QUICK, work or self.work, "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A small world; audits of it take a handful of pictures."""
    root = tmp_path_factory.mktemp("classes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, RULES.id, RULES)
        patch.setattr(audit_classes, "ZOO", root)  # judges that are shipped would be taken
        patch.setenv("EXPUNGE_CACHE", str(root / "cache"))
        model = pipeline(root / "model")
        distill(load(model), SiD(steps=1, batch=2, probe=0), out=root / "one-step")
        pipeline(root / "retrained", seed=1)
        dress = [Concept("Dress", kind="class")]
        gold(str(model), root / "retrained", dress, root / "gold" / "dress", root / "no.log")
        yield Place(model, root / "one-step", root / "gold", root / "work", root / "known.jsonl")


@pytest.fixture(scope="module")
def done(place: Place) -> str:
    """The table of a whole run."""
    table, figure = place.work.parent / "table.md", place.work.parent / "figure.png"
    assert place.whole("--table", str(table), "--figure", str(figure)) == 0
    return table.read_text()


# ---------------------------------------------------------------------------------------------------------- the command


def test_every_arm_starts_from_its_own_base_and_is_audited(place: Place, done: str) -> None:
    bench = place.open()
    assert bench.generator is not None
    assert bench.generator.hash != bench.model.hash
    for arm in (*QUICK[:3], SFD):
        for name in ASKED:
            card = Run(bench.folder(arm, name)).card
            assert card.base_hash == (bench.generator if arm == SFD else bench.model).hash
            assert card.concept["anchor"] == ANCHORS["fashion"][name]
            assert cells.scores_of(bench.folder(arm, name), RULES)["ua"].n == RULES.targets
    assert Run(bench.folder(QUICK[1], "Dress")).card.settings["group"] == "conditioning"
    assert sorted(p.name for p in (place.work / RETRAIN).glob("[!.]*")) == ["Dress"]
    for wanted in (
        f"| (base) | {place.model} | 2 |",
        f"| (base) | {place.generator} | 2 |",
        f"| {SFD} | {place.generator} | 2 |",
        f"| {RETRAIN} | {place.model} | 1 |",
        f"| T-shirt/top | {SFD} |",
        "retrain: no model that was retrained without T-shirt/top.",
        "uce on Dress, T-shirt/top: uce needs a model that reads text",
        f"| UA | - | - | {ALONE} |",
        "One-step sampling is ",
        "times as fast as the base's 50 steps at guidance 1: median of 3 repeats",
    ):
        assert wanted in done


def test_what_is_there_is_not_made_again(
    place: Place, done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    for room, name in ((cells, "erase"), (cells, "audit"), (classes, "audit"), (onestep, "_timed")):
        monkeypatch.setattr(room, name, never)
    for work in (place.work, tmp_path / "elsewhere"):
        assert place.whole(work=work) == 0
        assert capsys.readouterr().out == done + "\n"
    # a cell of another model, or of a generator that is another, begins anew
    bench = place.open()
    assert bench.todo(QUICK, ASKED) == []
    other = replace(bench, generator=replaced(bench.generator))
    assert other.todo(QUICK, ASKED) == [(SFD, c) for c in ASKED]
    # pictures need the edit itself, which the file of found cells does not hold
    assert place.whole("--figure", str(tmp_path / "f.png"), work=tmp_path / "elsewhere") == cli.EXPECTED_ERROR
    assert f"no edit of '{SFD}' lies under" in capsys.readouterr().err


def quiet(*_: Any) -> None:
    """No progress."""


def replaced(model: Model | None) -> Any:
    """Return a stand-in of another hash."""
    assert model is not None

    class Other:
        name, hash = model.name, "0" * 64

    return Other()


def test_the_figure_has_a_column_a_class_and_shows_what_it_drew_before_and_after(place: Place, done: str) -> None:
    sheet = Image.open(place.work.parent / "figure.png")
    assert sheet.text["columns"] == "Dress, T-shirt/top"
    side = 32 * onestep.ZOOM + 4
    assert sheet.size == (2 * side + 4, 2 * onestep.SAMPLES * side + 4)
    bench = place.open()
    assert bench.generator is not None
    drawn = bench.generator.generate(["T-shirt/top"], seeds=[1])[0, 0]
    at = sheet.getpixel((4 + side, 4 + side))
    assert isinstance(at, tuple)
    assert abs(at[0] / 255 - float(drawn[0, 0])) < 0.01


def test_a_retrained_model_s_cell_belongs_to_its_run(place: Place, done: str) -> None:
    bench = place.open()
    assert bench.whole(RETRAIN, "Dress")
    assert replace(bench, gold={}).whole(RETRAIN, "Dress")
    run = bench.gold["Dress"]

    class Again:
        card = replace(run.card, created="later")

    again: Any = replace(bench, gold={"Dress": Again()})
    assert again.todo([RETRAIN], ASKED) == [(RETRAIN, "Dress")]
    other: Any = replace(bench, model=replaced(bench.model), gold={})
    assert not other.whole(RETRAIN, "Dress")


def test_the_speed_is_timed_by_turns_and_by_one_process(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, order = replace(place.open(), work=tmp_path), list[str]()

    def timed(model: Model, names: list[str]) -> float:
        order.append("one" if model.one_step else "base")
        assert len(names) == onestep.TIMED
        return 0.5 if model.one_step else 30.0 + len(order)

    monkeypatch.setattr(onestep, "_timed", timed)
    with cells.claimed(tmp_path / onestep.SPEED):
        assert onestep.speed(bench, quiet) == {}
    found = onestep.speed(bench, quiet)
    assert order == ["base", "one"] * 3
    assert found["seconds"] == [[31.0, 0.5], [33.0, 0.5], [35.0, 0.5]]
    assert "is 66.0 times as fast as the base's 50 steps" in faster(found)
    assert "62.0 to 70.0" in faster(found)
    assert onestep.speed(bench, quiet) == found
    assert len(order) == 6
    assert onestep.speed(replace(bench, generator=None), quiet) == {}
    # times of other weights are no longer theirs
    write_json(tmp_path / onestep.SPEED / cells.MEASURES, found | {"hashes": ["0" * 64, "1" * 64]})
    assert onestep.speed(bench, quiet)["hashes"] == found["hashes"]
    assert len(order) == 12
    assert "not measured" in faster({})


# ------------------------------------------------------------------------------------------------------------- the arms


def test_anchors_are_pairs_of_what_looks_unlike() -> None:
    for rules in PROTOCOLS.values():
        if isinstance(rules, ClassProtocol):
            found = ANCHORS[rules.world]
            assert set(found) == set(SOURCES[rules.world].classes)
            assert all(found[anchor] == name != anchor for name, anchor in found.items())
    upper, shoes = {"T-shirt/top", "Pullover", "Dress", "Coat", "Shirt"}, {"Sandal", "Sneaker", "Ankle boot"}
    for alike in (upper, shoes):
        assert not alike & {ANCHORS["fashion"][name] for name in alike}


def test_classes_are_asked_for_by_name_by_number_or_so_many_of_them(place: Place) -> None:
    asked = place.open().asked
    assert asked(["dress", "0", "Dress"]) == ["Dress", "T-shirt/top"]
    assert asked(["2"]) == list(CLASSES[:2])
    assert asked([]) == list(CLASSES)


def test_arms_train_what_reads_the_class_unless_told_otherwise() -> None:
    assert [built(arm).group for arm in ("ssd", "esd", "esd group=all", "sdd", "salun")] == [
        "conditioning", "conditioning", "all", "conditioning", "all",
    ]  # fmt: skip
    assert built("ssd group=text-readers").group == "text-readers"
    assert [arm for arm in ARMS if not starts_in_steps(arm)] == [arm for arm in ARMS if arm.startswith("sfd")]
    assert classes.arms([], None) == list(ARMS)
    assert classes.arms(["ssd"], Path()) == ["ssd", RETRAIN]
    assert classes.arms([RETRAIN], Path()) == [RETRAIN]


# ----------------------------------------------------------------------------------------------------------- the tables


def scored(n: int = 100, seconds: float = 5.0, **values: tuple[float, float]) -> Mapping[str, Score]:
    """Return scores of a cell: metric=(value, base)."""
    usual = {"ua": (1.0, 0.0), "ira": (0.9, 0.95), FID: (2.2, 2.0), KID: (0.02, 0.01), RECALL: (0.5, 0.6)}
    usual |= {RULES.sets["precision"]: (0.7, 0.7), "entropy": (0.2, 0.1), "probability": (0.01, 0.9)}
    found = {m: Score(protocol=RULES.id, metric=m, value=v, base=b, n=n) for m, (v, b) in (usual | values).items()}
    return found | {"seconds": Score(protocol=RULES.id, metric="seconds", value=seconds)}


def test_a_row_pools_pictures_and_compares_with_its_own_base() -> None:
    found = {
        "esd": {"Bag": scored(ua=(1.0, 0.0)), "Coat": scored(ua=(0.5, 0.1), ira=(0.93, 0.95), **{FID: (1.0, 2.0)})},
        "sfd": {"Bag": scored(ua=(0.9, 0.02), ira=(0.8, 0.8))},
        RETRAIN: {},
    }
    bases = {"esd": "many", "sfd": "one", RETRAIN: "many"}
    got = {(r.arm, r.base): r for r in rows(found, bases, RULES)}
    assert list(got) == [("(base)", "many"), ("(base)", "one"), ("esd", "many"), ("sfd", "one")]
    esd: Row = got["esd", "many"]
    assert esd.ua == pytest.approx((0.75, *(wilson(150, 200) or ())))
    assert esd.worst == (0.5, "Coat")
    assert esd.retained == pytest.approx((-3.5, -5.0, -2.0))
    assert esd.fid == pytest.approx((0.8, 0.5, 1.1))
    assert esd.means["seconds"] == 5
    assert got["sfd", "one"].retained[0] == 0
    base = got["(base)", "many"]
    assert (base.ua[0], base.retained[0], base.fid[0], base.means[KID]) == (0.05, 0, 1, 0.01)
    assert base.means["seconds"] is None
    assert class_table.line(base).endswith("| 0.1 | 0.9 | - |")
    assert len(class_table.by_class(found, ["Coat", "Bag"], RULES)) == 3
    assert class_table.by_class(found, ["Coat"], RULES)[0].startswith(
        "| Coat | esd | 0.5 (0.1) | 0.93 (0.95) | 1 (2) |"
    )


def test_the_gold_standard_is_held_against_the_best_other_arm() -> None:
    def both(**values: tuple[float, float]) -> dict[str, Mapping[str, Score]]:
        return {c: scored(**values) for c in ("Bag", "Coat")}

    # entropy is better where it is lower; 0.98 lies in the interval of 0.97, 200 pictures
    gold = both(ua=(0.97, 0.0), ira=(0.95, 0.95), entropy=(0.5, 0.1), **{FID: (2.0, 2.0)})
    best = both(ua=(0.98, 0.0), ira=(0.96, 0.95), entropy=(0.3, 0.1), **{FID: (2.1, 2.0)})
    worse = both(ua=(0.2, 0.0), entropy=(0.4, 0.1), **{FID: (9.0, 2.0)})
    told = {line.split(" | ")[0]: line for line in standing({"a": worse, "b": best, RETRAIN: gold}, RULES)}
    assert told["| UA"].startswith("| UA | 0.970 [")
    assert told["| UA"].endswith("| b 0.980 | within its interval |")
    # two classes that say the same leave the pictures' own error
    assert told["| retained accuracy less the base's, points"].endswith("| b 1.000 | within its interval |")
    better = both(ua=(0.97, 0.0), ira=(0.99, 0.95))
    assert "| b 4.000 | beaten |" in "\n".join(standing({"b": better, RETRAIN: gold}, RULES))
    assert told["| FID / base"] == "| FID / base | 1.000 [1.000, 1.000] | b 1.050 | at the top |"
    assert told["| entropy"].endswith("| b 0.300 | beaten |")
    # what the gold standard does not lead ranks nothing
    said = standing({"a": worse, "b": best, RETRAIN: gold}, RULES)
    assert said[-1].endswith("No ranks by entropy.")
    assert standing({"b": gold, RETRAIN: gold}, RULES)[-1].startswith("| probability")
    # one class has no interval over classes, and none is no check
    assert ALONE in standing({"b": best, RETRAIN: {"Bag": gold["Bag"]}}, RULES)[2]
    assert standing({"b": best, RETRAIN: {}}, RULES)[0].startswith("The gold standard was not checked")


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "neggrab"], "'neggrab' is not known here. Did you mean 'neggrad'?"),
        (["--methods", "neggrad stepz=3"], "unknown setting 'stepz'"),
        (["--methods", "neggrad", "--classes", "Dres"], "'Dres', which is no class of .* Did you mean 'Dress'"),
        (["--methods", "neggrad", "--classes", "6"], "--classes 6: .* has 5. Give 1 to that many"),
        (["--methods", "neggrad", "--figure", "f.png"], "no arm runs on one. Add sfd"),
        (["--methods", "sfd", "--figure", "f.svg"], "Give a name that ends in .png"),
        (["--methods", "neggrad,sfd"], "'sfd' starts from a one-step generator here.*expunge distill .* --out RUN"),
        (["--methods", "sfd", "--generator", "{model}"], "is sampled in steps, and no one-step generator"),
        (["--methods", "sfd", "--model", "{generator}"], "is a one-step generator.*as --generator"),
        (["--methods", "sfd", "--model", "{retrained}", "--generator", "{generator}"], "whose weights are not those"),
        (["--methods", "sfd", "--generator", "{forgot}"], "has forgotten 'Dress' already"),
        (["--methods", "ssd", "--gold", "{model}/nowhere"], "there is no such folder"),
        (["--methods", "ssd", "--model", "{retrained}", "--gold", "{gold}"], "is compared with .* Take it out of"),
        (["--methods", "ssd", "--model", "tiny"], "no protocol judges this model"),
        (["--methods", "ssd", "--model", "fashion"], "python -m expunge.zoo.fashion all"),
    ],
)
def test_bad_input(
    place: Place,
    done: str,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.setattr("expunge.zoo.fashion.world.WEIGHTS", place.work / "none")
    paths = {"model": place.model, "generator": place.generator, "gold": place.gold}
    paths |= {"retrained": place.model.parent / "retrained", "forgot": place.open().folder(SFD, "Dress")}
    before = place.known.read_bytes()
    assert place.bench(*(o.format(**paths) for o in options)) == cli.EXPECTED_ERROR
    assert re.search(message, capsys.readouterr().err)
    assert place.known.read_bytes() == before


def test_a_model_that_draws_from_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    model.world = World("emoji", ("bomb",), (), {}, ("{c}",), ())
    monkeypatch.setattr(classes, "load", lambda *_, **__: model)
    with pytest.raises(Unsupported, match="draws from texts.*bench methods"):
        classes.opened("emoji", "", None, ["ssd"], Path(), "cpu")


def test_two_retrained_models_of_a_class_are_refused(place: Place, tmp_path: Path) -> None:
    import shutil

    from expunge.errors import BadRun

    for name in "ab":
        shutil.copytree(place.gold / "dress", tmp_path / name)
    with pytest.raises(BadRun, match="both without 'Dress'"):
        classes.golds(tmp_path, load(place.model))
    # other runs may lie beside them
    Run(tmp_path / "b").write_card(replace(Run(tmp_path / "b").card, method="esd"))
    assert list(classes.golds(tmp_path, load(place.model))) == ["Dress"]


def test_the_file_of_found_cells_holds_the_times_too(place: Place, done: str) -> None:
    told = [json.loads(line)["cell"] for line in place.known.read_text().splitlines()]
    # four arms on two classes, their refusals, one retrained model, and the times
    assert len(told) == 4 * 2 + 2 + 1 + 1
    assert onestep.SPEED in told
    assert "sfd-steps=1-batch=2-probe=0/T-shirt-top" in told
