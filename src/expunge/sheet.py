"""Pictures as numbered PNGs and one contact sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from .storage import as_json, filling

GAP = 4


def picture(image: Tensor) -> Image.Image:
    """Return a picture (3, h, w) in [0, 1] as 8-bit RGB."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save(folder: Path, images: Tensor, prompts: Sequence[str], seeds: Sequence[int], columns: int) -> list[Path]:
    """Write 000.png, 001.png, ... (prompt and seed inside each), index.json and sheet.png: all of them or none.

    Args:
        folder: where to; made if missing.
        images: (n, 3, h, w) in [0, 1].
        prompts: one a picture.
        seeds: one a picture.
        columns: pictures a row of the sheet.

    Returns:
        The numbered files.

    Raises:
        StorageError: when the disk is full or the folder cannot be written.
    """
    pictures = [picture(i) for i in images]
    names = [f"{n:03d}.png" for n in range(len(pictures))]
    rows = [{"file": n, "prompt": p, "seed": s} for n, p, s in zip(names, prompts, seeds, strict=True)]
    with filling(folder) as temp:
        for name, image, prompt, seed in zip(names, pictures, prompts, seeds, strict=True):
            (temp / name).write_bytes(png(image, {"prompt": prompt, "seed": str(seed)}))
        (temp / "index.json").write_bytes(as_json(rows))
        (temp / "sheet.png").write_bytes(png(contact(pictures, columns), {}))
    return [folder / name for name in names]


def contact(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return the pictures, which are of one size, in rows on white."""
    w, h = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (w + GAP) + GAP, rows * (h + GAP) + GAP), "white")
    for i, image in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(image, (GAP + column * (w + GAP), GAP + row * (h + GAP)))
    return sheet


def png(image: Image.Image, texts: dict[str, str]) -> bytes:
    """Return a PNG file that holds texts, by key."""
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()
