"""A method's docstring is its page: notation, limits and the paper are there."""

import importlib
import re

import pytest

from expunge import methods

SETTING = re.compile(r"[a-z][a-z0-9_]*")
ARXIV = re.compile(r"arXiv:\d{4}\.\d{4,5}")


def doc(name):
    return importlib.import_module(f"expunge.methods.{name}").__doc__ or ""


def test_every_method_file_is_in_the_table(root):
    files = {p.stem for p in (root / "src/expunge/methods").glob("*.py")} - {"__init__", "base"}
    assert files == set(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_docstring_has_its_entries(name):
    titles = ("Notation", "Erases", "Limits", "Differs", "Reference")
    entries = {title: methods.section(doc(name), title) for title in titles}
    assert not [title for title, text in entries.items() if not text]
    assert ARXIV.search(entries["Reference"])


@pytest.mark.parametrize("name", methods.names())
def test_docstring_and_paper_name_the_same_publication(name):
    assert f"arXiv:{methods.get(name).paper.arxiv}" in doc(name)


@pytest.mark.parametrize("name", methods.names())
def test_every_setting_has_help(name):
    settings = methods.describe(name)["settings"]
    assert settings
    assert all(SETTING.fullmatch(s["name"]) and s["help"] for s in settings)


def test_a_missing_entry_is_seen():
    assert not methods.section("Title.\n\nNotation    x: y\n", "Limits")
