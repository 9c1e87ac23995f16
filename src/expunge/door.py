"""The sealed door: what every erasure goes through, whatever the method.

Methods hold the mathematics; `erase` holds everything a method could forget: checks before any long work, the random
generator, checkpoints, the guard against NaN, restoring the base and proving it, the record of what was done.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import __version__, checkpoint, effort, footprint, pictures, sae, tokens
from .concept import Concept, Targets
from .edits import Edit, LowRankEdit, load_edit
from .errors import BadModel, ConceptError, Diverged, ExpungeError, NeedsError, PromptCut, SettingError
from .flags import check
from .kernel.state import Probe, State, Step
from .records import CHECKPOINT, EDIT, Card, Run, thin
from .rerun import enter, request_of
from .storage import need_space

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
    make_images: int = 0,
    probe: Probe | None = None,
    keep_state: bool = False,
) -> Edit:
    """Erase one concept or several from a model, which itself is left untouched, bit for bit.

    Args:
        model: what `expunge.load` returned.
        concept: what to erase; several are erased by one edit.
        method: a value of one of the method classes; it holds the settings.
        seed: two runs with the same seed give the same edit.
        out: folder of the run: checkpoints while it lasts, then the edit and its card. Must be empty, or not be there.
        resume: go on with the interrupted run in `out`; the edit is bit-identical to an uninterrupted one's. A run of
            `sfd` may be asked for more steps than before.
        save_every: seconds between checkpoints.
        progress: called after each update.
        make_images: pictures to draw of each concept, and as many to retain, where no folder gives a method its own.
        probe: looks at the model between updates and ends the fit when the concepts are gone.
        keep_state: leave the last checkpoint in `out`, so that the finished run can go on to more steps (`sfd`).

    Returns:
        The edit. Apply it with `with edit.on(model):`, keep it with `edit.save(path)`.

    Raises:
        ConceptError: the concept is empty, unknown to the model's world or its text encoder, or contradicts itself.
        NeedsError: the method needs something the concept or the model does not offer.
        SettingError: a setting or the seed is out of range.
        EmptySelection: there are no such weights in the model.
        BadRun: `out` is in the way, or holds another run than the one to resume.
        Diverged: a loss or a weight became NaN or infinite.
        StorageError: the disk is full; nothing half written is left.
    """
    out = None if out is None else Path(out)
    targets = _prepare(model, concept, method, seed, make_images)
    continues: bool = getattr(method, "continues", False)
    if keep_state and not continues:
        raise SettingError(f"keep_state is for methods that can go on to more steps, not for {_name(method)}.")
    request = request_of(model, targets, method, seed, make_images, probe)
    saved = enter(out, request, resume, continues)
    if isinstance(saved, Path):
        return load_edit(saved)
    if out is not None:
        need_space(out, footprint.needed(model, method, request))
    tokens.warn_keeps(model.world, targets, method)
    effort.warn_unseen(_name(method), request["settings"], len(targets))
    drive = Drive(request, model.name, out, save_every, saved, progress, keep_state)
    began = time.monotonic()
    with (
        torch.enable_grad(),  # whoever calls may have turned gradients off
        _restored(model, request),
        tokens.spoken(model, targets, method, request, out, progress) as spoken,
    ):
        _check_read(model, spoken)
        shown = pictures.shown(model, spoken, method, request, out, progress)
        drive.before = time.monotonic() - began
        edit = drive.run(model, shown, method, seed, probe)
    return drive.finish(edit, _peak(model.device))


@contextmanager
def _restored(model: Model, request: dict[str, Any]) -> Iterator[None]:
    """Put back whatever is unlocked in here, and prove that the base is what it was."""
    try:
        yield
    finally:
        model.lock()
        if model.fingerprint() != request["base_hash"]:
            raise BadModel(
                f"method {request['method']!r} left the weights of {model.name!r} changed, a bug of the method. "
                "Load the model again; no edit was written."
            )


@dataclass
class Drive:
    """One erasure on its way: its losses, its clock, its checkpoints."""

    request: dict[str, Any]
    model: str
    out: Path | None
    save_every: float
    saved: dict[str, Any] | None
    progress: Progress | None
    keep_state: bool
    losses: dict[str, list[float]] = field(default_factory=dict)
    done: int = 0
    before: float = 0.0
    began: float = 0.0
    good: int = 0
    chosen: dict[str, float] = field(default_factory=dict)

    def run(self, model: Model, targets: tuple[Targets, ...], method: Method, seed: int, probe: Probe | None) -> Edit:
        """Drive the method's generator to its end and return the bare edit."""
        state = State(seed)
        if self.saved:
            state = State.load(self.saved["fit"])
            self.losses, self.done, self.before = self.saved["losses"], self.saved["done"], self.saved["seconds"]
            self.good = self.done
        if probe:
            state.observe(probe, model)
        self.began = time.monotonic()
        _reset_peak(model.device)
        if not self.saved:
            # the folder is this run's from here on. One that goes on has its state there, and none in memory yet
            self._save(state)
        self.chosen = state.chosen
        fit = method.fit(model, targets, state)
        try:
            edit = self._steps(fit, state)
            if self.keep_state:
                self._save(state)
            return edit
        finally:
            fit.close()

    def _steps(self, fit: Any, state: State) -> Edit:
        last = time.monotonic()
        while True:
            try:
                step: Step = next(fit)
            except StopIteration as end:
                edit: Edit = end.value
                self._note(state.noted())
                if not checkpoint.finite(edit.tensors()):
                    self._diverged(max(self.done - 1, 0), "a weight of the edit was NaN or infinite")
                return edit
            except Diverged as error:
                self._diverged(error.step, str(error))
            except ExpungeError:
                if self.out is not None and not self.done:
                    # the method refused to begin: there is nothing to go on with, and nothing in the way of another try
                    (self.out / CHECKPOINT).unlink()
                raise
            step = replace(step, losses={**step.losses, **state.noted()})
            if bad := [name for name, value in step.losses.items() if not math.isfinite(value)]:
                self._diverged(step.i, f"the loss {bad[0]!r} was NaN or infinite")
            self.done = step.i + 1
            self._note(step.losses)
            if self.out is not None and time.monotonic() - last >= self.save_every:
                self._save(state)
                last = time.monotonic()
            if self.progress:
                self.progress(step)

    def _note(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)

    def _save(self, state: State) -> None:
        if self.out is None:
            return
        try:
            fit = state.state_dict()
        except Diverged as error:
            self._diverged(error.step, str(error))
        if not checkpoint.finite(fit):
            # a finite loss can still have had an infinite gradient; such weights must not replace the last good ones
            self._diverged(max(self.done - 1, 0), "a weight or a moment of the optimiser was NaN or infinite")
        whole = {
            "request": self.request,
            "model": self.model,
            "fit": fit,
            "losses": self.losses,
            "done": self.done,
            "seconds": self._seconds(),
        }
        checkpoint.save(self.out / CHECKPOINT, whole)
        self.good = self.done

    def _diverged(self, step: int, what: str) -> NoReturn:
        """Stop: record where, and say it."""
        where, made = "No --out was given, so no state was kept.", "No edit was made."
        if self.out is not None:
            where = f"The last good state, after {self.good} steps, lies in {self.out / CHECKPOINT}."
            if (self.out / EDIT).exists():
                made = f"The edit in {self.out} is that of fewer steps, as before."
            else:
                Run(self.out).write_card(self._card(f"diverged at step {step}"))
        raise Diverged(
            f"training diverged: {what} at step {step}. {where} "
            f"{made} Lower lr, or look at the method's limits with `expunge methods`.",
            step,
        )

    def finish(self, edit: Edit, peak: int) -> Edit:
        """Fill the edit's card, with the highest memory in bytes, and write the run's folder, the card last."""
        card = replace(self._card("complete"), kind=edit.kind, peak_bytes=peak)
        edit = edit.with_card(card)
        if self.out is not None:
            Run(self.out).withdraw()  # of a run that went on: a card must not stand beside another edit
            edit.save(self.out / EDIT)
            if isinstance(edit, LowRankEdit):
                edit.export_lora(self.out / "lora")
            Run(self.out).write_card(card)
            if not self.keep_state:
                (self.out / CHECKPOINT).unlink(missing_ok=True)
        return edit

    def _card(self, status: str) -> Card:
        concept, *also = self.request["concepts"] or [{}]
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
            samples_seen=self.done * int(self.request["settings"].get("batch", 0)),
            make_images=self.request.get("make_images", 0),
            contents=self.request.get("contents", {}),
            chosen=self.chosen,
        )

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.began


