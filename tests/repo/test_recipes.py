"""Every method ships its paper's settings, and the command line takes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from expunge import cli, flags, methods
from expunge.records import Run

RECIPES = Path(__file__).parents[2] / "recipes"
VARIANTS = {"age": "ap"}  # papers whose method is settings of another's
STAGES = {"sfd-one-stage": "sfd"}  # other settings of the same paper
DISTILLATION = {"sid"}  # of `expunge distill`; erases nothing


def test_one_recipe_a_method() -> None:
    assert sorted(p.stem for p in RECIPES.glob("*.toml")) == sorted(
        [*methods.names(), *VARIANTS, *STAGES, *DISTILLATION]
    )


@pytest.mark.parametrize("name", [*methods.names(), *VARIANTS, *STAGES])
def test_a_recipe_is_cited_and_within_range(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    settings = flags.recipe(path)
    method = (VARIANTS | STAGES).get(name, name)
    assert settings.pop("method") == method
    built = flags.build(methods.get(method), settings)
    assert (f"arXiv:{built.paper.arxiv}" in path.read_text()) == (name not in VARIANTS)
    assert re.search(r"arXiv:\d{4}\.\d{5}", path.read_text())
    if "preserve" in settings and built.family != "closed form":
        assert built.preserve == 0, "the papers' losses have no such term"


def test_one_stage_has_the_updates_of_a_distillation() -> None:
    one, two = (methods.get("sfd")(**{k: v for k, v in flags.recipe(RECIPES / f"{n}.toml").items() if k != "method"})
                for n in ("sfd-one-stage", "sfd"))  # fmt: skip
    assert one.steps > 100 * methods.get("sfd")().steps
    assert (one.fake_lr, two.fake_lr) == (1e-5, 3e-5)


def test_the_command_line_erases_by_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = [f"--set={s}" for s in ("steps=2", "sampling_steps=2")]
    assert (
        cli.main(["erase", "tiny", "--concept", "bomb", f"--recipe={RECIPES / 'esd.toml'}", *short, "--out", str(out)])
        == 0
    )
    card = Run.open(out).card
    assert (card.method, card.steps) == ("esd", 2)
    assert {k: card.settings[k] for k in ("lr", "eta", "preserve", "batch")} == {
        "lr": 1e-5, "eta": 1.0, "preserve": 0.0, "batch": 1
    }  # fmt: skip


def test_the_recipe_of_a_distillation_is_cited_and_within_range() -> None:
    from expunge.distill import SiD

    settings = flags.recipe(RECIPES / "sid.toml")
    assert settings.pop("method") == "sid"
    built = flags.build(SiD, settings)
    assert f"arXiv:{built.paper.arxiv}" in (RECIPES / "sid.toml").read_text()
