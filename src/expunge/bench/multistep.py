"""An experiment: score forgetting that leaves the model one that is sampled in steps.

SFD (`methods/sfd.py`) with another generator: the student is sampled in a few steps, without gradient, up to a random
one of them, and its clean prediction there, with gradient, is the sample. Fake score, teacher and losses are SFD's. The
result is an edit of weights like any other method's, for whoever cannot have a one-step generator.

No paper has this, and no setting was tuned. The table's columns are those of `bench methods`. A target that has scores
is not run again, and an interrupted erasure goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from ..auditing import audit
from ..concept import Concept, Targets
from ..door import erase
from ..edits import Edit, generator_of
from ..kernel.condition import Condition
from ..kernel.descent import Descent
from ..kernel.identity import Distillation, Distilling, identity
from ..kernel.model import Model
from ..kernel.path import native
from ..kernel.sampler import clean, trajectory
from ..kernel.state import State, Step
from ..kernel.student import Ema
from ..methods.base import Needs
from ..methods.sfd import SFD
from ..papers import Paper
from ..zoo.emoji.world import STYLES
from .cells import scores_of
from .methods import folder_of, rows, table

NAME = "multistep"


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """SFD on rollouts; what is no setting here has SFD's default."""

    group: Annotated[str, "weights to train, of student and fake score"] = "all"
    sampling_steps: Annotated[int, Ge(1), Le(1000), "steps of a rollout"] = 4
    steps: Annotated[int, Ge(0), Le(1_000_000), "updates of fake score and student each"] = 100
    lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate of the student"] = 3e-5
    fake_lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate of the fake score"] = 1e-4
    batch: Annotated[int, Ge(1), Le(4096), "retained and as many forgotten samples an update"] = 8
    decay: Annotated[float, Ge(0), Lt(1), "decay of the student's moving average, which is the result"] = 0.95

    family: ClassVar[str] = "score distillation"
    paper: ClassVar[Paper] = SFD.paper
    needs: ClassVar[Needs] = Needs(text=False, keeps=True)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, Edit]:
        """Train fake score and student in turn; yields a Step an update of both, returns the edit."""
        sfd = SFD(batch=self.batch)
        retained, forgotten, safe = sfd.divided(targets)
        game = Distillation(model, state, Distilling(group=self.group))
        fake = state.keep("fake descent", Descent(game.fake.weights, self.fake_lr, betas=(0.0, 0.999)))
        opt = state.keep("descent", Descent(game.generator.weights, self.lr, betas=(0.0, 0.999)))
        ema = state.keep("ema", Ema(game.generator, self.decay))
        for i in state.steps(self.steps):
            r, f = (sfd.draw(len(x), state) for x in (retained, forgotten))
            c = model.encode([*(retained[j] for j in r), *(forgotten[j] for j in f)])
            wanted = model.encode([*(retained[j] for j in r), *(safe[j] for j in f)])
            learned = fake.step(**sfd.terms(self.fake_loss(game, c)))
            losses = opt.step(**sfd.terms(self.student_loss(game, c, wanted)))
            ema.update()
            yield Step(i, self.steps, {**losses, "fake": sum(learned.values())})
        return generator_of(model, game.generator, ema.shadow, game.t).weights

    def sample(self, game: Distillation, c: Condition) -> Tensor:
        """Return the student's clean predictions, one a condition, each at a random time of a rollout of its own."""
        e, times = game.told(game.theta, c), game.path.grid(self.sampling_steps).to(game.device)
        stop = torch.randint(len(times), (len(c),), generator=game.random).to(game.device)
        x = z = game.normal(len(c))
        with torch.no_grad():
            # the range first: it ends before the network is called at the last time
            for k, (x_t, _) in zip(range(len(times)), trajectory(game.theta, e, z, times), strict=False):
                x = torch.where((stop == k).view(-1, *(1,) * (z.ndim - 1)), x_t, x)
        return clean(game.theta, e, x, times[stop])

    def fake_loss(self, game: Distillation, c: Condition) -> Tensor:
        """Return the fake score's loss on fresh samples, (b,)."""
        with torch.no_grad():
            x = self.sample(game, c)
        x_t, t, eps = game.noised(x)
        truth = native(game.psi.kind, x, eps, *game.path.levels(t, x))
        return (game.told(game.psi, game.dropped(c))(x_t, t) - truth).square().flatten(1).mean(1)

    def student_loss(self, game: Distillation, c: Condition, wanted: Condition) -> Tensor:
        """Return the student's loss on fresh samples, (b,); the teacher is told what is wanted."""
        with game.fake.frozen():
            x = self.sample(game, c)
            x_t, t, _ = game.noised(x)
            p = clean(game.phi, game.told(game.phi, wanted), x_t, t)
            s = clean(game.psi, game.told(game.psi, c), x_t, t)
        return identity(x, p, s, game.alpha)


def run(
    model: Model, targets: Sequence[str], work: Path, method: MultiStep, progress: Callable[[str, int, int], None]
) -> str:
    """Erase and audit targets, or go on with that; return the table of all as Markdown."""
    for i, target in enumerate(targets):
        progress(f"targets: {target}", i, len(targets))
        folder, concept = folder_of(work, NAME, target), Concept(target, kind="style" if target in STYLES else "object")
        erase(model, concept, method, seed=0, out=folder, resume=True)
        if not scores_of(folder):
            audit(folder, model=model)
    progress("targets", len(targets), len(targets))
    return table(rows([NAME], targets, work))
