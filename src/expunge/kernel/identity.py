"""Score-identity distillation: a one-step generator, and the fake score that follows it.

    x        = clean prediction of theta at (sigma* z, t*), z ~ N(0, 1)          the generator: one network call
    L(psi)   = || psi(x_t, t, c) - out(x, eps) ||^2, x held fixed                the fake score learns theta's samples
    L(theta) = (P - S) . [(P - x) - alpha (P - S)] / w,  w = sg mean |P - x|     gradient through theta, phi and psi

P and S are the clean predictions of the teacher phi and of psi at x_t = alpha_t x + sigma_t eps. With psi optimal, the
expectation of (P - S) . (S - x) is zero, so alpha = 0 is the squared distance of the two scores; the larger alphas
that are used stand in for the gradient that runs through psi's own training. With guidance k, phi and psi are
`e_0 + k (e_c - e_0)` everywhere, also where psi learns (long and short guidance). Then theta needs none.

Clean predictions are the same function in every parameterisation, and so is the loss of theta. Noise levels
sigma / alpha are settings instead of times: 2.5 for t* and 0.138 to 13 for t are the times 625, 20 and 979 that are
published for Stable Diffusion, and the 440, 38 and 711 for DDPM.

All arithmetic is float32, as published: P - S is a small difference of large numbers, and bf16 keeps 8 bits of each.

Zhou et al., Score identity Distillation, ICML 2024. arXiv:2404.04057
Zhou et al., Guided Score identity Distillation (long and short guidance), ICLR 2025. arXiv:2406.01561
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from ..errors import Unsupported
from .condition import Condition
from .model import Model, component_of
from .path import native
from .sampler import Predict, clean, guided, one_step
from .state import State
from .student import Student

SMALLEST = 1e-5  # of the weight w, as published


def identity(x: Tensor, p: Tensor, s: Tensor, alpha: float) -> Tensor:
    """Return the generator's loss of each sample, (b,).

    Args:
        x: samples of the generator, (b, ...).
        p: clean predictions of the teacher at noised samples, shape of x.
        s: those of the fake score.
        alpha: correction for the fake score's dependence on the generator.
    """
    w = (p - x).detach().abs().flatten(1).mean(1).clamp(min=SMALLEST)
    return ((p - s) * ((p - x) - alpha * (p - s))).flatten(1).mean(1) / w


def full(e: Predict) -> Predict:
    """Return a network's prediction in float32: bf16 is for its inside, not for differences of predictions."""
    return lambda x_t, t, c: e(x_t, t, c).float()


