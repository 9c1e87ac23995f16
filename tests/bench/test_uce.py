"""Many concepts at once: what is refused before anything is drawn, and what is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.bench import uce
from expunge.bench.measures import label
from expunge.errors import SettingError


def test_the_readers_the_table_and_every_other_closed_form_are_rows_of_their_own() -> None:
    assert [label(m) for m in uce.METHODS] == ["uce", "uce reads=tokens", "rece", "speed", "tuce"]


def test_some_objects_have_to_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uce, "load", lambda _: pytest.fail("the model was loaded first"))
    with pytest.raises(SettingError, match="can lose at most"):
        uce.measure([1, 304], tmp_path / "uce.json", print)
    assert not list(tmp_path.iterdir())
