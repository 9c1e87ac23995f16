"""The sealed door: what every erasure goes through, whatever the method.

Methods hold the mathematics; `erase` holds everything a method could forget: checks before any long work, the random
generator, checkpoints, the guard against NaN, restoring the base and proving it, the record of what was done.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__, checkpoint, tokens
from .concept import Concept, Targets
from .edits import Edit, LowRankEdit, load_edit
from .errors import BadModel, BadRun, ConceptError, Diverged, NeedsError, PromptCut, SettingError, Unsupported
from .flags import check
from .kernel.state import State, Step
from .records import CARD, CHECKPOINT, EDIT, Card, Run, need_empty, thin
from .storage import need_space, sweep

if TYPE_CHECKING:
    from .kernel.model import Model
    from .methods.base import Method

LARGEST_SEED = 2**63 - 1

Progress = Callable[[Step], None]


def erase(
    model: Model,
    concept: Concept | Iterable[Concept],
    method: Method,
    *,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    save_every: float = 15.0,
    progress: Progress | None = None,
) -> Edit:
    """Erase one concept or several from a model; the model itself is left untouched, bit for bit.

    Args:
        model: what `expunge.load` returned.
        concept: what to erase; several are erased by one edit.
        method: a value of one of the method classes; it holds the settings.
        seed: two runs with the same seed give the same edit.
        out: folder of the run: checkpoints while it lasts, then the edit and its card. Must be empty, or not be there.
        resume: go on with the interrupted run in `out`; the edit is bit-identical to an uninterrupted one's.
        save_every: seconds between checkpoints.
        progress: called after each update.

    Returns:
        The edit. Apply it with `with edit.on(model):`, keep it with `edit.save(path)`.

    Raises:
        ConceptError: the concept is empty, unknown to the model's world, or contradicts itself.
        NeedsError: the method needs something the concept or the model does not offer.
        SettingError: a setting or the seed is out of range.
        BadRun: `out` is in the way, or holds another run than the one to resume.
        Diverged: a loss or a weight became NaN or infinite.
        StorageError: the disk is full; nothing half written is left.
    """
    out = None if out is None else Path(out)
    targets = _prepare(model, concept, method, seed)
    request = _request(model, targets, method, seed)
    saved = _enter(out, request, resume)
    if isinstance(saved, Path):
        return load_edit(saved)
    if out is not None:
        need_space(out, _bytes_needed(model, request["settings"]))
    tokens.warn_keeps(model.world, targets, method)
    drive = _Drive(request, model.name, out, save_every, saved, progress)
    try:
        began = time.monotonic()
        with tokens.spoken(model, targets, method, request, out, progress) as spoken:
            _warn_cut(model, spoken)
            drive.before = time.monotonic() - began
            edit = drive.run(model, spoken, method, seed)
    finally:
        model.lock()
        if model.fingerprint() != request["base_hash"]:
            raise BadModel(
                f"method {request['method']!r} left the weights of {model.name!r} changed, a bug of the method. "
                "Load the model again; no edit was written."
            )
    return drive.finish(edit, model.device)


@dataclass
class _Drive:
    """One erasure on its way: its losses, its clock, its checkpoints."""

    request: dict[str, Any]
    model: str
    out: Path | None
    save_every: float
    saved: dict[str, Any] | None
    progress: Progress | None
    losses: dict[str, list[float]] = field(default_factory=dict)
    done: int = 0
    before: float = 0.0
    began: float = 0.0
    good: int = 0

    def run(self, model: Model, targets: tuple[Targets, ...], method: Method, seed: int) -> Edit:
        """Drive the method's generator to its end and return the bare edit."""
        state = State(seed)
        if self.saved:
            state = State.load(self.saved["fit"])
            self.losses, self.done, self.before = self.saved["losses"], self.saved["done"], self.saved["seconds"]
            self.good = self.done
        self.began = time.monotonic()
        _reset_peak(model.device)
        self._save(state)
        fit = method.fit(model, targets, state)
        try:
            return self._steps(fit, state)
        finally:
            fit.close()

    def _steps(self, fit: Any, state: State) -> Edit:
        last = time.monotonic()
        while True:
            try:
                step: Step = next(fit)
            except StopIteration as end:
                edit: Edit = end.value
                if not checkpoint.finite(edit.tensors()):
                    self._diverged(max(self.done - 1, 0), "a weight of the edit")
                return edit
            if bad := [name for name, value in step.losses.items() if not math.isfinite(value)]:
                self._diverged(step.i, f"the loss {bad[0]!r}")
            self.done = step.i + 1
            for name, value in step.losses.items():
                self.losses.setdefault(name, []).append(value)
            if self.out is not None and time.monotonic() - last >= self.save_every:
                self._save(state)
                last = time.monotonic()
            if self.progress:
                self.progress(step)

    def _save(self, state: State) -> None:
        if self.out is None:
            return
        fit = state.state_dict()
        if not checkpoint.finite(fit):
            # a finite loss can still have had an infinite gradient; such weights must not replace the last good ones
            self._diverged(max(self.done - 1, 0), "a weight or a moment of the optimiser")
        whole = {
            "request": self.request,
            "fit": fit,
            "losses": self.losses,
            "done": self.done,
            "seconds": self._seconds(),
        }
        checkpoint.save(self.out / CHECKPOINT, whole)
        self.good = self.done

    def _diverged(self, step: int, what: str) -> None:
        """Stop: record where, and say it."""
        where = "No --out was given, so no state was kept."
        if self.out is not None:
            Run(self.out).write_card(self._card(f"diverged at step {step}"))
            where = f"The last good state, after {self.good} steps, lies in {self.out / CHECKPOINT}."
        raise Diverged(
            f"training diverged: {what} was NaN or infinite at step {step}. {where} "
            "No edit was made. Lower lr, or look at the method's limits with `expunge methods`.",
            step,
        )

    def finish(self, edit: Edit, device: torch.device) -> Edit:
        """Fill the edit's card and write the run's folder, the card last."""
        card = replace(self._card("complete"), kind=edit.kind, peak_bytes=_peak(device))
        edit = edit.with_card(card)
        if self.out is not None:
            edit.save(self.out / EDIT)
            if isinstance(edit, LowRankEdit):
                edit.export_lora(self.out / "lora")
            Run(self.out).write_card(card)
            (self.out / CHECKPOINT).unlink()
        return edit

    def _card(self, status: str) -> Card:
        concept, *also = self.request["concepts"]
        return Card(
            method=self.request["method"],
            settings=self.request["settings"],
            concept=concept,
            also=also,
            model=self.model,
            base_hash=self.request["base_hash"],
            seed=self.request["seed"],
            version=__version__,
            seconds=round(self._seconds(), 3),
            losses={name: thin(values) for name, values in self.losses.items()},
            steps=self.done,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            status=status,
        )

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.began


