"""Which pictures a study holds."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from expunge.concept import World
from expunge.errors import BadStudy
from expunge.feedback import Study, plan

WORLD = World(
    name="toy",
    objects=("bomb", "cat", "dog", "owl"),
    styles=("flat", "mono"),
    synonyms={"bomb": ("grenade",)},
    object_templates=("an emoji of {c}", "a {x} emoji of {c}"),
    style_templates=("a {c} emoji of {x}",),
)


def test_prompts_come_round_with_the_next_seed():
    assert plan.of_prompts(["a", "b"], 5) == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]


def test_of_too_many_prompts_evenly_spaced_ones():
    many = [str(i) for i in range(10)]
    assert plan.of_prompts(many, 5) == [(str(i), 0) for i in (0, 2, 4, 6, 8)]
    assert len(set(plan.of_prompts(many, 9))) == 9


@pytest.mark.parametrize("n", [7, 20, 60])
def test_half_asks_for_the_concept_and_half_for_something_else(n):
    asked = plan.of_concept("Grenade", WORLD, n)
    assert len(asked) == len(set(asked)) == n
    about = [any(word in prompt for word in ("bomb", "grenade")) for prompt, _ in asked]
    # side by side, so that any first part of the study holds both
    assert about == [i % 2 == 0 for i in range(n)]


def test_a_style_is_asked_for_as_a_style():
    asked = [prompt for prompt, _ in plan.of_concept("mono", WORLD, 8)]
    assert all("mono" in prompt for prompt in asked[::2])
    assert not any("mono" in prompt for prompt in asked[1::2])


def test_what_no_word_names_is_looked_for_everywhere():
    asked = Counter(word for prompt, _ in plan.of_concept("creepy", WORLD, 60) for word in prompt.split())
    assert all(asked[name] for name in (*WORLD.objects, *WORLD.styles))
    assert not asked["creepy"]


def test_in_an_unknown_world_every_prompt_asks():
    assert all("creepy" in prompt for prompt, _ in plan.of_concept("creepy", None, 30))


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \na cat\n")
    assert plan.read_prompts(path) == ["a cat", "a dog"]
    path.write_text("\n \n")
    with pytest.raises(BadStudy, match="holds no prompts. Write one a line"):
        plan.read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadStudy, match="cannot be read"):
        plan.read_prompts(path)
    with pytest.raises(BadStudy, match="cannot be read"):
        plan.read_prompts(tmp_path / "missing.txt")


def test_a_folder_of_pictures_with_what_generate_left_in_them(tmp_path, pngs):
    from expunge.sheet import png

    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "b.PNG").write_bytes(pngs[0])
    (folder / "a.png").write_bytes(png(Image.new("RGB", (8, 8)), {"prompt": "a <b>cat</b>", "seed": "12"}))
    (folder / "sheet.png").write_bytes(pngs[0])
    (folder / "notes.txt").write_text("no picture")
    found = plan.of_folder(folder)
    assert found.planned == [("a <b>cat</b>", 12), ("", None)]
    assert found.files == ["a.png", "b.PNG"]
    with Study.create(tmp_path / "study", found.planned, files=found.files, source=found.source) as study:
        plan.fill(study)
        assert study.path(2).read_bytes() == pngs[0]
        assert all(p.drawn for p in study.pictures())
        # what is there is not copied again
        (folder / "a.png").unlink()
        plan.fill(study)


def test_folders_without_pictures_and_damaged_ones_are_refused(tmp_path, pngs):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadStudy, match="there are no PNG files"):
            plan.of_folder(folder)
    for data in (pngs[0][:200], b"<svg/>", b"GIF89a"):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(BadStudy, match=r"a\.png is no PNG picture that can be read"):
            plan.of_folder(tmp_path)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, pngs, monkeypatch):
    (tmp_path / "a.png").write_bytes(pngs[0])
    assert plan.of_folder(tmp_path).files == ["a.png"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadStudy, match=r"a\.png is no PNG picture that can be read"):
        plan.of_folder(tmp_path)


@pytest.mark.parametrize("seed", ["9" * 30, "9" * 5000, "-1", "1.5"])
def test_what_is_no_seed_is_none(tmp_path, seed):
    from expunge.sheet import png

    (tmp_path / "a.png").write_bytes(png(Image.new("RGB", (8, 8)), {"seed": seed}))
    assert plan.of_folder(tmp_path).planned == [("", None)]


def test_a_picture_that_vanished_is_told(tmp_path, pngs):
    (tmp_path / "a.png").write_bytes(pngs[0])
    found = plan.of_folder(tmp_path)
    with Study.create(tmp_path / "study", found.planned, files=found.files, source=found.source) as study:
        (tmp_path / "a.png").unlink()
        with pytest.raises(BadStudy, match=r"a\.png is no PNG picture"):
            plan.fill(study)
        assert not study.pictures()[0].drawn