def bf16_on(device: torch.device) -> bool:
    """Tell whether a device computes in bf16 by itself."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """The settings that every distillation has; a method adds its own."""

    group: Annotated[str, "weights to train, of generator and fake score"] = "all"
    rank: Annotated[int, Ge(0), Le(256), "0 trains the weights themselves, else low-rank updates (LoRA)"] = 0
    guidance: Annotated[float, Ge(0), Le(30), "guidance scale, in training too; 0 for the model's own, 1 for none"] = (
        0.0
    )
    alpha: Annotated[float, Ge(0), Le(2), "correction for the fake score's dependence on the generator"] = 1.0
    noise: Annotated[float, Gt(0), Le(100), "sigma / alpha that the generator starts from"] = 2.5
    least: Annotated[float, Gt(0), Le(100), "lowest sigma / alpha at which scores are compared"] = 0.138
    most: Annotated[float, Gt(0), Le(100), "highest sigma / alpha at which scores are compared"] = 13.0
    dropout: Annotated[
        float, Ge(0), Lt(1), "share of prompts that the fake score learns as empty; with guidance only"
    ] = 0.1
    precision: Annotated[
        Literal["fp32", "bf16"], "arithmetic inside the networks; bf16, on CUDA alone, is faster and coarser"
    ] = "fp32"

    # nothing in a distillation depends on how many updates there are: more of them are the same run, gone on with
    continues: ClassVar[bool] = True


class Distillation:
    """Teacher, fake score and one-step generator.

    Args:
        model: a model that is sampled in steps, or a generator that was distilled from one and goes on as it is, at its
            own noise level.
        state: of the fit; gets both trained networks, supplies randomness.
        settings: what is trained, and how scores are compared.

    Attributes:
        phi, psi, theta: the denoisers of teacher, fake score and generator.
        fake, generator: what is trained of psi and theta.
        t: time of the generator's only call.
        guidance: scale k in use; 1 for none.
        known: whether psi starts as the fake score that watched the generator's distillation, not as the teacher.
        alone: updates of the fake score alone, before the first of the generator.

    Raises:
        BadRun: that fake score was kept and cannot be read.
        EmptySelection: the model has no such group, or one that holds nothing.
        Unsupported: bf16 where it cannot be had.
    """

    def __init__(self, model: Model, state: State, settings: Distilling) -> None:
        self.phi, self.path, self.device = model.teacher, model.denoiser.path, model.device
        self.bf16 = settings.precision == "bf16"
        if self.bf16 and not bf16_on(self.device):
            raise Unsupported(
                f"precision=bf16 is for CUDA devices that compute in it, and the model is on {self.device}. Leave it "
                "at fp32."
            )
        self.t = self.path.time(settings.noise) if model.one_step is None else model.one_step.t
        self.first, self.last = self.path.time(settings.least), self.path.time(settings.most)
        self.guidance = settings.guidance or model.sampling.guidance
        self.alpha, self.dropout, self.random = settings.alpha, settings.dropout, state.generator
        group, rank = settings.group, settings.rank
        own = [] if rank else model.denoiser.names(group)
        fake = model.one_step.fake if model.one_step else None
        self.known, self.alone, self.component = fake is not None, 0, component_of(model, model.denoiser.module)
        start = fake() if fake else {}
        self.theta, self.psi = model.denoiser.clone(own), self.phi.clone({*own, *start})
        for clone in (self.theta, self.psi):
            for name in own:
                weight = clone.module.get_parameter(name)
                weight.data = weight.data.float()
        for name, value in start.items():
            weight = self.psi.module.get_parameter(name)
            weight.data = value.to(weight)
        state.keep("game", self)
        self.generator: Student = state.keep("theta", self.theta.unlock(group, rank, state.generator))
        self.fake: Student = state.keep("psi", self.psi.unlock(group, rank, state.generator))
        # a model that was trained without label dropout has no empty prompt, and needs none without guidance
        self.null = None if self.guidance == 1.0 else model.encode("")

    def state_dict(self) -> dict[str, Any]:
        """Return what makes a generator of the averaged weights in a checkpoint: see `expunge.snapshot`."""
        return {"t": self.t, "component": self.component, "alone": self.alone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; all of it follows from the model and the settings."""

    def arithmetic(self) -> torch.autocast:
        """Return the context that networks run in; trained weights stay float32, or small updates would be lost."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def fake_loss(self, c: Condition) -> Tensor:
        """Return the fake score's loss on fresh samples of conditions (b), one each, (b,)."""
        with self.arithmetic():
            with torch.no_grad():
                x = self.sample(c)
            x_t, t, eps = self.noised(x)
            truth = native(self.psi.kind, x, eps, *self.path.levels(t, x))
            out = self.told(self.psi, self.dropped(c))(x_t, t)
        return (out - truth).square().flatten(1).mean(1)

    def generator_loss(self, c: Condition, wanted: Condition) -> Tensor:
        """Return the generator's loss on fresh samples, one a condition, (b,).

        Args:
            c: what the generator and the fake score are told, (b).
            wanted: what the teacher is told, (b); `c` itself to distil it, something else to forget it.
        """
        with self.arithmetic(), self.fake.frozen():
            x = self.sample(c)
            x_t, t, _ = self.noised(x)
            p = clean(self.phi, self.told(self.phi, wanted), x_t, t)
            s = clean(self.psi, self.told(self.psi, c), x_t, t)
        return identity(x, p, s, self.alpha)

    def drift(self, c: Condition) -> Tensor:
        """Return how far the generator's fresh samples of conditions (b) are from what it drew at first, (b,)."""
        with self.arithmetic():
            z = self.normal(len(c))
            with torch.no_grad():
                x = self.drawn(lambda x_t, t, c: self.theta.under(self.generator.original, x_t, t, c), c, z)
            return (self.drawn(self.theta, c, z) - x).square().flatten(1).mean(1)

    def sample(self, c: Condition) -> Tensor:
        """Return one sample a condition, with gradient where the generator has one."""
        return self.drawn(self.theta, c, self.normal(len(c)))

    def drawn(self, e: Predict, c: Condition, z: Tensor) -> Tensor:
        """Return what a network, used as the generator, makes of noise z (b, ...)."""
        return one_step(self.theta, guided(full(e), c, c, 1.0), z, self.t)

    def told(self, e: Predict, c: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a network's guided native prediction as a function of (x_t, t)."""
        return guided(full(e), c, c if self.null is None else self.null, self.guidance)

    def noised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x_t, t, eps) of clean samples."""
        t = torch.randint(self.first, self.last + 1, (len(x),), generator=self.random).to(self.device)
        eps = self.normal(len(x))
        return self.path.noised(x, eps, t), t, eps

    def normal(self, n: int) -> Tensor:
        """Return n latents of standard normal noise."""
        return torch.randn(n, *self.theta.shape, generator=self.random).to(self.device)

    def dropped(self, c: Condition) -> Condition:
        """Return conditions of which some are replaced by the empty one."""
        if self.null is None:
            return c
        rows = torch.arange(len(c)).masked_fill(torch.rand(len(c), generator=self.random) < self.dropout, len(c))
        return Condition.cat([c, self.null])[rows.to(self.device)]
