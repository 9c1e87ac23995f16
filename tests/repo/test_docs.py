"""What the documentation says can be followed: links, code, commands, generated pages."""

import ast
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"<img[^>]*src=\"(?!https?:)([^\"]+)\"")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(?:bash|console|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MACHINE = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt|opt)/[\w.-]+")
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", ".ini", ".sh", ".css", ".j2", ".html", ".json", ""}
COMMANDS = {"demo", "erase", "distill", "generate", "audit", "report", "rate", "feedback", "sae", "bench"}
COMMANDS |= {"methods", "models", "protocols", "cite", "doctor"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    targets = [m[0] for m in LINK.findall(page.read_text())] + IMAGE.findall(page.read_text())
    assert not [t for t in targets if not (page.parent / t).exists()]


def test_a_dead_link_is_seen():
    assert LINK.findall("[a](no/such.md) [b](https://example.org/x) [c](page.md#there)") == [
        ("no/such.md", ""),
        ("page.md", "#there"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_compile_and_import(page):
    for code in BLOCK.findall(page.read_text()):
        tree = ast.parse(code)
        imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


def test_readme_python_runs(python, tmp_path):
    """The README's code, on the tiny model and with two updates."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert blocks
    code = "\n".join(blocks).replace('"emoji"', '"tiny"')
    script = tmp_path / "readme.py"
    script.write_text(re.sub(r"steps=\d+", "steps=2", code))
    python(script)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_shown_commands_exist(page):
    for block in SHELL.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for before, word in pairwise(words):
                if before == "expunge" and not word.startswith("-"):
                    assert word in COMMANDS, line


def test_every_command_exists(python):
    text = python("-c", "from expunge.cli import main; main(['--help'])")
    assert not [c for c in COMMANDS if c not in text]


def test_every_page_is_linked_from_the_index():
    index = (ROOT / "docs/index.md").read_text()
    pages = {str(p.relative_to(ROOT / "docs")) for p in PAGES if p.is_relative_to(ROOT / "docs")} - {"index.md"}
    pages -= {p for p in pages if p.startswith("methods/") and p != "methods/index.md"}  # its own index lists them
    assert not [p for p in sorted(pages) if f"({p})" not in index]


def test_method_pages_are_current(python):
    python(ROOT / "scripts/method_pages.py", "--check")


def test_no_path_of_one_machine(files):
    found = []
    for path in files:
        if path.suffix in TEXT and path != Path(__file__):
            found += [f"{path.relative_to(ROOT)}: {m}" for m in MACHINE.findall(path.read_text(errors="replace"))]
    assert not found


def test_no_machine_paths_check_works():
    assert MACHINE.findall("see /work/notes and /home/me/x, not docs/work/x") == ["/work/notes", "/home/me"]
