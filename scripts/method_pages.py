"""Write docs/methods/: one page a method, from its docstring, its settings and its paper. `--check` only compares."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from expunge import methods

FOLDER = Path(__file__).parents[1] / "docs/methods"
HEAD = "<!-- written by scripts/method_pages.py from the method's file: edit that -->\n\n"


def page(name: str) -> str:
    """Return a method's page."""
    facts = methods.describe(name)
    doc = importlib.import_module(f"expunge.methods.{name}").__doc__ or ""
    title, _, body = doc.strip().partition("\n")
    lines = [HEAD + f"# {title.rstrip('.')}\n", f"```text{body}\n```\n"]
    lines += [f"Family: {facts['family']}. Needs: {', '.join(facts['needs']) or 'nothing beside the model'}.\n"]
    lines += ["## Settings\n", "| setting | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{s['name']}` | {s['type']} | `{s['default']!r}` | {s['help']} |" for s in facts["settings"]]
    drawn = " --make-images 64" if "images" in facts["needs"] else ""
    use = f"expunge erase emoji --concept bomb --method {name}{drawn} --out runs/bomb-{name}"
    lines += ["\n## Use\n", f"```bash\n{use}\n```\n"]
    lines += ["## Cite\n", f"```bibtex\n{methods.get(name).paper.bibtex()}\n```\n"]
    return "\n".join(lines)


def index() -> str:
    """Return the list of methods."""
    rows = [HEAD + "# Methods\n", "| name | method | family | paper |", "|---|---|---|---|"]
    for name in methods.names():
        facts = methods.describe(name)
        paper = f"{facts['paper']}, arXiv:{facts['arxiv']}"
        rows.append(f"| [`{name}`]({name}.md) | {facts['summary']} | {facts['family']} | {paper} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` name those that differ; return the exit code."""
    wanted = {"index.md": index()} | {f"{n}.md": page(n) for n in methods.names()}
    there = {p.name: p.read_text() for p in FOLDER.glob("*.md")}
    stale = sorted(n for n in wanted.keys() | there.keys() if wanted.get(n) != there.get(n))
    if "--check" in arguments:
        if stale:
            print(f"stale: {', '.join(stale)}. Run python scripts/method_pages.py.")
        return bool(stale)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name])
        else:
            (FOLDER / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
