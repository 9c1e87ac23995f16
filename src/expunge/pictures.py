"""Pictures that methods learn from: read from folders, or drawn from the base model; encoded once.

What a picture shows is told by a text file of its name (`a.png`, `a.txt`), else by the prompt inside the PNG, as
`expunge generate` writes it. Without either, a picture to forget shows the concept and nothing else that is known, and
a picture to retain is one of the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from .concept import Pictures, Targets
from .errors import BadRun, ConceptError, NeedsError, SettingError, Unsupported
from .feedback.verdict import is_study, rejected
from .kernel.state import Step
from .sheet import picture, png
from .storage import write_atomic, write_json

if TYPE_CHECKING:
    from .kernel.model import Model
    from .methods.base import Method

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
IMAGES = "images"  # folder of a run that holds the pictures drawn for it
INDEX = "index.json"  # which run they belong to
CHUNK = 16  # pictures drawn, or encoded, at once; always the same ones, since a batch can change a picture's last bit
MOST = 100_000


def check(model: Model, targets: Sequence[Targets], method: Method, make: int) -> None:
    """Check, before any long work, that a method will have the pictures it needs.

    Args:
        model: the base.
        targets: resolved concepts.
        method: what will erase them.
        make: pictures to draw of each concept, and as many to retain.

    Raises:
        NeedsError: pictures are missing, or cannot be encoded.
        ConceptError: the same pictures are to be forgotten twice, or forgotten and retained.
        SettingError: a number that makes no sense.
    """
    needs, name = method.needs, type(method).__name__.lower()
    if not 0 <= make <= MOST:
        raise SettingError(f"make_images={make} is out of range: 0 to {MOST}.")
    if make and not (needs.images or needs.retained):
        raise SettingError(f"{name} learns from no pictures: make_images={make} would draw them for nothing.")
    if needs.images or needs.autoencoder:
        _check_encodes(model, name)
    forgotten = [t.concept for t in targets if needs.images]
    for c in forgotten:
        if not (files(c.images) if c.images else make):
            raise NeedsError(
                f"{name} needs pictures of {c.name!r}. Give a folder of them ({', '.join(sorted(PICTURES))}): "
                "Concept(images=...) or --images DIR; or let the base model draw them: make_images=64 or "
                "--make-images 64."
            )
    if needs.retained:
        _check_retained(targets, name, make)
    _check_apart([c.images for c in forgotten], [t.concept.keep_images for t in targets if needs.retained])


def shown(
    model: Model,
    targets: tuple[Targets, ...],
    method: Method,
    request: dict[str, Any],
    out: Path | None,
    progress: Callable[[Step], None] | None,
) -> tuple[Targets, ...]:
    """Give the targets with the pictures that their method needs.

    Args:
        model: the base; soft tokens that prompts hold must be readable now.
        targets: resolved concepts.
        method: what will erase them.
        request: what makes two runs the same; kept beside drawn pictures, so that another run never uses them.
        out: the run's folder: pictures drawn there before are used, new ones are kept there.
        progress: called after each chunk that is drawn.
    """
    needs, make, size = method.needs, request.get("make_images", 0), model.sampling.size
    jobs = [Job("forget", t.concept.images, t.bare, t.prompts) for t in targets if needs.images]
    if needs.retained:
        folders = [t.concept.keep_images for t in targets if t.concept.keep_images is not None]
        keeps = [k for t in targets for k in t.keeps]
        jobs += [Job("retain", folder, ("",), ()) for folder in dict.fromkeys(folders)]
        jobs += [] if folders else [Job("retain", None, (), keeps, len(targets))]
    if not jobs:
        return targets
    if out is not None and any(job.folder is None for job in jobs):
        write_json(out / IMAGES / INDEX, {"request": request})
    generator = torch.Generator().manual_seed(request["seed"])
    told = _Told(progress, sum(make * job.times for job in jobs if job.folder is None))
    found: dict[str, list[Pictures]] = {"forget": [], "retain": []}
    for job in jobs:
        there = found[job.role]
        if job.folder is not None:
            images, prompts = pictures(job.folder, size), captions(job.folder, job.bare)
        else:
            home = None if out is None else out / IMAGES / (f"{job.role}-{len(there)}" if there else job.role)
            images, prompts = drawn(model, job.prompts, make * job.times, generator, home, told)
        there.append(Pictures(encoded(model, images), prompts))
    if needs.images:
        targets = tuple(replace(t, pictures=p) for t, p in zip(targets, found["forget"], strict=True))
    if retained := found["retain"]:
        whole = Pictures(torch.cat([p.latents for p in retained]), tuple(c for p in retained for c in p.prompts))
        targets = (replace(targets[0], retained=whole), *targets[1:])
    return targets


@dataclass(frozen=True)
class Job:
    """Pictures to get: from a folder, or `times` as many as asked for, drawn from prompts."""

    role: str
    folder: Path | None
    bare: Sequence[str]
    prompts: Sequence[str]
    times: int = 1


def drawn(
    model: Model,
    prompts: Sequence[str],
    n: int,
    generator: torch.Generator,
    home: Path | None,
    told: Callable[[int], None],
) -> tuple[Tensor, tuple[str, ...]]:
    """Draw n pictures of prompts in turn, or read them where they have been drawn before.

    Args:
        model: the base.
        prompts: in any order; every one is used before one is used twice.
        n: number of pictures.
        generator: of order and seeds.
        home: folder to keep them in, None for nowhere.
        told: called with the number of pictures that a chunk has added.

    Returns:
        Pictures (n, 3, size, size), rounded to 8 bits as PNGs are, and the prompt of each.
    """
    order = torch.randperm(len(prompts), generator=generator).tolist()
    seeds = torch.randint(2**31, (n,), generator=generator).tolist()
    chosen = tuple(prompts[order[i % len(order)]] for i in range(n))
    chunks = []
    for i in range(0, n, CHUNK):
        part = range(i, min(i + CHUNK, n))
        paths = [home / f"{j:04d}.png" for j in part] if home else []
        if paths and all(path.exists() for path in paths):
            chunks.append(torch.stack([read(path, model.sampling.size) for path in paths]))
        else:
            images = model.generate([chosen[j] for j in part], seeds=[seeds[j] for j in part]).float().cpu()
            for path, image, j in zip(paths, images, part, strict=False):
                write_atomic(path, png(picture(image), {"prompt": chosen[j], "seed": str(seeds[j])}))
            chunks.append((images.clamp(0, 1) * 255).round() / 255)
        told(len(part))
    return torch.cat(chunks), chosen


def encoded(model: Model, images: Tensor) -> Tensor:
    """Return the latents (n, ...) of pictures (n, 3, size, size) in [0, 1]."""
    # drawn pictures and those read from files differ in layout, and a convolution in the last bit with it
    return torch.cat([model.latents(part) for part in torch.split(images.contiguous(), CHUNK)])


def files(folder: Path) -> list[Path]:
    """Return the pictures of a folder, by name; the sheet that `expunge generate` adds is none of them.

    Of a rating study they are those that people reject.
    """
    if not folder.is_dir():
        raise ConceptError(f"{folder} is no folder. Give a folder of pictures ({', '.join(sorted(PICTURES))}).")
    if is_study(folder):
        return [path for path, _ in rejected(folder)]
    sheets = {folder / "sheet.png"} if (folder / INDEX).exists() else set()
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p not in sheets)


def digest(folder: Path) -> str:
    """Return the SHA-256 of what a folder's pictures are and show, in their order."""
    told, whole = dict(rejected(folder)) if is_study(folder) else {}, hashlib.sha256()
    for path in files(folder):
        text = path.with_suffix(".txt")
        shows = told[path].encode() if path in told else text.read_bytes() if text.is_file() else b""
        # each hashed by itself, so that none can run over into the next
        whole.update(hashlib.sha256(path.read_bytes()).digest() + hashlib.sha256(shows).digest())
    return whole.hexdigest()


