"""The public names: sorted, complete, all there."""

import ast

import pytest

import expunge


def test_names_are_sorted_and_listed_once():
    names = [n for n in expunge.__all__ if not n.startswith("__")]
    assert names == sorted(set(names))


@pytest.mark.parametrize("name", expunge.__all__)
def test_name_is_there(name):
    assert getattr(expunge, name) is not None


def test_types_are_declared_for_every_name(root):
    """What a type checker sees under TYPE_CHECKING is what __all__ promises."""
    tree = ast.parse((root / "src/expunge/__init__.py").read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    declared = {a.asname or a.name for b in blocks for n in b.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert declared == set(expunge.__all__) - {"__version__"}


def test_a_function_is_callable_whatever_was_imported_before(python):
    """A module of a function's name would take its place in the package as soon as anything imports it."""
    homes = sorted({home for home in expunge._HOMES.values() if home})
    code = f"""
from importlib import import_module
for home in {homes}:
    import_module(f"expunge.{{home}}")
import expunge
print([name for name, home in expunge._HOMES.items() if home and not callable(getattr(expunge, name))])
try:
    expunge.audit("nowhere")
except expunge.ExpungeError as error:
    print(error)
"""
    told = python("-c", code).splitlines()
    assert told[0] == "[]"
    assert "nowhere" in told[1]


def test_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = expunge.no_such_name


def test_dir_lists_the_public_names():
    assert set(expunge.__all__) <= set(dir(expunge))
