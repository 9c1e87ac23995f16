"""Concepts that are no words: a token embedding, or a folder of pictures.

Both become soft tokens, a placeholder such as "<bomb>" that the text encoder reads as given vectors; pictures are first
turned into such vectors by textual inversion. Methods see prompts, whatever the concept was given as.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .concept import Concept, Targets, World
from .errors import BadRun, ConceptError, Diverged, KeepsAll, NeedsError, Unsupported
from .kernel.inversion import invert, start
from .kernel.state import State, Step
from .storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from .kernel.model import Model, Text, Vectors
    from .methods.base import Method

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
TOKEN = "token.safetensors"
NOTE = "expunge"  # metadata of a token: its placeholder, and the run that it belongs to
# names of the two text encoders in embeddings made for SDXL
CLIP = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
VECTORS = 1  # of an inverted concept; the paper's choice, more copy the pictures more closely
STEPS = 150  # updates of an inversion
ENCODED = 16  # pictures the autoencoder takes at once


def check(model: Model, concepts: Sequence[Concept], method: Method) -> None:
    """Check, before any long work, that the concepts given as embeddings or pictures can be read.

    Raises:
        ConceptError: an embedding is broken or of another width; no pictures; one folder for two concepts.
        NeedsError: the model lacks what soft tokens or inversion need.
    """
    soft = [c for c in concepts if _is_soft(c, method)]
    for c in soft:
        if model.text is None:
            raise NeedsError(
                f"{c.name!r} is given as an embedding or pictures, and {model.name!r} reads no such tokens. Give words."
            )
        if c.embedding is not None:
            read(c.embedding, model.text.widths)
        elif c.images is not None and not files(c.images):
            raise ConceptError(f"{c.images} holds no pictures of {c.name!r}. Allowed: {', '.join(sorted(PICTURES))}.")
    sources = [c.embedding or c.images for c in soft]
    if twice := [c.name for c, source in zip(soft, sources, strict=True) if sources.count(source) > 1]:
        raise ConceptError(f"{' and '.join(map(repr, twice))} are given by the same file or folder. Give each its own.")


def warn_keeps(world: World | None, targets: Sequence[Targets], method: Any) -> None:
    """Warn, once for all, of concepts whose label the world does not know: what they are is then kept as well.

    Args:
        world: the model's world, None when unknown.
        targets: resolved concepts.
        method: one with `preserve` 0 keeps nothing, and nothing is said.
    """
    if world is None or asdict(method).get("preserve") == 0:
        return
    names = {n.casefold() for n in (*world.objects, *world.styles)}
    soft = [t.concept for t in targets if t.concept.embedding is not None or t.concept.images is not None]
    if strange := [c for c in soft if not c.keep and not names & {w.casefold() for w in c.words(world)}]:
        one = len(strange) == 1
        warnings.warn(
            f"{' and '.join(repr(c.name) for c in strange)} {'is' if one else 'are'} unknown to the world "
            f"{world.name!r}, so nothing of it is left out of what is kept: all its {len(world.objects)} objects and "
            f"{len(world.styles)} styles are retained, also one that the pictures or the embedding show. If one of "
            "them is meant, give its name as the concept; else list what to retain: Concept(keep=...) or --keep.",
            KeepsAll,
            stacklevel=3,
        )


@contextmanager
def spoken(
    model: Model,
    targets: tuple[Targets, ...],
    method: Method,
    request: dict[str, Any],
    out: Path | None,
    progress: Callable[[Step], None] | None,
) -> Iterator[tuple[Targets, ...]]:
    """Give the targets with prompts that hold placeholders, while the model understands these.

    Args:
        model: the base.
        targets: resolved concepts.
        method: what will erase them; one that learns from pictures itself keeps the words.
        request: what makes two runs the same; kept with the vectors, so that another run never uses them.
        out: the run's folder: vectors found there are used, new ones are written there.
        progress: called after each update of an inversion.
    """
    told, soft = list(targets), dict[str, "Vectors"]()
    for i, target in enumerate(targets):
        if model.text is None or not _is_soft(target.concept, method):
            continue
        word = _placeholder(target.concept.name, soft)
        path = None if out is None else out / (f"token-{len(soft)}.safetensors" if soft else TOKEN)
        if path is not None and path.exists():
            vectors: Vectors = read(path, model.text.widths)
        else:
            vectors = _vectors(model, model.text, target.concept, word, request["seed"], progress)
            if path is not None:
                write(path, word, vectors, request)
        soft[word] = vectors
        told[i] = _told(target, word, model.world)
    if model.text is None or not soft:
        yield targets
        return
    with model.text.tokens(soft):
        yield tuple(told)


def former(out: Path) -> dict[str, Any] | None:
    """Return the request of the run whose vectors lie in `out`, None without any.

    Raises:
        BadRun: the vectors cannot be read.
    """
    path = out / TOKEN
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            request: dict[str, Any] = json.loads((file.metadata() or {})[NOTE])["request"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadRun(f"{path} cannot be read: {error}. Remove its folder and start again.") from error
    return request


def write(path: Path, word: str, vectors: Vectors, request: dict[str, Any]) -> None:
    """Write soft tokens as diffusers' `load_textual_inversion` reads them; `clip_l` and `clip_g` for two encoders."""
    names = [word] if len(vectors) == 1 else [key for key, encoder in CLIP.items() if encoder in vectors]
    tensors = {n: v.detach().cpu().contiguous() for n, v in zip(names, vectors.values(), strict=True)}
    # one entry: safetensors writes several in any order, and a run's files shall be the same to the byte
    note = json.dumps({"placeholder": word, "request": request})
    write_atomic(path, save(tensors, {NOTE: note}))


