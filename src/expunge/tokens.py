"""Concepts that are no words: a token embedding, a folder of pictures, or a rating study.

All become soft tokens, a placeholder such as "<bomb>" that the text encoder reads as given vectors; pictures are first
turned into such vectors by textual inversion, those of a study weighted by the reward that people's ratings give them.
Methods see prompts, whatever the concept was given as.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import studies
from .concept import Concept, Targets, World
from .errors import BadRun, ConceptError, Diverged, KeepsAll, KeepsNothing, NeedsError, Unsupported
from .feedback.verdict import is_study
from .judges.embedding import embedding
from .kernel.inversion import invert, start
from .kernel.neighbours import encoded as read_as
from .kernel.state import State, Step
from .methods.base import unheard
from .pictures import PICTURES, encoded, files, pictures
from .records import REWARD
from .storage import write_atomic, write_json
from .studies import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from .kernel.critic import Critic
    from .kernel.model import Model, Text, Vectors
    from .methods.base import Method

TOKEN = "token.safetensors"
NOTE = "expunge"  # metadata of a token: its placeholder, and the run that it belongs to
# names of the two text encoders in embeddings made for SDXL
CLIP = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
# where the method has no setting of that name:
VECTORS = 1  # of an inverted concept; the paper's choice, more copy the pictures more closely
STEPS = 150  # updates of an inversion (the setting `inversion`)


def check(model: Model, concepts: Sequence[Concept], method: Method) -> None:
    """Check, before any long work, that the concepts given as embeddings or pictures can be read.

    Raises:
        ConceptError: an embedding is broken or of another width; no pictures; one folder for two concepts.
        BadStudy: a study cannot be learned from; says how many ratings are missing.
        NeedsError: the model lacks what soft tokens or inversion need.
    """
    if mixed := [c for c in concepts if c.keep_images is not None and is_study(c.keep_images)]:
        raise ConceptError(
            f"{mixed[0].keep_images} holds pictures that people reject beside those they accept. Give a folder of "
            "pictures to retain; a study that is given as the concept keeps what people accept by itself."
        )
    soft = [c for c in concepts if _is_soft(c, method)]
    for c in soft:
        if model.text is None:
            raise NeedsError(
                f"{c.name!r} is given as an embedding or pictures, and {model.name!r} reads no such tokens. Give words."
            )
        if c.embedding is not None:
            read(c.embedding, model.text.widths)
        elif c.images is not None and is_study(c.images):
            studies.check(c.images)
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
    soft = [c for c in soft if not _is_rated(c, method)]  # a study says itself what to keep
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

    Raises:
        NeedsError: the method cannot do without prompts to retain, and the studies give none.
    """
    told, soft, records = list(targets), dict[str, "Vectors"](), list[dict[str, Any]]()
    for i, target in enumerate(targets):
        if model.text is None or not _is_soft(target.concept, method):
            continue
        word = _placeholder(target.concept.name, soft)
        path = None if out is None else out / (f"token-{len(soft)}.safetensors" if soft else TOKEN)
        if path is not None and path.exists():
            vectors: Vectors = read(path, model.text.widths)
            verdict = _verdict(path)
        else:
            vectors, verdict = _vectors(model, model.text, target.concept, word, request, progress)
            if path is not None:
                write(path, word, vectors, request, verdict)
        soft[word] = vectors
        told[i] = _told(target, word, model.world, verdict, studies.critic(verdict, model))
        records += [verdict.record] if verdict else []
    if out is not None and records:
        write_json(out / REWARD, records)
    if model.text is None or not soft:
        yield targets
        return
    agreed = _agreed(told)
    _need_keeps(agreed, method)
    with model.text.tokens(soft):
        yield agreed


def check_heard(model: Model, targets: Sequence[Targets]) -> None:
    """Check that a model which reads text reads each concept's prompts otherwise than the same without its words.

    Args:
        model: the base, which understands the placeholders of soft tokens now.
        targets: with the prompts that methods get.

    Raises:
        ConceptError: it reads all prompts of a concept as it does their blanks.
    """
    if not model.reads_text or not targets:
        return
    # one prompt of each is enough, unless its word lies beyond the encoder's window
    first = silent(model, [(t.prompts[0], t.blanks[0]) for t in targets])
    for target in (t for t, alike in zip(targets, first, strict=True) if alike):
        if all(silent(model, list(zip(target.prompts, target.blanks, strict=True)))):
            raise unheard(model, target)