def _prepare(model: Model, concept: Concept | Iterable[Concept], method: Method, seed: int) -> tuple[Targets, ...]:
    """Check everything that can be checked before any long work, and resolve the concepts."""
    if not 0 <= seed <= LARGEST_SEED:
        raise SettingError(f"seed {seed} is out of range: 0 to {LARGEST_SEED}.")
    check(method)
    concepts = (concept,) if isinstance(concept, Concept) else tuple(concept)
    if not concepts:
        raise ConceptError("there is no concept to erase. Give at least one.")
    known = [c.resolved(model.world) for c in concepts]
    words = [w for c in known for w in c.words(model.world)]
    targets = _once([c.resolve(model.world, without=words) for c in concepts])
    _check_clashes(known)
    _check_needs(model, known, method)
    tokens.check(model, known, method)
    if model.fingerprint() != model.hash:
        raise BadModel(
            f"the weights of {model.name!r} are not those it was loaded with: an edit is applied, or it was trained. "
            "Leave the `with edit.on(model):` block, or load the model again."
        )
    return targets


def _once(targets: list[Targets]) -> tuple[Targets, ...]:
    """Let each retained prompt belong to one target; a hundred concepts would otherwise retain each a hundred times."""
    seen: set[str] = set()
    out = []
    for target in targets:
        out.append(replace(target, keeps=tuple(k for k in target.keeps if k not in seen)))
        seen.update(target.keeps)
    return tuple(out)


def _check_clashes(concepts: list[Concept]) -> None:
    names = [c.name for c in concepts]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ConceptError(f"{twice[0]!r} is given twice. Give each concept once.")
    for c in concepts:
        if kept := set(c.keep) & set(names):
            raise ConceptError(
                f"{min(kept)!r} is to be erased and to be kept (by {c.name!r}). Take out one of the two."
            )


