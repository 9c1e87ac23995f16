"""Sparse autoencoders of a model's text encoders: trained, kept in a file, found again.

The file, `sae.safetensors`, holds one autoencoder a text encoder, which layer each reads, the hash of the encoders, and
some prompts that were kept out of the training. Beside a model's weights it is found without being named.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import checkpoint
from .concept import World
from .errors import BadRun, Diverged, NeedsError
from .flags import check
from .kernel.model import Model, digest
from .kernel.sae import SAE, geometric_median, hooked
from .kernel.sae import train as fit
from .kernel.state import State, Step
from .prompts import known as prompts_of
from .storage import sweep, write_atomic

FILE = "sae.safetensors"
FORMAT = "expunge-sae/1"
FEWEST = 20  # prompts that a training takes
HELD = 256  # at most so many prompts are kept out of the training, and never more than a tenth
SAMPLED = 512  # prompts whose states the bias starts from
ENCODED = 64  # prompts encoded at once


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a training; `recipes/itd.toml` has the paper's."""

    expansion: Annotated[int, Ge(1), Le(1024), "features a unit of the text encoder's width"] = 8
    k: Annotated[int, Ge(1), Le(1024), "active features a token"] = 32
    depth: Annotated[float, Gt(0), Le(1), "share of the text encoder's layers before the states that are read"] = 0.75
    steps: Annotated[int, Ge(1), Le(1_000_000), "optimiser updates"] = 3000
    batch: Annotated[int, Ge(2), Le(4096), "prompts an update"] = 64
    lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate"] = 1e-3
    patience: Annotated[int, Ge(1), Le(1_000_000), "updates without firing after which a feature counts as dead"] = 100


@dataclass(frozen=True)
class Dictionary:
    """What a file holds.

    Attributes:
        saes: by text encoder.
        layers: index of the layer whose output each reads.
        base: hash of the text encoders they were trained on.
        held: prompts that were kept out of the training.
        figures: by text encoder, the share of variance "explained" on the held prompts and that of "dead" features.
    """

    saes: dict[str, SAE]
    layers: dict[str, int]
    base: str
    held: tuple[str, ...]
    figures: dict[str, dict[str, float]]

    def save(self, path: Path) -> None:
        """Write the file, in half precision, whole or not at all."""
        tensors = {f"{e}.{n}": p.detach().half().cpu() for e, s in self.saes.items() for n, p in s.named_parameters()}
        about = {
            "k": {e: s.k for e, s in self.saes.items()},
            "layers": self.layers, "base": self.base, "held": self.held, "figures": self.figures,
        }  # fmt: skip
        # one entry: safetensors writes several in any order
        write_atomic(path, save({k: v.contiguous() for k, v in tensors.items()}, {FORMAT: json.dumps(about)}))

    @classmethod
    def read(cls, path: Path) -> Dictionary:
        """Read a file, in single precision.

        Raises:
            NeedsError: missing, cut off, or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 (not a dict)
                about = json.loads((file.metadata() or {})[FORMAT])
            saes = {}
            for name, k in about["k"].items():
                features, width = tensors[f"{name}.encoder"].shape
                own = {n: tensors[f"{name}.{n}"] for n in ("encoder", "decoder", "bias")}
                saes[name] = SAE(width, features, k)
                saes[name].load_state_dict(own, strict=False)  # how long features were idle matters in training only
            return cls(saes, about["layers"], about["base"], tuple(about["held"]), about["figures"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise NeedsError(f"{path} holds no sparse autoencoder: {error}. Make one with `expunge sae`.") from error


def place(model: Model, given: str) -> Path | None:
    """Return where a model's autoencoders are read from: the file given, or the one beside its weights."""
    beside = None if model.folder is None else model.folder / FILE
    return Path(given) if given else beside


def find(model: Model, given: str) -> Dictionary:
    """Return the autoencoders of a model, where the model is: of the file given, or of the one beside its weights.

    Raises:
        NeedsError: no text encoders, no file, or one made for other text encoders.
    """
    text, path = model.need_text(), place(model, given)
    how = (
        f"Train one, which takes minutes: `expunge sae {model.name} --out {FILE}"
        f"{'' if model.world else ' --prompts FILE'}`, then --set sae={FILE}."
    )
    if path is None or not path.is_file():
        where = f"at {path}" if given else f"beside the weights of {model.name!r}"
        raise NeedsError(f"there is no sparse autoencoder {where}. {how}")
    found = Dictionary.read(path)
    if found.base != digest(text.encoders.items()):
        raise NeedsError(
            f"the sparse autoencoder at {path} was trained on other text encoders than those of {model.name!r}. {how}"
        )
    for sae in found.saes.values():
        sae.to(model.device)
    return found