@torch.no_grad()
def silent(model: Model, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Tell of each (prompt, blank) whether a model reads both alike, to the last bit."""
    c = read_as(model, [side for pair in pairs for side in pair])
    alike = [(v[0::2] == v[1::2]).flatten(1).all(1) for v in (c.tokens, *c.extra.values())]
    found: list[bool] = torch.stack(alike).all(0).tolist()
    return found


@contextmanager
def readable(model: Model, prompt: str | None) -> Iterator[str | None]:
    """Give a prompt as the model reads it: a token's file (`.safetensors`) becomes its placeholder, all else stays.

    Raises:
        ConceptError: the file is no token, or another model's.
        NeedsError: the model reads no tokens.
    """
    path = Path(prompt or "")
    if path.suffix != ".safetensors":
        yield prompt
        return
    if model.text is None:
        raise NeedsError(f"{path} is a token, and {model.name!r} reads none. Give words.")
    vectors = read(path, model.text.widths)
    word = str(_note(path).get("placeholder") or _placeholder(path.stem, {}))
    with model.text.tokens({word: vectors}):
        yield word


def former(out: Path) -> dict[str, Any] | None:
    """Return the request of the run whose vectors lie in `out`, None without any.

    Raises:
        BadRun: the vectors cannot be read.
    """
    path = out / TOKEN
    if not path.exists():
        return None
    try:
        request: dict[str, Any] = _note(path)["request"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadRun(f"{path} cannot be read: {error}. Remove its folder and start again.") from error
    return request


def write(path: Path, word: str, vectors: Vectors, request: dict[str, Any], verdict: Verdict | None = None) -> None:
    """Write soft tokens as diffusers' `load_textual_inversion` reads them; `clip_l` and `clip_g` for two encoders."""
    names = [word] if len(vectors) == 1 else [key for key, encoder in CLIP.items() if encoder in vectors]
    tensors = {n: v.detach().cpu().contiguous() for n, v in zip(names, vectors.values(), strict=True)}
    # one entry: safetensors writes several in any order, and a run's files shall be the same to the byte
    rated = {"verdict": asdict(verdict)} if verdict else {}
    note = json.dumps({"placeholder": word, "request": request, **rated})
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


def _is_soft(concept: Concept, method: Method) -> bool:
    return concept.embedding is not None or (concept.images is not None and not method.needs.images)


def _is_rated(concept: Concept, method: Method) -> bool:
    """Tell whether a concept's prompts come from a study."""
    return concept.embedding is None and _is_soft(concept, method) and is_study(concept.images or Path())


def _note(path: Path) -> dict[str, Any]:
    """Return what a token's file says of itself beside its vectors; files of others say nothing."""
    with safe_open(path, framework="pt") as file:
        note: dict[str, Any] = json.loads((file.metadata() or {}).get(NOTE, "{}"))
    return note


def _verdict(path: Path) -> Verdict | None:
    """Return what the study said that a token was learned from; kept, since people may go on rating."""
    said = _note(path).get("verdict")
    return Verdict.from_json(said) if said else None


def _agreed(told: Sequence[Targets]) -> tuple[Targets, ...]:
    """Return targets none of which keeps a prompt that the study of another rejects."""
    against = {prompt for target in told for prompt in target.rejected}
    return tuple(replace(t, keeps=tuple(k for k in t.keeps if k not in against)) for t in told)


def _need_keeps(targets: Sequence[Targets], method: Method) -> None:
    """Warn where studies, which say what to keep, leave nothing; raise NeedsError if the method cannot do without."""
    studied = [str(t.concept.images) for t in targets if _is_rated(t.concept, method)]
    if not studied or any(t.keeps for t in targets):
        return
    why = f"people accept no prompt of {' and '.join(studied)}"
    mend = "List what to retain: Concept(keep=...) or --keep; or let people rate pictures of further prompts."
    if method.needs.keeps:
        name = type(method).__name__.lower()
        raise NeedsError(f"{name} weighs the concept against what is retained, and {why}. {mend}")
    settings: Any = method
    known = asdict(settings)
    # what is told by its own setting to retain nothing, or a file of prompts, asks nothing of a study
    if known.get("preserve") != 0 and not known.get("prompts"):
        # the caller of `erase`, beyond `spoken` and the context manager around it
        warnings.warn(f"{why}, so nothing to retain comes from there. {mend}", KeepsNothing, stacklevel=5)


def _placeholder(name: str, taken: dict[str, Vectors]) -> str:
    """Return "<van-gogh>" for "Van Gogh": no capitals, which tokenizers fold, and no "_", which numbers the vectors."""
    slug = re.sub(r"[\W_]+", "-", name.casefold()).strip("-") or "concept"
    same = sum(t.startswith(f"<{slug}>") or re.fullmatch(rf"<{re.escape(slug)}-\d+>", t) is not None for t in taken)
    return f"<{slug}-{same + 1}>" if same else f"<{slug}>"


def _told(target: Targets, word: str, world: World | None, verdict: Verdict | None, critic: Critic | None) -> Targets:
    """Return the target with the placeholder in place of every word of the concept, and what its study says."""
    concept = replace(target.concept, name=word, names=(word,), synonyms=())
    prompts, anchors = concept.prompts(world), concept.anchors(world)
    bare, blanks = concept.bare(world), concept.blanks(world)
    target = replace(target, prompts=prompts, anchors=anchors, bare=bare, blanks=blanks)
    if verdict is None:
        return target
    keeps = target.keeps if concept.keep else verdict.accepted
    return replace(target, keeps=keeps, rejected=verdict.rejected, accepted=verdict.accepted, critic=critic)


def _vectors(
    model: Model,
    text: Text,
    concept: Concept,
    word: str,
    request: dict[str, Any],
    progress: Callable[[Step], None] | None,
) -> tuple[Vectors, Verdict | None]:
    """Read a concept's embedding, or invert its pictures; of a study those that people reject, by their weights."""
    if concept.embedding is not None:
        return read(concept.embedding, text.widths), None
    if concept.images is None:
        raise ConceptError(f"{concept.name!r} has neither an embedding nor pictures.")
    verdict = weights = None
    if is_study(concept.images):
        embed = embedding(model.folder)
        verdict, images, weights = studies.learn(concept.images, embed, embed.name, model.sampling.size)
    else:
        images = pictures(concept.images, model.sampling.size)
    try:
        z = encoded(model, images)
    except Unsupported as error:
        raise NeedsError(f"pictures of {concept.name!r} need an autoencoder: {error} Give words.") from error
    known = model.world is None or bool(model.world.canonical(concept.name))
    wanted = request.get("settings", {})
    initial = start(text, concept.name if known else "", wanted.get("vectors", VECTORS))
    prompts = replace(concept, name=word).bare(model.world)
    steps = invert(
        model, text, z, word, prompts, initial, State(request["seed"]).generator,
        steps=wanted.get("inversion", STEPS), weights=weights,
    )  # fmt: skip
    return _drive(steps, concept, progress), verdict


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
