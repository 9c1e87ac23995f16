"""Stage `data`: eight openly licensed emoji sets, joined on code points, rendered, and thinned to distinct objects.

An object is kept when it exists in all styles and when no two of its drawings are nearly the same picture (noto and
blob share some artwork: nobody, judge or person, could tell those styles apart).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...storage import write_atomic
from .world import BENCH_TARGETS, HERE, KEPT, STYLES

SIZE = 128  # pixels a side of the stored RGBA renders; training draws them at 64
COUNT = 304  # objects kept
SAME = 0.055  # root mean squared difference in [0, 1] below which two drawings count as one (at 32 px, on white)


def fetch(folder: Path) -> None:
    """Unpack the npm packages into `folder`, downloading the ones that are missing with `npm pack`.

    A package that is there is whole: it gets its name when everything in it is unpacked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in (*(f"@iconify-json/{p}" for p in STYLES.values()), "emojibase-data"):
        target = folder / package.split("/")[-1]
        if (target / "package.json").exists():
            continue
        part = target.with_name(f"{target.name}.part")
        for left in (part, target):
            shutil.rmtree(left, ignore_errors=True)
        packed = subprocess.run(["npm", "pack", "-s", package], cwd=folder, check=True, capture_output=True, text=True)  # noqa: S603, S607
        with tarfile.open(folder / packed.stdout.strip().split("\n")[-1]) as tar:
            for member in tar.getmembers():
                member.name = member.name.removeprefix("package/")
            # Python before 3.11.4 has no filters
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            tar.extractall(part)
        part.rename(target)


def slug(label: str) -> str:
    """Turn an emoji's label into the icon sets' spelling: `Mrs. Claus` -> `mrs-claus`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[\u2019'\u201c\u201d.]", "", label.lower())).strip("-")


def bare(code: str) -> str:
    """Drop the variation selector from a code point sequence."""
    return "-".join(p for p in code.lower().split("-") if p != "fe0f")


class IconSet:
    """One style: icons by name, names by code point where the set tells them."""

    def __init__(self, folder: Path) -> None:
        data: dict[str, Any] = json.loads((folder / "icons.json").read_text())
        chars = folder / "chars.json"
        self.icons, self.aliases = data["icons"], data.get("aliases", {})
        self.size = data.get("width", 16), data.get("height", 16)
        self.chars = {bare(k): v for k, v in json.loads(chars.read_text()).items()} if chars.exists() else {}

    def find(self, code: str, slugs: set[str]) -> str | None:
        """Return the icon's name for a code point, by `chars.json` first, by other sets' slugs where it is silent."""
        if code in self.chars:
            return str(self.chars[code])
        return next((s for s in sorted(slugs) if s in self.icons or s in self.aliases), None)

    def svg(self, name: str) -> str:
        """Return a whole SVG document for an icon."""
        icon = self.icons[name] if name in self.icons else self.icons[self.aliases[name]["parent"]]
        w, h = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {w} {h}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}"'
        return f'{head} width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'


def render(svg: str) -> np.ndarray:
    """Rasterise an SVG document to uint8 RGBA, shape (SIZE, SIZE, 4)."""
    import io

    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """Composite RGBA pictures (..., SIZE, SIZE, 4) on white and shrink them to (..., 32, 32, 3) in [0, 1]."""
    rgba = pictures.astype(np.float32) / 255
    rgb = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    k = SIZE // 32
    small: np.ndarray = rgb.reshape(*rgb.shape[:-3], 32, k, 32, k, 3).mean(axis=(-4, -2))
    return small


def distinctness(pictures: np.ndarray) -> np.ndarray:
    """Return, for each object of (n, styles, SIZE, SIZE, 4), the distance between its two most similar drawings."""
    out = np.empty(len(pictures))
    for i, rows in enumerate(pictures):
        flat = thumbnails(rows).reshape(len(rows), -1)
        d = np.sqrt(((flat[:, None] - flat[None]) ** 2).mean(-1)) + np.eye(len(rows))
        out[i] = d.min()
    return out


def build(work: Path) -> None:
    """Write `pictures.npy` (objects, styles, 128, 128, 4) and `objects.json` to `work`, the list to the package too."""
    fetch(work / "sets")
    sets = {s: IconSet(work / "sets" / p) for s, p in STYLES.items()}
    emojis = json.loads((work / "sets/emojibase-data/en/data.json").read_text())
    groups = json.loads((work / "sets/emojibase-data/meta/groups.json").read_text())["groups"]
    wanted = (HERE / "candidates.txt").read_text().strip().split("\n")
    by_label = {e["label"]: e for e in emojis}
    unknown = [n for n in wanted if n not in by_label]
    if unknown:
        raise ValueError(f"candidates.txt names emoji that emojibase does not know: {unknown}")
    entries, pictures = [], []
    for label in tqdm(wanted, desc="render"):
        emoji = by_label[label]
        code = bare(emoji["hexcode"])
        slugs = {slug(label)} | {s.chars[code] for s in sets.values() if code in s.chars}
        found = {style: s.find(code, slugs) for style, s in sets.items()}
        if None in found.values():
            continue
        pictures.append(np.stack([render(sets[style].svg(str(name))) for style, name in found.items()]))
        # tags of faces are moods and slang ("lmao"), not names
        tags = [] if str(groups[str(emoji["group"])]).startswith("smileys") else emoji.get("tags", [])
        synonyms = [t for t in tags if t.lower() != label.lower() and re.fullmatch(r"[a-z][a-z ]{2,}", t)]
        entries.append({"name": label, "hexcode": code, "group": groups[str(emoji["group"])], "synonyms": synonyms})
    stack = np.stack(pictures)
    apart = distinctness(stack)
    targets = np.array([e["name"] in (*BENCH_TARGETS, *KEPT) for e in entries])
    order = np.argsort(-np.where(targets, np.inf, apart), kind="stable")[:COUNT]
    keep = sorted(i for i in order if targets[i] or apart[i] >= SAME)
    entries = [entries[i] for i in keep]
    unique_synonyms(entries)
    np.save(work / "pictures.npy", stack[keep])
    np.save(work / "apart.npy", apart[keep])
    text = json.dumps(entries, ensure_ascii=False, indent=0)
    write_atomic(work / "objects.json", text.encode())  # the last of the three: later stages ask for it
    (HERE / "objects.json").write_text(text + "\n")
    tqdm.write(
        f"{len(wanted)} candidates, {len(stack)} in all styles, {len(keep)} kept, closest {apart[keep].min():.3f}"
    )


def unique_synonyms(entries: list[dict[str, Any]]) -> None:
    """Keep only tags that belong to one object and are no object's name: a synonym must not be ambiguous."""
    names = {e["name"].lower() for e in entries}
    count: dict[str, int] = {}
    for e in entries:
        for t in e["synonyms"]:
            count[t.lower()] = count.get(t.lower(), 0) + 1
    for e in entries:
        e["synonyms"] = [t for t in e["synonyms"] if count[t.lower()] == 1 and t.lower() not in names][:4]