def pictures(folder: Path, size: int) -> Tensor:
    """Read every picture of a folder, (n, 3, size, size) in [0, 1]: the centre square, transparent parts white.

    Raises:
        ConceptError: a file is no picture, or damaged; the message names it.
    """
    return torch.stack([read(path, size) for path in files(folder)])


def captions(folder: Path, otherwise: Sequence[str]) -> tuple[str, ...]:
    """Return what each picture of a folder shows; those that nobody has described take turns with `otherwise`."""
    found = []
    told = dict(rejected(folder)) if is_study(folder) else {}
    for i, path in enumerate(files(folder)):
        text = path.with_suffix(".txt")
        if path in told:
            prompt = told[path]
        elif text.is_file():
            prompt = text.read_text(encoding="utf-8", errors="replace").strip()
        else:
            with Image.open(path) as opened:
                prompt = str(opened.info.get("prompt", ""))
        found.append(prompt or otherwise[i % len(otherwise)])
    return tuple(found)


def former(out: Path) -> dict[str, Any] | None:
    """Return the request of the run that pictures in `out` were drawn for, None without any.

    Raises:
        BadRun: it cannot be read.
    """
    path = out / IMAGES / INDEX
    if not path.exists():
        return None
    try:
        request: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["request"]
    except (OSError, ValueError, KeyError) as error:
        raise BadRun(f"{path} cannot be read: {error}. Remove the run's folder and start again.") from error
    return request


