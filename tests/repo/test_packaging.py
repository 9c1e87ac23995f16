"""What is declared is what is used; what is pinned is what is installed; README's two commands stay two."""

import ast
import importlib.metadata
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [Requirement(x) for x in (ROOT / "constraints-cpu.txt").read_text().splitlines() if x and x[0] != "#"]
DISTRIBUTION = {"PIL": "pillow"}  # import name -> distribution, where they differ by more than dash and dot
NOT_IMPORTED = {"peft"}  # diffusers imports it when a LoRA file is loaded
FORBIDDEN = {"torchvision", "torch-fidelity", "lpips", "nudenet"}


def declared(group=""):
    listed = PROJECT["optional-dependencies"][group] if group else PROJECT["dependencies"]
    return {canonicalize_name(Requirement(r).name) for r in listed}


def imported(folder):
    """Distributions that the files under `folder` import, wherever the import stands."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    others = names - set(sys.stdlib_module_names) - {"expunge", "__future__"}
    return {canonicalize_name(DISTRIBUTION.get(n, n)) for n in others}


def test_every_import_is_declared():
    extras = declared("zoo") | declared("web") | declared("track")
    assert imported(ROOT / "src") <= declared() | extras


def test_every_core_dependency_is_used():
    assert declared() - imported(ROOT / "src") <= NOT_IMPORTED


def test_nothing_that_breaks_or_binds_is_declared():
    everything = declared().union(*(declared(g) for g in PROJECT["optional-dependencies"]))
    assert not everything & FORBIDDEN
    assert not [r for r in PROJECT["dependencies"] if "==" in r]


def test_every_declared_dependency_is_pinned_for_cpu_machines():
    pinned = {canonicalize_name(r.name) for r in CONSTRAINTS}
    assert declared() | declared("dev") | declared("zoo") <= pinned


def test_pins_satisfy_what_is_declared():
    wanted = [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    pins = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in CONSTRAINTS}
    assert not [str(r) for r in wanted if not r.specifier.contains(pins[canonicalize_name(r.name)])]


@pytest.mark.skipif("CI" not in os.environ, reason="only CI installs with the constraints in any case")
def test_constraints_are_honoured():
    wrong = {}
    for pin in CONSTRAINTS:
        try:
            version = importlib.metadata.version(pin.name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        if not pin.specifier.contains(version):
            wrong[pin.name] = version
    assert not wrong


def test_version_is_the_same_everywhere():
    import expunge

    assert expunge.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_entry_point_exists():
    import importlib

    module, _, name = PROJECT["scripts"]["expunge"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("name", "last"), [("install", "expunge demo"), ("test", "pytest")])
def test_readme_commands_are_marked_for_ci(name, last):
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(rf"<!-- ci:{name} -->\n```bash\n(.*)\n```\n<!-- ci:end -->", readme)
    assert command.startswith("pip install -c constraints-cpu.txt ")
    assert command.endswith(f"&& {last}")


@pytest.mark.parametrize("name", ["py.typed", "zoo/emoji/objects.json"])
def test_data_files_are_installed(name):
    import expunge

    assert (Path(expunge.__file__).parent / name).is_file()


def test_decisions_name_every_dependency():
    text = (ROOT / "docs/dev/decisions.md").read_text()
    assert not [d for d in sorted(declared()) if f"`{d}`" not in text]