def read(path: Path, widths: dict[str, int]) -> dict[str, Tensor]:
    """Read a textual-inversion embedding.

    Layouts: one tensor under the token's name or "emb_params", or "clip_l" and "clip_g" for two text encoders.

    Args:
        path: a safetensors file.
        widths: width of a token by text encoder of the model that shall read it.

    Returns:
        Vectors (k, d) in float32, by text encoder.

    Raises:
        ConceptError: no such file; other content; made for a model of other widths.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ConceptError(f"the embedding {path} cannot be read: {error}. Give a textual-inversion file.") from error
    named = {CLIP[key]: v for key, v in found.items() if key in CLIP}
    if not named and len(found) == 1:
        named = {next(iter(widths)): next(iter(found.values()))}
    if not named:
        keys = ", ".join(list(found)[:5])
        raise ConceptError(
            f"{path} is no textual-inversion embedding of one token: it holds {len(found)} tensors ({keys}). "
            "Allowed: one tensor, or clip_l and clip_g."
        )
    needed = " and ".join(f"{d} ({name})" for name, d in widths.items())
    has = " and ".join(f"{'x'.join(map(str, v.shape))} ({key})" for key, v in found.items())
    vectors = {name: v.float().reshape(-1, v.shape[-1]) for name, v in named.items() if 0 < v.ndim <= 2}
    if {name: v.shape[1] for name, v in vectors.items() if len(v)} != widths:
        raise ConceptError(
            f"the embedding {path} fits another model: its vectors are {has}, and this model's are {needed} wide. "
            "Give one that was made for this model."
        )
    if not all(bool(v.isfinite().all()) for v in vectors.values()):
        raise ConceptError(f"the embedding {path} holds NaN or infinity. Make it again.")
    return {name: vectors[name] for name in widths}


def files(folder: Path) -> list[Path]:
    """Return the pictures of a folder, by name."""
    if not folder.is_dir():
        raise ConceptError(f"{folder} is no folder. Give a folder of pictures ({', '.join(sorted(PICTURES))}).")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def pictures(folder: Path, size: int) -> Tensor:
    """Read every picture of a folder, (n, 3, size, size) in [0, 1]: the centre square, transparent parts white.

    Raises:
        ConceptError: a file is no picture, or damaged; the message names it.
    """
    return torch.stack([_picture(path, size) for path in files(folder)])


def _picture(path: Path, size: int) -> Tensor:
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConceptError(f"the picture {path} cannot be read: {error}. Replace or remove it.") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    numbers = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return numbers.view(size, size, 3).permute(2, 0, 1).float() / 255


def _is_soft(concept: Concept, method: Method) -> bool:
    if not method.needs.text:
        return False
    return concept.embedding is not None or (concept.images is not None and not method.needs.images)


def _placeholder(name: str, taken: dict[str, Vectors]) -> str:
    """Return "<van-gogh>" for "Van Gogh": no capitals, which tokenizers fold, and no "_", which numbers the vectors."""
    slug = re.sub(r"[\W_]+", "-", name.casefold()).strip("-") or "concept"
    same = sum(t.startswith(f"<{slug}>") or re.fullmatch(rf"<{re.escape(slug)}-\d+>", t) is not None for t in taken)
    return f"<{slug}-{same + 1}>" if same else f"<{slug}>"


def _told(target: Targets, word: str, world: World | None) -> Targets:
    """Return the target with the placeholder in place of every word of the concept."""
    concept = replace(target.concept, name=word, names=(word,), synonyms=())
    return replace(target, prompts=concept.prompts(world), anchors=concept.anchors(world))


def _vectors(
    model: Model, text: Text, concept: Concept, word: str, seed: int, progress: Callable[[Step], None] | None
) -> Vectors:
    """Read a concept's embedding, or invert its pictures."""
    if concept.embedding is not None:
        return read(concept.embedding, text.widths)
    if concept.images is None:
        raise ConceptError(f"{concept.name!r} has neither an embedding nor pictures.")
    images = pictures(concept.images, model.sampling.size)
    try:
        z = torch.cat([model.latents(images[i : i + ENCODED]) for i in range(0, len(images), ENCODED)])
    except Unsupported as error:
        raise NeedsError(f"pictures of {concept.name!r} need an autoencoder: {error} Give words.") from error
    known = model.world is None or bool(model.world.canonical(concept.name))
    initial = start(text, concept.name if known else "", VECTORS)
    prompts = replace(concept, name=word).bare(model.world)
    steps = invert(model, text, z, word, prompts, initial, State(seed).generator, steps=STEPS)
    return _drive(steps, concept, progress)


def _drive(
    steps: Generator[Step, None, dict[str, Tensor]], concept: Concept, progress: Callable[[Step], None] | None
) -> Vectors:
    """Drive an inversion to its end."""
    try:
        while True:
            step = next(steps)
            if not all(math.isfinite(v) for v in step.losses.values()):
                raise Diverged(
                    f"the inversion of the pictures of {concept.name!r} diverged at step {step.i}. No edit was made. "
                    "Look at the pictures and at the model's dtype: half precision may be too little.",
                    step.i,
                )
            if progress:
                progress(step)
    except StopIteration as end:
        vectors: dict[str, Tensor] = end.value
        return vectors
    finally:
        steps.close()