class _Told:
    """Tells a progress callback of pictures as they are drawn."""

    def __init__(self, progress: Callable[[Step], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, more: int) -> None:
        self.done += more
        if self.progress:
            self.progress(Step(self.done - 1, self.total, {"drawn": self.done}))


def _check_encodes(model: Model, name: str) -> None:
    side = model.sampling.size
    try:
        model.latents(torch.zeros(1, 3, side, side))
    except Unsupported as error:
        raise NeedsError(f"{name} needs an autoencoder, and {model.name!r} has none: {error}") from error


def _check_retained(targets: Sequence[Targets], name: str, make: int) -> None:
    folders = [t.concept.keep_images for t in targets if t.concept.keep_images is not None]
    for folder in folders:
        if not files(folder):
            raise NeedsError(f"{folder} holds no pictures to retain. Allowed: {', '.join(sorted(PICTURES))}.")
    if folders:
        return
    way = "give a folder of them: Concept(keep_images=...) or --keep-images DIR"
    if not make:
        raise NeedsError(
            f"{name} needs pictures to retain. Either {way}, or let the base model draw them: make_images=64 or "
            "--make-images 64."
        )
    if not any(t.keeps for t in targets):
        raise NeedsError(
            f"{name} needs pictures to retain, and nothing is kept that could be drawn. Say what to keep: "
            f"Concept(keep=...) or --keep; or {way}."
        )


def _check_apart(forgotten: Sequence[Path | None], retained: Sequence[Path | None]) -> None:
    """Refuse a picture that is in two sets: to forget what is retained pulls the weights both ways at once."""
    sets = [[folder] for folder in forgotten if folder] + [list(dict.fromkeys(f for f in retained if f))]
    owners: dict[str, tuple[int, Path]] = {}
    for i, folders in enumerate(sets):
        for path in [p for folder in folders for p in files(folder)]:
            owner, other = owners.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), (i, path))
            if owner != i:
                role = "to be retained" if i == len(sets) - 1 else "of another concept"
                raise ConceptError(
                    f"the picture {path} is {role} and, as {other}, to be forgotten. Give sets of pictures that have "
                    "none in common."
                )


def read(path: Path, size: int) -> Tensor:
    """Return one picture, (3, size, size) in [0, 1]; see `pictures`."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConceptError(f"the picture {path} cannot be read: {error}. Replace or remove it.") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    numbers = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return numbers.view(size, size, 3).permute(2, 0, 1).float() / 255
