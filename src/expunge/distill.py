"""Distil a model into a one-step generator by score identity (SiD), with long and short guidance for text (LSG).

    L(psi) = l_psi(c)        L(theta) = l_theta(c; phi told c)        in turn; the losses are in `kernel/identity.py`

It is an erasure of nothing, and goes through the same door: checkpoints, resume bit for bit, the guard against NaN, the
record. A collapse is noticed on samples (`kernel/watch.py`), and the checkpoint stays that of the last good generator.

Notation    phi: teacher · psi: fake score · theta: generator · c: a prompt
Reference   Zhou et al., Score identity Distillation, ICML 2024. arXiv:2404.04057
            Zhou et al., Guided Score identity Distillation, ICLR 2025. arXiv:2406.01561
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Le, Lt

from . import checkpoint, prompts
from .concept import Targets
from .door import erase
from .edits import GeneratorEdit, generator_of
from .errors import NeedsError
from .kernel.descent import Descent
from .kernel.identity import Distillation, Distilling
from .kernel.model import Model
from .kernel.state import State, Step
from .kernel.student import Ema
from .kernel.watch import Watch, spaced
from .methods.base import File, Needs
from .papers import Paper
from .records import CHECKPOINT


@dataclass(frozen=True, kw_only=True)
class SiD(Distilling):
    """Score identity distillation; the module's docstring has the losses."""

    steps: Annotated[int, Ge(0), Le(10_000_000), "updates of fake score and generator each"] = 5000
    lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate of the generator"] = 5e-5
    fake_lr: Annotated[float, Gt(0), Le(1), "Adam's learning rate of the fake score"] = 1.5e-4
    batch: Annotated[int, Ge(1), Le(8192), "samples an update"] = 32
    decay: Annotated[float, Ge(0), Lt(1), "decay of the generator's average, the result; lower at first"] = 0.999
    prompts: Annotated[File, "file of prompts, one a line; empty: all that the model's world knows"] = ""
    probe: Annotated[int, Ge(0), Le(100_000), "updates between two looks at samples; 0 for none"] = 100

    family: ClassVar[str] = "distillation"
    paper: ClassVar[Paper] = Paper(
        "zhou2024score",
        "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step "
        "Generation",
        "Zhou, Mingyuan and Zheng, Huangjie and Wang, Zhendong and Yin, Mingzhang and Huang, Hai",
        2024,
        "International Conference on Machine Learning",
        "2404.04057",
    )
    needs: ClassVar[Needs] = Needs(text=False, concept=False)

    def fit(self, model: Model, targets: Sequence[Targets], state: State) -> Generator[Step, None, GeneratorEdit]:
        """Train fake score and generator in turn; yields a Step an update of both, returns the generator."""
        del targets  # nothing is forgotten
        told = self.told(model)
        game = Distillation(model, state, self)
        fake = state.keep("fake descent", Descent(game.fake.weights, self.fake_lr, betas=(0.0, 0.999)))
        opt = state.keep("descent", Descent(game.generator.weights, self.lr, betas=(0.0, 0.999)))
        ema = state.keep("ema", Ema(game.generator, self.decay))
        sets = {"recognised": (model.encode(spaced(told)), None)}
        watch = state.keep("watch", Watch(game, state, lambda: ema.shadow, sets, self.probe))

        def made() -> GeneratorEdit:
            return generator_of(model, game.generator, ema.shadow, game.t)

        state.applied = lambda: made().on(model)
        for i in state.steps(self.steps):
            rows = torch.randint(len(told), (self.batch,), generator=state.generator).tolist()
            c = model.encode([told[j] for j in rows])
            learned = fake.step(fake=game.fake_loss(c).mean())
            losses = opt.step(identity=game.generator_loss(c, c).mean())
            ema.update(i)
            yield Step(i, self.steps, {**losses, **learned, **watch.look(i, self.steps)})
        return made()

    def told(self, model: Model) -> tuple[str, ...]:
        """Return the prompts to distil on.

        Raises:
            NeedsError: no file is given, and the model's world is not known.
            SettingError: the file cannot be read.
        """
        if self.prompts:
            return prompts.read(self.prompts)
        if model.world is None:
            raise NeedsError(
                f"what {model.name!r} can draw is not known. Give prompts to distil it on, a file with one a line: "
                "--set prompts=FILE."
            )
        return prompts.known(model.world)

    def passes(self, guidance: float) -> int:
        """Return what an update costs in forward passes of a batch; a backward pass through to the input counts as one.

        Args:
            guidance: the scale in use; without any, the three guided networks run once instead of twice.
        """
        twice = 1 if guidance == 1.0 else 2
        # the fake score learns (3) from what the generator draws (1); the generator (3) through teacher and fake score
        return 1 + 3 * twice + 3 + 2 * 2 * twice


@torch.no_grad()
def estimate(model: Model, method: SiD, done: int = 0) -> float:
    """Return about how many seconds a distillation takes here from `done` updates on, by one timed forward pass."""
    c = model.encode(list(method.told(model)[:1])).batch(method.batch)
    t = torch.full((method.batch,), model.denoiser.path.time(method.noise), device=model.device)
    x = torch.zeros(method.batch, *model.denoiser.shape, device=model.device)
    for _ in range(2):  # the first pass also warms up
        began = time.monotonic()
        model.denoiser(x.to(c.tokens.dtype), t, c).sum().item()
    left = max(0, method.steps - done)
    return (time.monotonic() - began) * method.passes(method.guidance or model.sampling.guidance) * left


def done(out: Path) -> int:
    """Return after how many updates the run in a folder would go on; 0 where there is none.

    Raises:
        BadRun: its checkpoint is broken.
    """
    if not (out / CHECKPOINT).is_file():
        return 0
    with checkpoint.reading(out / CHECKPOINT) as part:
        return int(part("done"))


def distill(
    model: Model,
    method: SiD | None = None,
    *,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    save_every: float = 120.0,
    progress: Callable[[Step], None] | None = None,
    keep_state: bool = True,
) -> GeneratorEdit:
    """Distil a model into a one-step generator; the model itself is left untouched, bit for bit.

    Args:
        model: what `expunge.load` returned; one that is sampled in steps.
        method: the settings.
        seed: two runs with the same seed give the same generator.
        out: folder of the run: checkpoints while it lasts, then the generator and its card. `expunge.load(out)` is then
            the generator as a model.
        resume: go on with the run in `out`, interrupted or finished, to as many steps as before or more; the generator
            is bit-identical to that of a run that was undisturbed and had so many from the start.
        save_every: seconds between checkpoints.
        progress: called after each update.
        keep_state: leave the last checkpoint in `out`, seven times the size of what is trained in float32: a finished
            run goes on from it, and SFD starts from its fake score.

    Raises:
        NeedsError: the model is a generator already, or nobody says what to distil it on.
        SettingError: a setting or the seed is out of range.
        BadRun: `out` is in the way, or holds another run than the one to resume.
        Diverged: a loss or a weight became NaN or infinite, or the generator collapsed.
        StorageError: the disk is full; nothing half written is left.
    """
    method = method or SiD()
    method.told(model)  # a file that is not there is told before the run's folder is made
    options: dict[str, Any] = {"resume": resume, "save_every": save_every, "progress": progress}
    edit = erase(model, (), method, seed=seed, out=out, keep_state=keep_state, **options)
    return cast(GeneratorEdit, edit)
