"""SFD - score forgetting distillation.

Distils the model into a one-step generator that never learns the concept: where generator and fake score are told the
forgotten prompt, the teacher is told a safe one. Data-free: all samples are the generator's own.

    L(psi)   = l_psi(c_r) + lambda l_psi(c_f)
    L(theta) = l_theta(c_r; phi told c_r) + lambda l_theta(c_f; phi told c') + preserve || x(z, c_r) - x_0(z, c_r) ||^2

with the two losses of score-identity distillation, one update of psi and one of theta in turn (`kernel/identity.py`).
On a generator that was distilled before, forgetting starts from it (two stages). The last term is ours and for these:
it holds samples x of retained prompts to x_0, what that generator drew. On a multi-step model it distils and forgets at
once (one stage), in as many updates as a distillation; the default is for two stages. All is written in clean
predictions, so that eps, x0, v and flow networks do alike.

Notation    phi: teacher · psi: fake score · theta: generator · c_r: retained prompt · c_f: forgotten prompt · c': its
            safe one, about the anchor, else a retained one, fixed for the run
Erases      classes; objects, persons and styles of a text-to-image model
Limits      the result draws in one step only; what is not among the retained prompts is not distilled; the losses swing
            around zero: look at `distance`, `retained` and `recalled`. No phase gate and no unconditional anchor: one
            step has no phases, and without guidance nothing is asked of the empty prompt
Differs     `preserve`. The released code stops at the first update of a v network. For text it trains two networks in
            half precision, too coarse at its rate for weights above 4e-3; here they are float32, and may be low-rank.
            For nudity its empty prompt is a negative one, which is left out. A class without an anchor becomes a
            random one of ten there; here a prompt keeps its safe one. In two stages their psi starts as the
            distillation's for classes, as the teacher for text; ours as the former, if the run kept it, else as
            the teacher, and `warmup` updates of it alone come first
Reference   Chen et al., Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion
            Models, ICLR 2025. arXiv:2409.11219
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from .. import prompts
from ..concept import Targets
from ..edits import GeneratorEdit, generator_of
from ..errors import ConceptError, NeedsError
from ..kernel.descent import Descent
from ..kernel.identity import Distillation, Distilling
from ..kernel.model import Model
from ..kernel.state import State, Step
from ..kernel.student import Ema
from ..kernel.watch import Watch, spaced
from ..papers import Paper
from .base import File, Needs

ENOUGH = 2000  # updates, under which one stage may not have distilled: the papers' are 50,000


@dataclass(frozen=True, kw_only=True)
class SFD(Distilling):
    """Score forgetting distillation; the module's docstring has the losses."""

    forget: Annotated[float, Ge(0), Le(100), "lambda: weight of the forgotten prompts"] = 1.0
    preserve: Annotated[float, Ge(0), Le(10_000), "weight of what a generator drew of the rest; 0: the paper's"] = 0.0
    steps: Annotated[int, Ge(0), Le(10_000_000), "updates of fake score and generator each"] = 200
    lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate of the generator"] = 1e-4
    fake_lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate of the fake score"] = 3e-4
    warmup: Annotated[int, Ge(0), Le(1_000_000), "updates of the fake score alone, first, where none was kept"] = 50
    batch: Annotated[int, Ge(1), Le(4096), "retained and as many forgotten samples an update"] = 16
    decay: Annotated[float, Ge(0), Lt(1), "decay of the generator's average, the result; lower at first"] = 0.999
    prompts: Annotated[File, "file of prompts to retain, one a line; empty: the kept concepts'"] = ""
    probe: Annotated[int, Ge(0), Le(100_000), "updates between two looks at samples; 0 for none"] = 25

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = Paper(
        "chen2025score",
        "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models",
        "Chen, Tianqi and Zhang, Shujian and Zhou, Mingyuan",
        2025,
        "International Conference on Learning Representations",
        "2409.11219",
    )
    needs: ClassVar[Needs] = Needs(text=False, steps=False)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, GeneratorEdit]:
        """Train fake score and generator in turn; yields a Step an update of both, returns the generator."""
        retained, forgotten, safe = self.divided(targets)
        game = Distillation(model, state, self)
        fake = state.keep("fake descent", Descent(game.fake.weights, self.fake_lr, betas=(0.0, 0.999)))
        opt = state.keep("descent", Descent(game.generator.weights, self.lr, betas=(0.0, 0.999)))
        ema = state.keep("ema", Ema(game.generator, self.decay))
        seen = [model.encode(spaced(x)) for x in (retained, forgotten, safe)]
        sets = {"retained": (seen[0], None), "recalled": (seen[1], seen[2])}
        watch = state.keep("watch", Watch(game, state, lambda: ema.shadow, sets, self.probe))

        def made() -> GeneratorEdit:
            return generator_of(model, game.generator, ema.shadow, game.t)

        state.applied = lambda: made().on(model)
        game.alone = self.warmup if model.one_step and not game.known else 0
        n = game.alone + self.steps
        for i in state.steps(n, first=game.alone):
            r, f = (self.draw(len(x), state) for x in (retained, forgotten))
            c = model.encode([*(retained[j] for j in r), *(forgotten[j] for j in f)])
            figures: dict[str, float] = {"fake": sum(fake.step(**self.terms(game.fake_loss(c))).values())}
            if (k := i - game.alone) >= 0:
                wanted = model.encode([*(retained[j] for j in r), *(safe[j] for j in f)])
                terms = self.terms(game.generator_loss(c, wanted))
                if model.one_step and self.preserve:
                    terms["preserve"] = self.preserve * game.drift(c[: self.batch]).mean()
                figures = {**opt.step(**terms), **figures}
                ema.update(k)
                figures |= watch.look(k, self.steps)
            yield Step(i, n, figures)
        return made()

    def caution(self, model: Model) -> str:
        """Return what is worth a line before a run starts, if there is anything."""
        if model.one_step is not None or not 0 < self.steps < ENOUGH:
            return ""
        return (
            f"a one-step generator is distilled as well, in {self.steps} updates. 200 were enough for `emoji`, the "
            "paper takes 50,000. Look at pictures, or forget from a generator: docs/howto/distill.md."
        )

    def draw(self, n: int, state: State) -> list[int]:
        """Return `batch` of n prompts."""
        return torch.randint(n, (self.batch,), generator=state.generator).tolist()

    def terms(self, losses: Tensor) -> dict[str, Tensor]:
        """Return the loss terms of samples, the first half retained and the second forgotten."""
        retained, forgotten = torch.split(losses, self.batch)
        return {"retain": retained.mean(), "forget": self.forget * forgotten.mean()}

    def divided(self, targets: Sequence[Targets]) -> tuple[Sequence[str], list[str], list[str]]:
        """Return the retained prompts, the forgotten ones and, row for row, their safe ones.

        Raises:
            NeedsError: nothing is retained.
            ConceptError: what is forgotten is retained as well, or is what another concept shall become.
        """
        forgotten = [p for target in targets for p in target.prompts]
        anchors = [a for target in targets for a in target.anchors]
        if lost := set(anchors) & set(forgotten):
            raise ConceptError(f"{min(lost)!r} is to be forgotten and to be drawn instead. Give another anchor.")
        if not (retained := prompts.read(self.prompts) if self.prompts else [k for own in targets for k in own.keeps]):
            raise NeedsError("sfd distils what is retained, and nothing is. Give --keep, or --set prompts=FILE.")
        if both := set(retained) & set(forgotten):
            raise ConceptError(f"{min(both)!r} is to be forgotten and to be retained. Take it out of {self.prompts}.")
        # fixed for the run: a prompt that is steered to many at once would be drawn as their average
        return retained, forgotten, [a or retained[i * len(retained) // len(anchors)] for i, a in enumerate(anchors)]