def _prepare(
    model: Model, concept: Concept | Iterable[Concept], method: Method, seed: int, make_images: int = 0
) -> tuple[Targets, ...]:
    """Check everything that can be checked before any long work, and resolve the concepts."""
    if not 0 <= seed <= LARGEST_SEED:
        raise SettingError(f"seed {seed} is out of range: 0 to {LARGEST_SEED}.")
    check(method)
    concepts = (concept,) if isinstance(concept, Concept) else tuple(concept)
    if not concepts and method.needs.concept:
        raise ConceptError("there is no concept to erase. Give at least one.")
    known = [c.resolved(model.world) for c in concepts]
    words = [w for c in known for w in c.words(model.world)]
    targets = _once([c.resolve(model.world, without=words) for c in concepts])
    _check_clashes(known)
    _check_needs(model, targets, method)
    pictures.check(model, targets, method, make_images)
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


def _check_needs(model: Model, targets: Iterable[Targets], method: Method) -> None:
    needs, name = method.needs, _name(method)
    if needs.text and not model.reads_text:
        raise NeedsError(
            f"{name} needs a model that reads text, and {model.name!r} reads the names of its classes alone. Choose a "
            "method that trains the network, such as sdd with group=all."
        )
    if needs.keeps and not any(t.keeps for t in targets):
        raise NeedsError(
            f"{name} weighs the concept against what is retained, and nothing is. Give Concept(keep=...) or --keep."
        )
    if needs.steps and model.one_step is not None:
        raise NeedsError(
            f"{name} needs a model that is sampled in steps, and {model.name!r} is a one-step generator. Give the "
            "model it was distilled from, or use sfd."
        )
    if needs.encoders:
        model.need_text()
    if needs.sae:
        settings: Any = method
        sae.find(model, settings.sae)


def _check_read(model: Model, targets: tuple[Targets, ...]) -> None:
    """Warn of prompts that the text encoder cuts, and refuse a concept that it does not hear."""
    for target in targets:
        kinds = {"prompts": target.prompts, "anchor prompts": target.anchors, "kept prompts": target.keeps}
        cut = {kind: found for kind, prompts in kinds.items() if (found := model.clipped(prompts))}
        if cut:
            parts = [f"{len(found)} of {len(kinds[kind])} {kind}" for kind, found in cut.items()]
            prompt, lost = next(iter(cut.values()))[0]
            warnings.warn(
                f"{' and '.join(parts)} of {target.concept.name!r} are longer than the text encoder's window. Of "
                f"{prompt!r} the model does not see {lost!r}.",
                PromptCut,
                stacklevel=3,
            )
    tokens.check_heard(model, targets)


def _name(method: Method) -> str:
    return type(method).__name__.lower()


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