@torch.no_grad()
def states(model: Model, layers: Mapping[str, int], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return what layers put out while prompts are encoded, (b, n, d) in float32, by text encoder."""
    text, found = model.need_text(), dict[str, Tensor]()

    def keep(name: str, out: Tensor) -> None:
        found[name] = out.float()

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(hooked(text.layers[name][layer], partial(keep, name)))
        model.encode(list(prompts))
    return found


def batches(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield prompts in the portions that are encoded at once."""
    for i in range(0, len(prompts), ENCODED):
        yield prompts[i : i + ENCODED]


def known(world: World) -> tuple[str, ...]:
    """Return every prompt that a world's templates make of its objects, their synonyms and its styles."""
    names = (word for name in world.objects for word in (name, *world.synonyms.get(name, ())))
    return prompts_of(replace(world, objects=tuple(names)))


def train(
    model: Model,
    prompts: Sequence[str],
    out: Path,
    settings: Training | None = None,
    *,
    seed: int = 0,
    resume: bool = False,
    save_every: float = 15.0,
    progress: Callable[[Step], None] | None = None,
) -> Dictionary:
    """Train one autoencoder a text encoder and write them to a file; the model stays as it is.

    Args:
        model: whose text encoders.
        prompts: what people ask such a model for; each once.
        out: the file. A checkpoint lies beside it while the training lasts.
        settings: of the training.
        seed: two trainings with one seed give the same file.
        resume: go on with the interrupted training of `out`; the file is bit-identical to an undisturbed one's.
        save_every: seconds between checkpoints.
        progress: called after each update.

    Raises:
        NeedsError: no text encoder, or too few prompts.
        SettingError: a setting out of range.
        BadRun: `out` is in the way, or its checkpoint is of another training.
        Diverged: a loss became NaN or infinite.
    """
    settings = settings or Training()
    check(settings)
    text, prompts = model.need_text(), tuple(dict.fromkeys(prompts))
    if len(prompts) < FEWEST:
        raise NeedsError(
            f"{len(prompts)} different prompts are too few to train on. Give at least {FEWEST}, better 10,000."
        )
    layers = {name: max(1, round(settings.depth * len(found))) - 1 for name, found in text.layers.items()}
    base = digest(text.encoders.items())
    asked = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    request = {"base": base, "settings": asdict(settings), "seed": seed, "prompts": asked}
    saved = _enter(out, request, resume)
    if isinstance(saved, Dictionary):
        return saved
    held, trained, saes = _start(model, layers, prompts, settings, seed)
    state = State.load(saved["fit"]) if saved else State(seed)

    def draw() -> dict[str, Tensor]:
        chosen = torch.randint(len(trained), (settings.batch,), generator=state.generator).tolist()
        found = states(model, layers, [trained[i] for i in chosen])
        return {name: h[:, text.first :].flatten(0, 1) for name, h in found.items()}

    updates = fit(saes, draw, state, steps=settings.steps, lr=settings.lr, patience=settings.patience)
    _drive(updates, lambda: _save(out, request, state), save_every, progress)
    shares = explained(model, layers, saes, held)
    dead = {name: (sae.idle > settings.patience).float().mean().item() for name, sae in saes.items()}
    found = Dictionary(saes, layers, base, held, {n: {"explained": shares[n], "dead": dead[n]} for n in saes})
    found.save(out)
    _checkpoint(out).unlink(missing_ok=True)
    return found


def _drive(
    updates: Iterable[Step], save: Callable[[], None], save_every: float, progress: Callable[[Step], None] | None
) -> None:
    """Run a training to its end, with checkpoints; stop where a loss is no number."""
    last = time.monotonic()
    for step in updates:
        if bad := [name for name, value in step.losses.items() if not math.isfinite(value)]:
            raise Diverged(f"training diverged: {bad[0]!r} was NaN or infinite at step {step.i}. Lower lr.", step.i)
        if time.monotonic() - last >= save_every:
            save()
            last = time.monotonic()
        if progress:
            progress(step)


def _save(out: Path, request: dict[str, Any], state: State) -> None:
    checkpoint.save(_checkpoint(out), {"request": request, "fit": state.state_dict()})


@torch.no_grad()
def explained(
    model: Model, layers: Mapping[str, int], saes: Mapping[str, SAE], prompts: Sequence[str]
) -> dict[str, float]:
    """Return the share of the states' variance that the autoencoders explain on some prompts, by text encoder."""
    first = model.need_text().first
    parts = [states(model, layers, part) for part in batches(prompts)]
    shares = {}
    for name, sae in saes.items():
        x = torch.cat([part[name][:, first:].flatten(0, 1) for part in parts])
        shares[name] = 1 - ((x - sae(x)).square().mean() / (x - x.mean(0)).square().mean()).item()
    return shares


def _start(
    model: Model, layers: Mapping[str, int], prompts: Sequence[str], settings: Training, seed: int
) -> tuple[tuple[str, ...], list[str], dict[str, SAE]]:
    """Return the prompts held out, those to train on, and untrained autoencoders."""
    # of its own: a resumed state's generator is already further on
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    n = min(HELD, len(prompts) // 10)
    held, trained = tuple(prompts[i] for i in order[:n]), [prompts[i] for i in order[n:]]
    first = model.need_text().first
    parts = [states(model, layers, part) for part in batches(trained[:SAMPLED])]
    saes = {}
    for name in layers:
        x = torch.cat([part[name][:, first:].flatten(0, 1) for part in parts])
        sae = SAE(x.shape[1], settings.expansion * x.shape[1], settings.k, generator)
        sae.bias.data = geometric_median(x).cpu()
        saes[name] = sae.to(x.device)
    return held, trained, saes


def _checkpoint(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def need_free(out: Path) -> None:
    """Raise BadRun when a finished or an interrupted training is in the way."""
    if there := [p for p in (out, _checkpoint(out)) if p.exists()]:
        raise BadRun(
            f"{there[0]} is in the way. Go on with an interrupted training by --resume, or give another --out."
        )


def _enter(out: Path, request: dict[str, Any], resume: bool) -> dict[str, Any] | Dictionary | None:
    """Return the checkpoint to go on with, the finished file, or None for a fresh start."""
    part = _checkpoint(out)
    if not resume:
        need_free(out)
        return None
    if part.exists():
        sweep(out.parent)
        saved = checkpoint.load(part)
        if differs := [k for k in request if saved["request"][k] != request[k]]:
            raise BadRun(
                f"{part} is of another training: other {' and '.join(differs)}. Remove it, or give another --out."
            )
        return saved
    if not out.exists():
        return None
    done = Dictionary.read(out)
    if done.base != request["base"]:
        raise BadRun(f"{out} was trained on other text encoders. Give another --out.")
    return done
