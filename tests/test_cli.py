"""The command line: instant help, exit codes, one clear line for every expected error."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from expunge import auditing, cli, complete, doctor, gate
from expunge.concept import Concept
from expunge.errors import SettingError
from expunge.methods import METHODS
from expunge.methods.uce import UCE
from expunge.records import Card, Run, Score

HELP_BUDGET = 0.3  # seconds, of the issue
ERASE = sys.modules["expunge.cli.erase"]  # the package's attribute of that name is the command

QUICK = ["-s", "steps=2", "-s", "batch=2", "-s", "rollouts=2", "-s", "sampling_steps=2"]
CARD = Card(
    method="sdd",
    settings={},
    concept=Concept("bomb").to_json(),
    model="tiny",
    base_hash="ab",
    seed=0,
    version="0.1.0",
)
SCORES = [
    Score(protocol="emoji-v1", metric="ua", value=0.97, low=0.9, high=1.0, n=48, base=0.02),
    Score(protocol="emoji-v1", metric="ira", value=0.91, n=160, base=0.93),
    Score(protocol="emoji-v1", metric="fid", value=None, errors=3),
]


def expect(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """Run the command line in this process; return what it printed and what it complained."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == code, capsys.readouterr().err
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.out, found.err


def child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


# ---------------------------------------------------------------------------------------------------------------- speed

HEAVY = "import sys; heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules); "


def test_importing_the_package_loads_nothing_heavy() -> None:
    child("import expunge; expunge.Concept; expunge.Run; " + HEAVY + "assert not heavy, heavy")


