"""An edit of membranes: low-rank updates that open to prompts of their concept and let all others pass unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..concept import Concept, Targets
from ..errors import BadEdit, Unsupported
from ..kernel.gate import Gate, Membranes, named
from ..kernel.model import Model, component_of
from ..records import Card
from ..vocabulary import elsewhere
from .io import check_base, parameters, write
from .lowrank import LowRankEdit

NOUNS = 48  # words that stand for everything else where nothing says what to retain


@dataclass(frozen=True)
class Membrane:
    """One concept's update and the gate that opens it.

    Attributes:
        factors: `component.parameter` -> (down, up); down (1, in, ...), up (out, 1, ...).
        gate: reads the prompts.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    gate: Gate


@dataclass(frozen=True)
class GatedEdit:
    """Membranes, one a concept. What a prompt does not open is as in the base, bit for bit, each picture by itself.

    Attributes:
        membranes: in the order of the card's concepts.
        card: where the edit comes from; None until `erase` has filled it in.
    """

    membranes: tuple[Membrane, ...]
    card: Card | None = None
    kind: ClassVar[str] = "gated"

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], card: Card | None) -> GatedEdit:
        """Make the edit from what `tensors` returned."""
        found = []
        for i in range(len({k.partition(".")[0] for k in tensors})):
            own = {k.partition(".")[2]: v for k, v in tensors.items() if k.partition(".")[0] == str(i)}
            gate = Gate(own.pop("gate.tokens"), own.pop("gate.closed").item())
            names = sorted({k.rpartition(".")[0] for k in own})
            found.append(Membrane({n: (own[f"{n}.down"], own[f"{n}.up"]) for n in names}, gate))
        return cls(tuple(found), card)

    @classmethod
    def joined(cls, edits: Sequence[GatedEdit]) -> GatedEdit:
        """Return one edit with the membranes of several that were made for one base with the same settings.

        Raises:
            BadEdit: they were not.
        """
        cards = [edit.card for edit in edits if edit.card is not None]
        if len({(c.base_hash, str(c.settings)) for c in cards}) != 1 or len(cards) != len(edits):
            raise BadEdit(
                "only edits of one base and with the same settings can be joined. Apply others one inside the other: "
                "`with one.on(model), two.on(model):`."
            )
        also = [concept for card in cards for concept in card.concepts][1:]
        whole = replace(cards[0], also=also, seconds=sum(c.seconds for c in cards), losses={})
        return cls(tuple(m for edit in edits for m in edit.membranes), whole)

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Every layer's update by all K membranes, on the CPU: down (K, in, ...), up (out, K, ...)."""
        pairs = {n: [m.factors[n] for m in self.membranes] for n in self.membranes[0].factors}
        # those that were read lie there, those just made lie with their model
        return {
            n: (torch.cat([d.cpu() for d, _ in pair]), torch.cat([u.cpu() for _, u in pair], 1))
            for n, pair in pairs.items()
        }

    def with_card(self, card: Card) -> GatedEdit:
        """Return the same edit with its card."""
        return replace(self, card=card)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is saved."""
        out: dict[str, Tensor] = {}
        for i, m in enumerate(self.membranes):
            out |= {f"{i}.{name}": factor for name, factor in named(m.factors).items()}
            out[f"{i}.gate.tokens"] = m.gate.tokens
            out[f"{i}.gate.closed"] = torch.tensor(m.gate.closed, dtype=torch.float64)
        return out

    @contextmanager
    def on(self, model: Model, *, transfer: bool = False) -> Iterator[Model]:
        """Apply the edit by hooks; no weight changes, and on exit the hooks are gone.

        Args:
            model: the base the edit was made for.
            transfer: apply it to another fine-tune of that base, for which it was not trained: its layers must have the
                same names and shapes. The gates of concepts given by words are measured anew on its text encoder.

        Raises:
            BadEdit: the edit was made for another base, or does not fit this one.
        """
        if not transfer:
            self._check(model)
        gates = [m.gate for m in self.membranes] if not transfer else self._measured(model)
        membranes = Membranes(model.denoiser.module, self._fitted(model), gates)
        try:
            yield model
        finally:
            membranes.close()

    def save(self, path: Path) -> None:
        """Write a safetensors file with the card in its metadata, atomically."""
        write(path, self.tensors(), self.kind, self.card)

    def export_lora(self, folder: Path, *, ungated: bool = False) -> list[Path]:
        """Write the membranes as LoRA files, see `LowRankEdit.export_lora`.

        Args:
            folder: where to.
            ungated: leave the gates out, so that every membrane is open to every prompt.

        Raises:
            Unsupported: without `ungated`: the gate reads the prompt, and neither a LoRA nor merged weights can.
        """
        if not ungated:
            raise Unsupported(
                "a membrane opens by what the prompt says; neither a LoRA file nor merged weights can hold that. Apply "
                "the edit by `with edit.on(model):`, or export it always open, so that it also changes pictures of "
                "other things: export_lora(folder, ungated=True)."
            )
        return LowRankEdit(self.factors, self.card).export_lora(folder)

    def _check(self, model: Model) -> None:
        try:
            check_base(self.card, model)
        except BadEdit as error:
            raise BadEdit(
                f"{error} Membranes can also be tried on another fine-tune of the same base: `expunge generate "
                "--transfer`, or `with edit.on(model, transfer=True):`."
            ) from error

    def _fitted(self, model: Model) -> dict[str, tuple[Tensor, Tensor]]:
        """Return every layer's factors by the network's own names, where they are needed."""
        live, prefix = parameters(model), component_of(model, model.denoiser.module) + "."
        for n, (down, up) in self.factors.items():
            if n not in live or live[n].shape != (len(up), *down.shape[1:]):
                raise BadEdit(f"the edit's layer {n!r} is missing in {model.name!r}, or has another shape there.")
        return {
            n.removeprefix(prefix): (d.to(live[n].device), u.to(live[n].device)) for n, (d, u) in self.factors.items()
        }

    def _measured(self, model: Model) -> list[Gate]:
        """Return the gates as the text encoder of another model has them."""
        concepts = [Concept.from_json(c) for c in self.card.concepts] if self.card is not None else []
        if len(concepts) != len(self.membranes):
            raise BadEdit("an edit without its card does not know its concepts. Load it from the file of its run.")
        worded = [c for c in concepts if c.images is None and c.embedding is None]
        targets = [c.resolve(model.world, without=[w for o in worded for w in o.words(model.world)]) for c in worded]
        fresh = dict(zip(worded, gates(model, targets), strict=True)) if targets else {}
        return [fresh.get(c, m.gate) for c, m in zip(concepts, self.membranes, strict=True)]


def gates(model: Model, targets: Sequence[Targets]) -> list[Gate]:
    """Return each concept's gate: open to its prompts, closed to the same without its word and to what is retained."""
    neutral = model.encode(neighbourhood(targets)).tokens
    found = []
    for target in targets:
        blank = model.encode(target.blanks).tokens
        found.append(Gate.between(model.encode(target.prompts).tokens, torch.cat([neutral, blank])))
    return found


def neighbourhood(targets: Sequence[Targets]) -> list[str]:
    """Return prompts that a membrane must not change: what is retained, else common nouns; the empty one among them."""
    keeps = [k for target in targets for k in target.keeps] or elsewhere(None, targets, NOUNS)
    return [*dict.fromkeys(keeps), ""]
