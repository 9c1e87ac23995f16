"""A method that looks at fewer concepts than it was given says so before it starts."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import pytest

from expunge import Concept
from expunge.backbones import tiny
from expunge.door import erase
from expunge.effort import trajectories, warn_unseen
from expunge.errors import Unseen
from expunge.kernel.bank import Bank
from expunge.methods import METHODS, get

WORDS = ("bomb", "house", "tree", "dog", "boat")
ROLLING = [n for n in METHODS if hasattr(get(n), "rollouts")]


def settings(name: str, **changes: Any) -> Any:
    known = {"batch": 2, "sampling_steps": 2, "rollouts": 2, "reuse": 1, "maps": 1, "candidates": 3, **changes}
    return get(name)(**{k: v for k, v in known.items() if hasattr(get(name), k)})


@pytest.mark.parametrize("name", ROLLING)
def test_the_warning_counts_the_concepts_that_are_never_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = settings(name, steps=2, draws=2)
    banks: dict[int, list[int]] = {}
    prompts = Bank.prompts

    def spy(self: Bank, n: int) -> Any:
        found = prompts(self, n)
        if len(self.sizes) in (1, len(WORDS)):  # a bank of what is erased, not of what is kept
            ends = self.sizes.cumsum(0)
            banks.setdefault(id(self), []).extend(int((ends <= k).sum()) for k in found)
        return found

    monkeypatch.setattr(Bank, "prompts", spy)
    concepts = [Concept(w, templates=("{c}", "a {c}"), keep=("cat",)) for w in WORDS]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", Unseen)
        erase(tiny.model(), concepts, method, seed=0, make_images=3 if method.needs.images else 0)
    said = [str(w.message) for w in told if w.category is Unseen]
    if name == "spm":  # a fit for each
        assert not said
        return
    seen = {len(drawn): len(set(drawn)) for drawn in banks.values()}
    n = trajectories(name, asdict(method))
    assert n in seen
    assert n < len(WORDS)
    (line,) = said
    assert f"{name} samples {n} trajectories" in line
    assert f"{len(WORDS)} are to be erased: {len(WORDS) - seen[n]} are never looked at" in line


def test_the_steps_that_it_names_are_enough() -> None:
    given = asdict(get("esd")())
    with pytest.warns(Unseen, match=r"samples \d+ trajectories in \d+ updates.* 100 are to be") as told:
        warn_unseen("esd", given, 100)
    enough = int(str(told[0].message).split("steps=")[1].split(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unseen("esd", given | {"steps": enough}, 100)
        warn_unseen("esd", given, 1)
        warn_unseen("esd", given | {"steps": 0}, 100)
        warn_unseen("uce", asdict(get("uce")()), 100)
