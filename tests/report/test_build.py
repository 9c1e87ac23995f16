"""The page as text."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html import unescape

import pytest

from expunge.records import Run
from expunge.report import build

HOSTILE = "<script>alert(1)</script>"


def text(html: str) -> str:
    body = re.sub(r"<(style|svg)\b.*?</\1>", "", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).replace("\u00a0", " ").split())


def test_same_folders_same_bytes(make_run):
    runs = [make_run(), make_run("second", "dagger", seed=1, ua=0.8)]
    assert build(runs) == build([Run(r.folder) for r in runs])
    assert build(runs) != build(runs[:1])


def test_every_number_of_the_scores_is_shown(make_run):
    run = make_run()
    said = text(build([run]))
    for expected in (
        "recognised in 46 of 48 pictures before, in 1 of 48 after",
        "UA 97.9 %, 95 % interval 89.1\N{EN DASH}99.6 %",
        "Other objects 94.4 % → 92.5 %; styles 98.1 % → 97.5 %",
        "Protocol emoji-v1",
        "0.3121 0.3068 to 0.3174",
        "12.63",
        "1.62 GB",
        "sha256:5f1c9d0b7a3e2c4816d9a0f4be7713c2",
        "1.44 GB peak memory",
        "expunge erase emoji --concept bomb --anchor balloon --keep dagger",
    ):
        assert expected in said
    for n in run.neighbours:
        assert n["name"] in said


def test_the_numbers_follow_the_scores(make_run, edit_json):
    run = make_run()
    edit_json(run.folder / "scores.json", lambda d: d[0].update(value=0.75, low=0.61, high=0.85))
    said = text(build([run]))
    assert "in 12 of 48 after (UA 75.0 %, 95 % interval 61.0\N{EN DASH}85.0 %)" in said
    assert "97.9" not in said


def test_hostile_names_are_text(make_run, edit_json):
    run = make_run()
    nasty = HOSTILE + "\"'><img src=x onerror=alert(1)>${x} {{ 7 * 7 }}"
    card = run.card
    run.write_card(
        replace(card, concept={**card.concept, "name": nasty, "anchor": nasty, "keep": [nasty]}, method=nasty,
                settings={nasty: nasty}, losses={nasty: [1.0, 0.5]}, model=nasty, base_hash=nasty, version=nasty,
                status=nasty, created=nasty, kind=nasty)
    )  # fmt: skip
    edit_json(run.folder / "scores.json", lambda d: [s.update(protocol=nasty) for s in d] and d[4].update(metric=nasty))
    edit_json(run.folder / "neighbours.json", lambda d: d[0].update(name=nasty))
    edit_json(run.folder / "samples/index.json", lambda d: d[0].update(prompt=nasty, role=nasty, concept=nasty))
    for runs in ([run], [run, run]):
        html = build(runs)
        assert "&lt;script&gt;alert(1)" in html
        assert "<script" not in html
        assert "<img src=x" not in html
        assert "49" not in re.findall(r"\$\{x\} (\S+)", html)


def test_a_method_s_name_cannot_reach_other_files(make_run):
    run = make_run()
    run.write_card(replace(run.card, method="../errors"))
    assert "No note on limits is known" in text(build([run]))


def test_the_commands_make_the_run_again(make_run):
    run = make_run()
    pictures = {"images": "my bombs", "keep_images": "rest"}
    run.write_card(
        replace(run.card, concept=run.card.concept | pictures, make_images=64, settings={"steps": 3, "sae": ""})
    )
    said = text(build([run]))
    assert "--images 'my bombs' --keep-images rest --make-images 64 --method sdd --seed 0 --set steps=3" in (
        said.replace(" \\", "")
    )
    assert "sae=" not in said


@pytest.mark.parametrize(("kind", "recipe", "stage"), [("object", "emoji", "unet"), ("class", "fashion", "ddpm")])
def test_a_gold_standard_names_the_recipe_that_made_it(make_run, kind, recipe, stage):
    run = make_run()
    run.write_card(replace(run.card, concept={"name": "sea bomb", "kind": kind}, method="retrain", settings={}))
    said = text(build([run])).replace(" \\", "")
    assert f"python -m expunge.zoo.{recipe} {stage} --without 'sea bomb'" in said
    assert f"python -m expunge.zoo.{recipe} gold --without 'sea bomb' --out {run.folder}" in said
    assert "expunge erase" not in said


def test_a_gold_standard_s_commands_have_its_options(make_run):
    run = make_run()
    gold = replace(run.card, concept={"name": "bomb", "kind": "object"}, method="retrain", steps=150)
    run.write_card(replace(gold, model="my base", settings={"work": "my work", "name": "small"}))
    said, recipe = text(build([run])).replace(" \\", ""), "python -m expunge.zoo"
    assert f"{recipe}.emoji unet --without bomb --work 'my work' --name small --steps 150" in said
    options = f"--without bomb --work 'my work' --name small --base 'my base' --out {run.folder}"
    assert f"{recipe}.emoji gold {options}" in said
    # the recipe of classes knows its base by world and work folder
    kind = {"name": "cat", "kind": "class"}
    run.write_card(replace(gold, concept=kind, model="w/pipeline", settings={"world": "cifar10", "work": "w"}))
    said = text(build([run])).replace(" \\", "")
    assert f"{recipe}.fashion ddpm --without cat --world cifar10 --work w --steps 150" in said
    assert f"{recipe}.fashion gold --without cat --world cifar10 --work w --out {run.folder}" in said


def test_a_distillation_has_a_page(make_run):
    run = make_run(audited=False)
    run.write_card(replace(run.card, concept={}, method="sid", kind="generator", settings={"steps": 3, "prompts": ""}))
    said = text(build([run]))
    assert said.startswith("Distilling emoji in one step · Expunge report")
    assert "none: a distillation" in said
    assert "a one-step generator, complete" in said
    assert f"expunge distill emoji --seed 0 --set steps=3 --out {run.folder}" in said.replace(" \\", "")


def test_limits_come_from_the_method(make_run):
    assert "Over-erases what looks like the concept" in text(build([make_run()]))


def test_missing_audit_is_said_with_the_command(make_run):
    run = make_run(audited=False)
    said = text(build([run]))
    assert "bomb : not audited yet, so nothing is known" in said
    assert "No verdict" in said
    for part in (
        "no pictures in this run yet",
        "neighbours of the target have not been measured",
        "There are no scores",
    ):
        assert part in said
    assert said.count(f"expunge audit {run.folder}") >= 4
    assert "Erasure against retention" not in said


def test_closed_form_has_no_curve_and_says_so(make_run):
    run = make_run()
    run.write_card(replace(run.card, method="uce", steps=0, losses={}))
    assert "computed in closed form" in text(build([run]))


def test_several_runs_begin_with_the_summary(make_run):
    runs = [make_run(), make_run("b", "dagger", seed=1, ua=0.8125), make_run("c", "syringe", audited=False)]
    html = build(runs)
    said = text(html)
    assert said.index("All runs") < said.index("recognised in 46 of 48") < said.index("Pictures")
    assert html.count("<article") == 3
    assert "1 without an audit is not drawn" in said
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {a for a in re.findall(r'href="#([^"]+)"', re.sub(r"<svg.*?</svg>", "", html, flags=re.S))} <= set(ids)


@pytest.mark.parametrize(("kind", "asked", "veiled"), [("object", None, False), ("person", None, True),
                                                       ("object", True, True), ("person", False, False)])  # fmt: skip
def test_sensitive_pictures_are_veiled(make_run, kind, asked, veiled):
    run = make_run()
    run.write_card(replace(run.card, concept={**run.card.concept, "kind": kind}))
    assert ('<label class="veil">' in build([run], sensitive=asked)) is veiled


def test_many_pairs_and_neighbours_are_counted_not_hidden(make_run, edit_json):
    run = make_run()
    edit_json(run.folder / "samples/index.json", lambda d: d + [d[0]] * 30)
    edit_json(run.folder / "neighbours.json", lambda d: d + [{**d[-1], "name": f"n{i}"} for i in range(30)])
    said = text(build([run]))
    assert "18 more pairs lie in" in said
    assert "14 more, none damaged further" in said


def test_the_report_needs_no_torch(make_run):
    run = make_run()
    code = (
        "import sys; from expunge.records import Run; from expunge.report import build\n"
        f"page = build([Run.open({str(run.folder)!r})]); assert 'bomb' in page\n"
        "print(*sorted({'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # matplotlib proves that the question can be answered with yes
    assert done.stdout.split() == ["matplotlib"]
