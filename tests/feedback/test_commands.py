"""`expunge rate` before the server starts, and `expunge feedback`."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from expunge.cli import main
from expunge.feedback import Study, server


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns its code, output and errors."""

    def start(*arguments):
        code = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return start


@pytest.fixture
def pictures(tmp_path, pngs):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, data in enumerate(pngs[:6]):
        (folder / f"{number}.png").write_bytes(data)
    return folder


@pytest.fixture
def served(monkeypatch):
    """Let the server end at once, and return what it was asked to serve."""
    calls = []

    def serve(study, sock, token):
        calls.append((study.ask, study.wanted, sock.getsockname(), token))
        sock.close()

    monkeypatch.setattr(server, "serve", serve)
    return calls


# ----------------------------------------------------------------------------------------------------------------- rate


def test_a_study_is_made_served_and_gone_on_with(run, served, pictures, tmp_path):
    out = tmp_path / "study"
    command = ("rate", "--pictures", pictures, "--concept", "open mouth", "--out", out)
    code, said, heard = run(*command, "--pairs", "--raters", 2, "--seed", 5, "--blur")
    assert code == 0
    assert re.fullmatch(r"Open     http://127\.0\.0\.1:\d+/\?token=[\w-]{32}\n", said)
    assert "pairs: Which shows more of “open mouth”?" in heard
    with Study.open(out) as study:
        assert (study.pairs, study.blur, study.wanted, study.seed) == (True, True, 2, 5)
        assert study.progress().drawn == 6
        study.rate("Ada", 1, "first")
    # the same command, and the short one
    for again in ((*command, "--pairs", "--raters", 2, "--seed", 5, "--blur"), ("rate", "--out", out)):
        code, _, heard = run(*again)
        assert code == 0
        assert "1 ratings in" in heard
    assert {token for *_, token in served} == {(out / ".token").read_text()}
    assert [wanted for _, wanted, *_ in served] == [2, 2, 2]
    # pages that are open go on
    ports = {sock[1] for _, _, sock, _ in served}
    assert len(ports) == 1
    with server.listen("127.0.0.1", ports.pop()):
        assert run(*again)[0] == 0
    assert served[-1][2][1] != served[0][2][1]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (("--seed", 1), "another seed"),
        (("--raters", 9), "another number of raters"),
        (("--pairs",), "another pairs"),
        (("--ask", "Is it?"), "another question"),
    ],
)
def test_another_study_is_not_gone_on_with(run, served, pictures, tmp_path, changed, what):
    command = ("rate", "--pictures", pictures, "--concept", "open mouth", "--out", tmp_path / "study")
    assert run(*command)[0] == 0
    code, _, heard = run(*command, *changed)
    assert code == 2
    assert what in heard
    assert "Choose another --out" in heard
    # nor is it ignored by the short command
    assert what in run("rate", "--out", tmp_path / "study", *changed)[2]
    assert "another steps" in run("rate", "--out", tmp_path / "study", "--steps", 7)[2]
    (pictures / "9.png").write_bytes((pictures / "1.png").read_bytes())
    assert "another prompts or seeds" in run(*command)[2]
    assert len(served) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "there is nothing to rate. Give MODEL and --prompts or --concept, or --pictures"),
        (("--concept", "bomb"), "no MODEL to draw with"),
        (("emoji", "--pictures", "."), "so give neither MODEL nor --prompts"),
        (("--pictures", ".", "--steps", "9"), "so give neither MODEL nor --prompts, --steps or --guidance"),
        (("--pictures", "no-such-folder"), "there are no PNG files in no-such-folder"),
        (("emoji", "--prompts", "no-such-file"), "no-such-file cannot be read"),
        (("emoji", "--concept", "bomb", "--device", "gpu"), "unknown device 'gpu'. Devices: auto, cpu"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_made(run, served, tmp_path, options, why):
    code, said, heard = run("rate", *options, "--out", tmp_path / "study")
    assert (code, said) == (2, "")
    assert why in heard
    assert not (tmp_path / "study").exists()
    assert served == []


def test_a_model_that_is_not_the_study_s_is_refused(run, served, pictures, tmp_path):
    assert run("rate", "--pictures", pictures, "--out", tmp_path / "study")[0] == 0
    code, _, heard = run("rate", "emoji", "--out", tmp_path / "study")
    assert code == 2
    assert "not from 'emoji'" in heard


def test_pictures_that_nobody_draws_are_told(run, served, make_study):
    study = make_study(6, drawn=2, source={"model": "emoji"})
    _, _, heard = run("rate", "--out", study.folder)
    assert "4 pictures are not drawn yet; give MODEL to go on" in heard


def test_letting_the_network_in_is_warned_of(run, served, pictures, tmp_path):
    command = ("rate", "--pictures", pictures, "--out", tmp_path / "study")
    for host in ((), ("--host", "localhost")):
        assert "unencrypted" not in run(*command, *host)[2]
    _, said, heard = run(*command, "--host", "0.0.0.0")
    assert "unencrypted" in heard
    assert [sock[0] for _, _, sock, _ in served] == ["127.0.0.1", "127.0.0.1", "0.0.0.0"]
    assert "0.0.0.0" not in said


def test_without_the_extra_it_says_what_to_install(run, monkeypatch, pictures, tmp_path):
    monkeypatch.delitem(sys.modules, "expunge.feedback.server")
    monkeypatch.delattr("expunge.feedback.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, heard = run("rate", "--pictures", pictures, "--out", tmp_path / "study")
    assert code == 2
    assert "the rating page needs uvicorn, which is not installed. Install it: pip install 'expunge[web]'" in heard


WITHOUT = """
import sys
from importlib.abc import MetaPathFinder
class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "torchmetrics"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Block())
from pathlib import Path
import expunge.feedback
from expunge.feedback import server
for path in Path(expunge.feedback.__file__).parent.glob("*.py"):
    __import__(f"expunge.feedback.{path.stem}")
server.serve = lambda study, sock, token: print(len(study.pictures()), "served")
from expunge.cli import main
print(main(["rate", "--pictures", sys.argv[1], "--out", sys.argv[2]]), main(["feedback", sys.argv[2]]))
"""


def test_the_page_and_the_agreement_need_no_torch(pictures, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, pictures, tmp_path / "study"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "6 served" in done.stdout
    assert done.stdout.endswith("0 0\n")


# ------------------------------------------------------------------------------------------------------------- feedback


@pytest.fixture
def rated(make_study):
    """Two raters of twelve pictures who differ in one, and a third one who is unsure of it."""
    study = make_study(12)
    for item in range(1, 13):
        study.rate("Ada", item, "concept" if item % 3 == 0 else "not", 2000)
        study.rate("Bo", item, "concept" if item % 3 == 0 or item == 5 else "not", 1000)
    study.rate("Cleo", 5, "unsure", 9000)
    return study


def test_agreement_is_told(run, rated):
    code, said, _ = run("feedback", rated.folder)
    assert code == 0
    assert said.startswith("Does this show “open mouth”?  (12 pictures)\n")
    for line in (
        "  Ada                      12 answered",
        "answers       concept 9, not 15, unsure 1",
        "median time   2.0 s",
        "  Cohen's kappa, Ada and Bo             0.82",
    ):
        assert f"\n{line}" in said
    found = json.loads(run("feedback", rated.folder, "--json")[1])
    assert found["cohen"]["Ada and Bo"]["value"] == pytest.approx(0.8235, abs=5e-4)  # (11/12 - 19/36) / (1 - 19/36)
    assert found["fleiss"]["n"] == 1
    assert found["krippendorff"]["n"] == 12
    assert "detector" not in found


def test_a_study_without_ratings_has_no_agreement(run, make_study):
    code, said, _ = run("feedback", make_study().folder)
    assert code == 0
    assert re.search(r"Krippendorff's alpha\s+-\s+on 0 pictures", said)


def test_a_detector_is_audited_against_people(run, rated, tmp_path):
    scores = tmp_path / "scores.csv"
    scores.write_text("picture,score\n" + "".join(f"{i},{0.9 if i in (3, 6, 4) else 0.1}\n" for i in range(1, 13)))
    found = json.loads(run("feedback", rated.folder, "--scores", scores, "--json")[1])["detector"]
    # people agree on 3, 6, 9, 12; on 5 they are tied
    assert [found[k] for k in ("hits", "false_alarms", "misses", "passes", "undecided")] == [2, 1, 2, 6, 1]
    assert found["precision"]["value"] == pytest.approx(2 / 3)
    assert found["recall"]["value"] == pytest.approx(1 / 2)
    assert found["recall"]["low"] == pytest.approx(0.150, abs=5e-4)  # Wilson, 2 of 4
    said = run("feedback", rated.folder, "--scores", scores, "--threshold", 0.95)[1]
    assert "detector at 0.95, against the answer of most people (1 undecided)" in said
    assert re.search(r"recall\s+0\.00 0\.00 to 0\.49", said)


def test_the_shipped_judge_is_a_detector(run, rated):
    found = json.loads(run("feedback", rated.folder, "--judge", "bomb", "--json")[1])["detector"]
    assert sum(found[k] for k in ("hits", "false_alarms", "misses", "passes")) == 11


def test_learning_curve(run, make_study):
    study = make_study(60)
    for item in range(1, 61):
        study.rate("Ada", item, "concept" if item % 3 == 0 else "not")
    found = json.loads(run("feedback", study.folder, "--curve", "--json")[1])["reward"]
    sizes = [row["ratings"] for row in found["curve"]]
    assert sizes == sorted(sizes)
    assert 0 <= found["auc"]["value"] <= 1
    assert "AUC by number of ratings" in run("feedback", study.folder, "--curve")[1]


def test_too_few_ratings_for_a_curve_are_refused(run, rated):
    code, _, heard = run("feedback", rated.folder, "--curve")
    assert code == 2
    assert "Missing" in heard


def test_export_and_import(run, rated, make_study, tmp_path):
    path = tmp_path / "ratings.csv"
    code, _, heard = run("feedback", rated.folder, "--export", path)
    assert (code, heard) == (0, f"Exported: 25 ratings to {path}\n")
    other = make_study(12, name="other")
    assert "Imported: 25 ratings" in run("feedback", other.folder, "--import", path)[2]
    assert "Imported: 0 ratings" in run("feedback", other.folder, "--import", path)[2]
    assert other.ratings() == rated.ratings()


def test_questions_that_make_no_sense_are_refused(run, rated, make_study, tmp_path):
    pairs = make_study(6, pairs=True, name="pairs")
    for arguments, why in (
        ((tmp_path / "nothing",), "there is no study at"),
        ((rated.folder, "--scores", "a.csv", "--judge", "bomb"), "Give one at a time"),
        ((pairs.folder, "--judge", "bomb"), "holds pairs"),
        ((rated.folder, "--scores", "a.csv"), "a.csv cannot be read"),
        ((rated.folder, "--judge", "bom"), "reads no 'bom', only what `emoji` draws. Did you mean 'bomb'?"),
        ((make_study(6, drawn=0, name="planned").folder, "--judge", "bomb"), "has no pictures yet"),
    ):
        code, said, heard = run("feedback", *arguments)
        assert (code, said) == (2, "")
        assert why in heard