def _check_needs(model: Model, concepts: list[Concept], method: Method) -> None:
    needs, name = method.needs, _name(method)
    if needs.text and not model.reads_text:
        raise NeedsError(f"{name} needs a text encoder, and {model.name!r} has none. Choose a method for such models.")
    for c in concepts if needs.images else ():
        if c.images is None or not tokens.files(c.images):
            raise NeedsError(
                f"{name} needs pictures of {c.name!r}. Give a folder of them ({', '.join(sorted(tokens.PICTURES))}): "
                "Concept(images=...) or --images DIR."
            )
    if needs.sae and not _settings(method).get("sae"):
        raise NeedsError(f"{name} needs a trained sparse autoencoder. Give its file: --set sae=PATH.")
    if needs.autoencoder:
        side = model.sampling.size
        try:
            model.latents(torch.zeros(1, 3, side, side))
        except Unsupported as error:
            raise NeedsError(f"{name} needs an autoencoder, and {model.name!r} has none: {error}") from error


def _warn_cut(model: Model, targets: tuple[Targets, ...]) -> None:
    for target in targets:
        if cut := model.clipped(target.prompts):
            prompt, lost = cut[0]
            warnings.warn(
                f"{len(cut)} of {len(target.prompts)} prompts of {target.concept.name!r} are longer than the text "
                f"encoder's window. Of {prompt!r} the model does not see {lost!r}.",
                PromptCut,
                stacklevel=3,
            )


def _name(method: Method) -> str:
    return type(method).__name__.lower()


def _settings(method: Any) -> dict[str, Any]:
    return asdict(method)


def _request(model: Model, targets: tuple[Targets, ...], method: Method, seed: int) -> dict[str, Any]:
    """Return what makes two runs the same run, as plain JSON data."""
    request = {
        "base_hash": model.hash,
        "method": _name(method),
        "settings": _settings(method),
        "concepts": [t.concept.to_json() for t in targets],
        "seed": seed,
    }
    plain: dict[str, Any] = json.loads(json.dumps(request, default=str))
    return plain


def _enter(out: Path | None, request: dict[str, Any], resume: bool) -> dict[str, Any] | Path | None:
    """Check the run's folder; return the checkpoint to go on with, the finished edit, or None for a fresh start."""
    if out is None:
        if resume:
            raise BadRun(
                "there is nothing to resume without a folder. Give the interrupted run's: out=... or --out RUN."
            )
        return None
    if not resume:
        need_empty(out)
        return None
    return _resume(out, request)


def _resume(out: Path, request: dict[str, Any]) -> dict[str, Any] | Path | None:
    if not out.exists():
        return None
    if not out.is_dir():
        raise BadRun(f"{out} is a file. Give the folder of the interrupted run.")
    sweep(out)
    if (out / CARD).exists():
        card = Run.open(out).card
        if card.status == "complete":
            done = {k: v for k, v in asdict(card).items() if k in request} | {"concepts": card.concepts}
            _check_same(out, done, request)
            # killed between the last two writes of a run that was whole
            (out / CHECKPOINT).unlink(missing_ok=True)
            return out / EDIT
    if (out / CHECKPOINT).exists():
        saved = checkpoint.load(out / CHECKPOINT)
        _check_same(out, saved["request"], request)
        return saved
    if (former := tokens.former(out)) is not None:
        # killed between an inversion and the first checkpoint
        _check_same(out, former, request)
    elif any(out.iterdir()):
        raise BadRun(f"{out} holds files but no interrupted run ({CHECKPOINT} is missing). Choose another folder.")
    return None


def _check_same(out: Path, former: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise BadRun naming what differs between an interrupted run and the one asked for."""
    differs = [
        f"{k}: {former[k]!r} then, {request[k]!r} now"
        for k in ("base_hash", "method", "seed")
        if former[k] != request[k]
    ]
    if former["method"] == request["method"]:
        old, new = former["settings"], request["settings"]
        differs += [
            f"setting {k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in {**old, **new} if old.get(k) != new.get(k)
        ]
    if former["concepts"] != request["concepts"]:
        names = [" and ".join(c["name"] for c in r["concepts"]) for r in (former, request)]
        differs.append(
            f"concept: {names[0]} then, {names[1]} now" + (" (other details)" if names[0] == names[1] else "")
        )
    if differs:
        raise BadRun(f"{out} holds another run and cannot be resumed. It differs in {'; '.join(differs)}.")


def _bytes_needed(model: Model, settings: dict[str, Any]) -> int:
    """Estimate the disk a run takes: the edit, and checkpoints of weights and two moments, the new beside the old."""
    names = set(model.denoiser.names(settings.get("group", "text-readers")))
    rank = int(settings.get("rank") or 0)
    numbers = 0
    for name, p in model.denoiser.module.named_parameters():
        if name in names:
            numbers += rank * (p.shape[0] + p.numel() // p.shape[0]) if rank else p.numel()
    return 4 * numbers * (1 + 2 * 3)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Return the highest memory in bytes: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