@pytest.mark.parametrize("command", [[], ["erase"], ["demo"], ["audit"], ["report"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    done = child(
        f"from expunge.cli import main; assert main({[*command, '--help']}) == 0; " + HEAVY + "assert not heavy, heavy"
    )
    assert "Usage: expunge" in done.stdout


def test_help_is_instant() -> None:
    """In seconds of processor time: on a machine that is busy otherwise, the clock on the wall measures the others."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def once() -> float:
        before = spent()
        subprocess.run([sys.executable, "-m", "expunge.cli", "--help"], check=True, capture_output=True)
        return spent() - before

    assert min(once() for _ in range(5)) < HELP_BUDGET


@pytest.mark.parametrize("command", [["models", "--json"], ["protocols", "--json"], ["report", "RUN", "-o", "OUT"]])
def test_commands_without_torch(tmp_path: Path, command: list[str]) -> None:
    Run(tmp_path / "run").write_card(CARD)
    Run(tmp_path / "run").write_scores(SCORES)
    places = {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "r.html")}
    arguments = [places.get(a, a) for a in command]
    child(f"import sys; from expunge.cli import main; assert main({arguments}) == 0; assert 'torch' not in sys.modules")


# ------------------------------------------------------------------------------------------------------------- listings


@pytest.mark.parametrize(
    ("command", "names"),
    [("methods", {"esd", "sdd", "uce"}), ("models", {"emoji", "tiny"}), ("protocols", {"emoji-v1"})],
)
def test_json_listings_are_objects_with_a_name(
    capsys: pytest.CaptureFixture[str], command: str, names: set[str]
) -> None:
    found = json.loads(expect(capsys, command, "--json")[0])
    assert names <= {row["name"] for row in found}
    text = expect(capsys, command)[0]
    assert all(name in text for name in names)


def test_the_list_of_methods_says_needs_cost_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    listed = expect(capsys, "methods")[0]
    assert "needs nothing more]" in listed
    assert "needs images, retained]" in listed
    assert listed.count("           cost: ") == listed.count("           limits: ") == len(METHODS)


def test_protocols_say_what_their_metrics_mean(capsys: pytest.CaptureFixture[str]) -> None:
    from expunge.protocols import METRICS

    text = expect(capsys, "protocols")[0]
    listed = json.loads(expect(capsys, "protocols", "--json")[0])[0]["metrics"]
    assert [(m["name"], m["help"]) for m in listed] == [(name, about) for name, (about, _) in METRICS.items()]
    assert all(about in text for about, _ in METRICS.values())


def test_cite(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = expect(capsys, "cite", "sdd")
    assert out.startswith("@")
    assert "2307.05977" in out
    assert "Did you mean 'sdd'?" in expect(capsys, "cite", "sddd", code=2)[1]
    # papers that are settings of a method
    assert "2501.18950" in expect(capsys, "cite", "age")[0]
    assert "2409.06633" in expect(capsys, "cite", "sara")[0]
    assert "2302.09880" in expect(capsys, "cite", "neggrad")[0]
    assert "1911.04933" in expect(capsys, "cite", "negative-gradient")[0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert expect(capsys, "--version")[0].startswith("expunge ")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(expect(capsys, "doctor", "--json")[0])
    assert found["packages"]["torch"]
    assert "cpu" in found["devices"]
    assert found["memory_gb"] > 0
    assert found["weights"] == doctor.weights()
    assert "packages: torch" in expect(capsys, "doctor")[0]


def test_completion_needs_no_torch() -> None:
    child(
        "from expunge import complete as c; from types import SimpleNamespace as N\n"
        "assert c.models('em') == ['emoji'] and c.method_names('sd') == ['sdd']\n"
        "assert 'bomb' in c.concepts(N(params={'model': 'emoji'}), 'bo') \n"
        "assert c.concepts(N(params={'model': 'x'}), 'bo') == []\n"
        "assert c.settings(N(params={'method': 'esd'}), 'et') == ['eta=']\n" + HEAVY + "assert not heavy, heavy"
    )


@pytest.mark.parametrize("method", ["esd", "sdd", "uce"])
def test_completion_reads_the_same_settings_as_the_class(method: str) -> None:
    from dataclasses import fields

    from expunge import methods

    assert complete.fields(method) == [f.name for f in fields(methods.get(method))]


def test_completion_offers_every_paper() -> None:
    from expunge import complete, methods
    from expunge.papers import ALSO

    assert set(complete.papers("")) == {*methods.names(), *ALSO}


# ------------------------------------------------------------------------------------------------------ erase, generate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert (
        cli.main(["erase", "tiny", "--concept", "bomb", "--keep", "a,b", "--keep", "c", *QUICK, "--out", str(out)]) == 0
    )
    return out


def test_erase_leaves_a_run(run: Path) -> None:
    card = Run.open(run).card
    assert (card.method, card.settings["steps"], card.concept["keep"]) == ("sdd", 2, ["a", "b", "c"])


def test_erase_again_into_the_same_folder(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    _, err = expect(capsys, "erase", "tiny", "--concept", "bomb", "--out", run, code=2)
    assert err.startswith("error: the folder")
    assert "not empty" in err
    assert err.count("\n") == 1
    out, _ = expect(capsys, "erase", "tiny", "--concept", "bomb", "--keep", "a,b,c", *QUICK, "--out", run, "--resume")
    assert f"Run: {run}" in out


def test_erase_says_what_of_a_prompt_is_cut(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, err = expect(capsys, "erase", "tiny", "--concept", "a very long concept", "-m", "uce", "--out", tmp_path / "r")
    assert "warning: " in err
    assert "prompts of 'a very long concept' are longer" in err
    assert "the model does not see" in err


def test_many_concepts_with_pictures_are_refused_before_the_model_loads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["erase", "no-such-model", "--images", tmp_path, "--out", tmp_path / "r", "--concept", "a"]
    assert "no model at" in expect(capsys, *common, code=2)[1]
    assert "Give one --concept with --images" in expect(capsys, *common, "--concept", "b", code=2)[1]


def test_erase_plans_learns_and_erases(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr("expunge.tokens.STEPS", 5)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    common = ["erase", "tiny", "--concept", "x", *QUICK[2:], "-s", "steps=4"]
    _, err = expect(capsys, *common, "--images", tmp_path, "--out", tmp_path / "soft")
    plan, bars = err.split("run      ")
    assert "model    tiny" in plan
    assert f"token    first learned from {tmp_path}" in plan
    assert "method   SDD(group='cross-attention', " in plan
    assert "steps=4" in plan
    assert "learning the token: inversion " in bars
    assert "erasing: inversion" not in bars
    _, err = expect(capsys, *common, "--out", tmp_path / "words")
    assert "token" not in err


@pytest.mark.parametrize("terminals", [True, False])
def test_the_time_that_remains_is_told(monkeypatch: pytest.MonkeyPatch, terminals: bool) -> None:
    """With updates of 40 s: rich alone looks back for 30. Without a terminal, in a line."""
    import io
    import time

    from rich.console import Console

    from expunge import terminal
    from expunge.kernel.state import Step

    now, screen = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        terminal, "console", Console(file=screen, force_terminal=terminals, width=80, get_time=lambda: now[0])
    )
    with terminal.bars() as tick:
        show = terminal.steps(tick)
        for i in range(5):
            now[0] += 40
            show(Step(i, 200, {"distil": 1e-3, "keep": 2e-3}))
    shown = screen.getvalue().split("erasing: ")[-1]
    if terminals:
        assert "3/200" not in shown
        assert "5/200" in shown
        assert "2:10:00" in shown
    assert screen.getvalue().count("erasing: 4 of 200, about 2:10:40 left\n") == (not terminals)


def test_our_own_warnings_are_shown_and_others_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from expunge import errors, methods

    def warned(name: str) -> Any:
        for kind in (errors.KeepsAll, errors.PromptCut, UserWarning):
            warnings.warn(f"this is a {kind.__name__}", kind, stacklevel=2)
        return real(name)

    real = methods.get
    monkeypatch.setattr(methods, "get", warned)
    assert expect(capsys, "cite", "sdd")[1] == "warning: this is a KeepsAll\nwarning: this is a PromptCut\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (7880, "2:11:20")])
def test_clock(seconds: float, text: str) -> None:
    from expunge import terminal

    assert terminal.clock(seconds) == text


def test_recipe_and_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('method = "uce"\nridge = 0.5\npreserve = 2.0\n')
    expect(
        capsys, "erase", "tiny", "--concept", "bomb", "--recipe", recipe, "-s", "ridge=0.25", "--out", tmp_path / "r"
    )
    card = Run.open(tmp_path / "r").card
    assert card.method == "uce"
    assert card.settings == asdict(UCE(ridge=0.25, preserve=2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concept", ""], "concept is empty"),
        (["--concept", "bomb", "--method", "uec"], "unknown method 'uec'. Methods: .*Did you mean 'uce'"),
        (["--concept", "bomb", "--set", "stepz=3"], "unknown setting 'stepz'.*Did you mean 'steps'"),
        (["--concept", "bomb", "--set", "steps=-1"], "steps=-1 .* greater than or equal to 0"),
        (["--concept", "bomb", "--set", "lr=1e9"], "lr=1e9 .* less than or equal to 1"),
        (["--concept", "bomb", "--set", "steps"], "form key=value"),
        (["--concept", "bomb", "--seed", "-1"], "seed -1 is out of range"),
        (["--concept", "bomb", "--device", "gpu"], "unknown device 'gpu'. Devices: auto, cpu"),
        (["--concept", "bomb", "--kind", "thing"], "kind 'thing' is not known"),
        (["--concept", "bomb", "--images", "/nowhere"], "nothing at /nowhere"),
        (["--concept", "bomb", "--recipe", "/nowhere.toml"], "recipe /nowhere.toml cannot be read"),
        (["--concept", "bomb", "--anchor", "bomb"], "the concept itself"),
        (["--concept", "a", "--concept", "b", "--images", "."], "--images show one concept, and 2 are given: a, b"),
        (["--concept", "a", "--concept", "b", "--embedding", "e"], "Give one --concept with --embedding"),
    ],
)
def test_bad_input_of_erase(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    import re

    _, err = expect(capsys, "erase", "tiny", *arguments, "--out", tmp_path / "run", code=2)
    last = err.strip().split("\n")[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)
    assert not (tmp_path / "run").exists()


def test_unknown_concept_of_the_shipped_world(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, err = expect(capsys, "erase", "emoji", "--concept", "bom", "--out", tmp_path / "r", code=2)
    assert "'bom' is not a concept of the model 'emoji'" in err
    assert "bomb" in err


@pytest.mark.parametrize("model", ["emojis", "./nowhere", "/nowhere.safetensors", "x.ckpt"])
def test_bad_models(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str) -> None:
    _, err = expect(capsys, "erase", model, "--concept", "bomb", "--out", tmp_path / "r", code=2)
    assert err.startswith("error: ")


def test_generate(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    from PIL import Image

    common = ["generate", "tiny", "--prompt", "a bomb", "--seeds", "0-1,5", "--steps", "2"]
    expect(capsys, *common, "--out", tmp_path / "base")
    expect(capsys, *common, "--out", tmp_path / "edited", "--edit", run)
    names = sorted(os.listdir(tmp_path / "base"))
    assert names == ["000.png", "001.png", "002.png", "index.json", "sheet.png"]
    with Image.open(tmp_path / "base" / "002.png") as image:
        assert image.size == (16, 16)
        assert image.text == {"prompt": "a bomb", "seed": "5"}  # type: ignore[attr-defined]
    assert [r["seed"] for r in json.loads((tmp_path / "base" / "index.json").read_text())] == [0, 1, 5]
    with Image.open(tmp_path / "base" / "sheet.png") as sheet:
        assert sheet.size == (3 * 20 + 4, 24)
    assert "not empty" in expect(capsys, *common, "--out", tmp_path / "base", code=2)[1]
    _, err = expect(capsys, *common, "--edit", tmp_path, "--out", tmp_path / "none", code=2)
    assert "no edit at" in err


@pytest.mark.parametrize("there", [False, True])
def test_generate_leaves_no_pictures_without_their_index(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """The disk is full at the second picture; then the process is killed there. The same command works after either."""
    from expunge import sheet

    out, real, written = tmp_path / "deep" / "out", sheet.png, list[int]()
    if there:
        out.mkdir(parents=True)

    def full(*arguments: Any) -> bytes:
        written.append(1)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    common = ["generate", "tiny", "--prompt", "a bomb", "--seeds", "0-2", "--steps", "1", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(sheet, "png", full)
        _, err = expect(capsys, *common, code=2)
    assert f"error: could not write {out}: the disk is full. Nothing half written was left" in err
    assert len(written) == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep", *([out] if there else [])]

    killed = (
        "import os; from expunge import cli, sheet\n"
        "real, written = sheet.png, []\n"
        "def die(*a):\n"
        "    written.append(1)\n"
        "    return os._exit(9) if len(written) == 2 else real(*a)\n"
        f"sheet.png = die; cli.main({[str(a) for a in common]})"
    )
    assert subprocess.run([sys.executable, "-c", killed], capture_output=True, check=False).returncode == 9
    assert [p for p in tmp_path.rglob("*.png") if not p.parent.name.endswith(".tmp")] == []
    expect(capsys, *common)
    assert sorted(os.listdir(out)) == ["000.png", "001.png", "002.png", "index.json", "sheet.png"]
    assert "not empty" in expect(capsys, *common, code=2)[1]


def test_generate_leads_away_from_a_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    from expunge import tokens

    token = tmp_path / "token.safetensors"
    vectors = {"text_encoder": 10 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}
    tokens.write(token, "<creepy>", vectors, {})
    common = ["generate", "tiny", "--prompt", "a bomb", "--seeds", "0", "--steps", "2"]
    pictures = {}
    for name, more in {"none": [], "words": ["--negative", "creepy"], "token": ["--negative", token]}.items():
        expect(capsys, *common, *more, "--out", tmp_path / name)
        pictures[name] = (tmp_path / name / "000.png").read_bytes()
    assert len(set(pictures.values())) == 3
    for more, why in (
        (["--negative", tmp_path / "no.safetensors"], "no.safetensors cannot be read"),
        (["--negative", "creepy", "--guidance", "1"], "--negative has no effect: the guidance scale is 1"),
    ):
        assert why in expect(capsys, *common, *more, "--out", tmp_path / "refused", code=2)[1]
    assert not (tmp_path / "refused").exists()


def test_generate_carries_membranes_over_to_another_fine_tune(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    from expunge.backbones import tiny

    tiny.save(tmp_path / "tune", seed=1)
    loud = [
        *QUICK[2:],
        "-s",
        "steps=12",
        "-s",
        "lr=0.5",
        "-s",
        "anchoring=0",
    ]  # else no pixel of an untrained model moves
    expect(capsys, "erase", "tiny", "--concept", "bomb", "-m", "spm", *loud, "--out", tmp_path / "membrane")
    common = ["generate", tmp_path / "tune", "--prompt", "bomb", "--seeds", "0", "--steps", "2"]
    expect(capsys, *common, "--out", tmp_path / "base")
    edited = [*common, "--edit", tmp_path / "membrane"]
    assert "made for 'tiny' with weights" in expect(capsys, *edited, "--out", tmp_path / "none", code=2)[1]
    expect(capsys, *edited, "--transfer", "--out", tmp_path / "moved")
    pictures = [(tmp_path / name / "000.png").read_bytes() for name in ("base", "moved")]
    assert pictures[0] != pictures[1]
    for more, why in ((["--edit", run], "this edit is of kind"), ([], "no --edit is given")):
        assert why in expect(capsys, *common, *more, "--transfer", "--out", tmp_path / "none", code=2)[1]
    assert not (tmp_path / "none").exists()


def test_generate_says_what_of_a_prompt_is_cut(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["generate", "tiny", "--seeds", "0", "--steps", "1", "--prompt", "a bomb", "--prompt"]
    _, err = expect(capsys, *common, "a very long prompt indeed", "--out", tmp_path / "cut")
    assert "warning: the prompt 'a very long prompt indeed' is longer" in err
    assert "warning" not in expect(capsys, *common, "a cat", "--out", tmp_path / "whole")[1]
    negative = [*common, "a cat", "--negative"]
    _, err = expect(capsys, *negative, "an ugly and blurry thing", "--out", tmp_path / "avoided")
    assert err.count("warning: ") == 1
    assert "warning: the negative prompt 'an ugly and blurry thing' is longer than the text encoder's window" in err
    assert "the model does not see" in err
    assert "warning" not in expect(capsys, *negative, "ugly", "--out", tmp_path / "short")[1]


# --------------------------------------------------------------------------------------------------------- what is next


def test_kinds_follow_the_shipped_worlds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from expunge.zoo.fashion import world as fashion

    assert [c.kind for c in ERASE._concepts(["bomb", "twemoji"], "", {}, ERASE._known_world("emoji"))] == [
        "object",
        "style",
    ]
    assert ERASE._known_world("tiny") is None
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(fashion, "WEIGHTS", tmp_path)
    world = ERASE._known_world("fashion")
    assert world is not None
    assert world.canonical("sneaker") == "Sneaker"
    assert ERASE._concepts(["Sneaker"], "", {}, world)[0].kind == "class"
    # a generator draws what its base draws
    Run(tmp_path / "run").write_card(Card.from_json(CARD.to_json() | {"model": "fashion", "concept": {}}))
    assert ERASE._known_world(str(tmp_path / "run")) == world


@pytest.mark.parametrize(
    ("model", "concepts", "following"),
    [
        ("emoji", ["bomb", "Twemoji"], "expunge audit my-run"),
        ("emoji", ["my mascot"], "expunge generate emoji --edit my-run --out pictures --prompt ..."),
        ("tiny", ["Van Gogh"], "expunge generate tiny --edit my-run --out pictures --prompt 'Van Gogh'"),
    ],
)
def test_what_is_next_after_an_erasure(model: str, concepts: list[str], following: str) -> None:
    import shlex

    assert shlex.join(ERASE._next(model, concepts, Path("my-run"))) == following


def test_after_a_study_pictures_of_what_was_rejected_are_next(tmp_path: Path) -> None:
    import io

    from PIL import Image

    from expunge.feedback import Study

    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    planned = [("a cat", 0), ("a bomb", 1)]
    with Study.create(tmp_path / "s", planned, concept="bomb", source={"model": "emoji"}) as study:
        for picture in study.pictures():
            study.put(picture.id, data.getvalue())
            study.rate("Ada", picture.id, "concept" if picture.prompt == "a bomb" else "not")
    assert ERASE._next("emoji", [f"study:{tmp_path / 's'}"], Path("run"))[-2:] == ["--prompt", "a bomb"]


# ---------------------------------------------------------------------------------------------------------- gate, seeds


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-7", (0, 1, 2, 3, 4, 5, 6, 7)), ("3", (3,)), ("0-1, 5,1", (0, 1, 5)), ("2-2", (2,))]
)
def test_seeds(text: str, numbers: tuple[int, ...]) -> None:
    assert gate.seeds(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "3-1", "0-99999999", "1.5", "0--3"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(SettingError, match="--seeds"):
        gate.seeds(text)


@pytest.mark.parametrize("text", ["", "ua", "ua>=", "ua=0.9", "ua>=high", ">=0.9", "ua>=0.9,,ira>=0.9", "ua>=1.2.3"])
def test_bad_gates(text: str) -> None:
    with pytest.raises(SettingError, match="METRIC SIGN NUMBER"):
        gate.parse(text)


@pytest.mark.parametrize(
    ("text", "failures"),
    [
        ("ua>=0.95", []),
        ("ua >= 0.97, ira<0.92", []),
        ("ua>0.97", ["ua>0.97 fails: ua is 0.97."]),
        ("fid<=10", ["fid<=10 fails: fid could not be scored (3 errors)."]),
        ("irra>=0", ["irra>=0 fails: irra was not measured. Did you mean 'ira'?"]),
        ("ua>=0.99,ira>=0.95", ["ua>=0.99 fails: ua is 0.97.", "ira>=0.95 fails: ira is 0.91."]),
    ],
)
def test_gates(text: str, failures: list[str]) -> None:
    assert [why for rule in gate.parse(text) if (why := rule.failure(SCORES))] == failures


@pytest.fixture
def audited(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose audit is a stand-in: the real one has tests of its own."""

    def stand_in(_run: Path, _protocol: str, *, device: str, progress: Any) -> list[Score]:
        assert device == "cpu"
        progress("pictures of the base", 1, 1)
        return SCORES

    monkeypatch.setattr(auditing, "audit", stand_in)
    return run


def test_audit_prints_and_gates(capsys: pytest.CaptureFixture[str], audited: Path) -> None:
    common = ["audit", audited, "--device", "cpu"]
    out, err = expect(capsys, *common, "--gate", "ua>=0.95")
    assert out.splitlines()[0] == "protocol emoji-v1 · 48 pictures of what is erased, 160 pictures of the rest"
    assert [line.split() for line in out.splitlines()][1:3] == [
        ["metric", "value", "low", "high", "base", "p", "n", "errors"],
        ["ua", "0.97", "0.9", "1", "0.02", "-", "48", "0"],
    ]
    assert "'bomb' is gone from 97.0% (base 2.0%) of the pictures that ask for it; the rest is still right in" in err
    assert "Measured by protocol emoji-v1 · 48 pictures of what" in err
    assert json.loads(expect(capsys, *common, "--json")[0])[0]["metric"] == "ua"
    assert "gate: ira>=0.95 fails" in expect(capsys, *common, "--gate", "ua>=0.95,ira>=0.95", code=3)[1]
    assert "gate: fid<=10 fails" in expect(capsys, *common, "--gate", "fid<=10", code=3)[1]
    assert "METRIC SIGN NUMBER" in expect(capsys, *common, "--gate", "ua~1", code=2)[1]


def test_verdicts() -> None:
    from dataclasses import replace

    from expunge import terminal

    many = replace(CARD, also=[{"name": f"thing {i}"} for i in range(9)])
    assert terminal.verdict(many, SCORES).startswith("'bomb' and 'thing 0' and 'thing 1' and 'thing 2' and 6 more are")
    assert terminal.verdict(replace(CARD, concept={}), SCORES[1:]) == (
        "What 'tiny' draws is still right in 91.0% (base 93.0%). "
        "Measured by protocol emoji-v1 · 160 pictures of the rest."
    )
    broken = [replace(SCORES[0], errors=2), *SCORES[1:]]
    assert terminal.protocol(broken) == "protocol emoji-v1 · 50 pictures of what is erased, 160 pictures of the rest"
    long = Score(protocol="fashion-v1", metric="precision_fashion64", value=0.5, n=3)
    assert terminal.table([long])[2].split()[:2] == ["precision_fashion64", "0.5"]
    assert terminal.table([long])[0] == "protocol fashion-v1"


def test_audit_and_report_want_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such folder" in expect(capsys, "audit", tmp_path / "none", code=2)[1]
    assert "card.json is missing" in expect(capsys, "report", tmp_path, "-o", tmp_path / "r.html", code=2)[1]
    assert not (tmp_path / "r.html").exists()
    Run(tmp_path).write_card(CARD)
    assert "edit.safetensors is missing" in expect(capsys, "audit", tmp_path, code=2)[1]


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_method: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("expunge.methods.get", interrupt)
    assert "--resume" in expect(capsys, "cite", "sdd", code=130)[1]
