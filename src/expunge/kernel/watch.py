"""What a generator's losses do not say: how near its samples are to the teacher's, and whether they still vary.

The generator's loss swings around zero whatever it draws. Here samples from noise that never changes are compared with
the teacher's own, and the teacher judges them: of two prompts, under which one does it denoise a sample better?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import Diverged
from .condition import Condition
from .denoiser import Denoiser
from .identity import Distillation
from .path import native
from .sampler import generate
from .state import State

SAMPLES = 32  # of each set, one a prompt
PROMPTS, NOISES = 10, 4  # of the first set, to see whether a prompt's samples vary: so many prompts, samples of each
STEPS = 16  # of the teacher's own samples
LEVELS = (0.5, 1.0, 2.0)  # sigma / alpha at which the teacher judges
# a collapse: the spread of the samples, against the smaller and the larger of start and teacher, over all and within
# prompts, which the distances between prompts would hide; or the energy distance
COLLAPSED, EXPLODED = 0.05, 20.0
ASTRAY = 0.9


class Watch:
    """Figures of a generator; registered in a fit's state, it lets no collapsed generator replace the last good one.

    Args:
        game: the distillation.
        state: of the fit; tells which update it is.
        weights: the generator's present weights; `game.generator.original` are those it began with.
        sets: name of a set -> (its conditions (n), and what each is told apart from, or None for one another); samples
            of the first set are compared with the teacher's.
        every: updates between two looks; 0 for none.
    """

    def __init__(
        self,
        game: Distillation,
        state: State,
        weights: Callable[[], Mapping[str, Tensor]],
        sets: Mapping[str, tuple[Condition, Condition | None]],
        every: int,
    ) -> None:
        self.game, self.state, self.weights, self.every = game, state, weights, every
        if not every:
            return
        self.sets = {name: (c, other or rolled(c)) for name, (c, other) in sets.items()}
        # noise of its own, the same in every run: figures of two runs compare, and a resumed fit sees what it saw
        self.random = torch.Generator().manual_seed(0)
        self.z = {name: self.normal(len(c)) for name, (c, _) in self.sets.items()}
        self.main = next(iter(self.sets))
        c = self.sets[self.main][0]
        self.within = repeated(c)
        self.z_within = self.normal(len(self.within))
        self.truth = self.teacher(c, self.z[self.main])
        first = self.samples(self.main, game.generator.original)
        spreads = spread(self.truth), spread(first)
        self.least, self.most = COLLAPSED * min(spreads), EXPLODED * max(spreads)
        # half of what the first samples have in common with the teacher's, should that be little
        self.far = max(ASTRAY, (1 + energy_distance(first, self.truth)) / 2)
        self.usual = spread_within(self.teacher(self.within, self.z_within))
        self.narrow = COLLAPSED * min(self.usual, self.breadth(game.generator.original))

    def look(self, i: int, n: int) -> dict[str, float]:
        """Return the figures after update i of n, nothing when no look is due.

        `distance` is the energy distance between the samples of the first set and the teacher's, 0 for one distribution
        and 1 for two points; `variety` how far one prompt's samples differ from one another, over the same of the
        teacher's; under the name of each set, the share of its samples that the teacher takes for their own condition.

        Raises:
            Diverged: the generator has collapsed.
        """
        if not self.every or ((i + 1) % self.every and i + 1 != n):
            return {}
        found = {name: self.samples(name, self.weights()) for name in self.sets}
        distance, within = self.checked(found[self.main])
        with self.game.arithmetic():
            told = {name: recognised(self.game.phi, x, *self.sets[name], self.eps(x)) for name, x in found.items()}
        return {"distance": distance, "variety": within / self.usual, **told}

    def checked(self, x: Tensor) -> tuple[float, float]:
        """Return the distance of samples of the first set from the teacher's, and the spread within a prompt.

        Raises:
            Diverged: they hardly vary, all or those of one prompt, or beyond all bounds, or have next to nothing in
                common with the teacher's.
        """
        now, distance, within = spread(x), energy_distance(x, self.truth), self.breadth(self.weights())
        if self.least <= now <= self.most and distance <= self.far and within >= self.narrow:
            return distance, within
        raise Diverged(
            f"the generator has collapsed: its samples differ from one another by {now:.3g} ({self.least:.3g} to "
            f"{self.most:.3g} are sound), those of one prompt by {within:.3g} (from {self.narrow:.3g}), and from the "
            f"teacher's by {distance:.3g} of 1 (up to {self.far:.3g}),",
            self.state.index,
        )

    def samples(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the generator's samples of a set with some weights."""
        return self.drawn(self.sets[name][0], self.z[name], weights)

    def breadth(self, weights: Mapping[str, Tensor]) -> float:
        """Return the spread of the generator's samples within a prompt, with some weights."""
        return spread_within(self.drawn(self.within, self.z_within, weights))

    def drawn(self, c: Condition, z: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what the generator makes of noise z (n, ...) under conditions (n), with some weights."""
        theta = self.game.theta
        with self.game.arithmetic():
            return self.game.drawn(lambda x, t, c: theta.under(weights, x, t, c), c, z)

    def teacher(self, c: Condition, z: Tensor) -> Tensor:
        """Return what the teacher makes of noise z (n, ...) under conditions (n)."""
        game = self.game
        with game.arithmetic():
            return generate(game.phi, c, c if game.null is None else game.null, z, steps=STEPS, guidance=game.guidance)

    def normal(self, n: int) -> Tensor:
        """Return n latents of noise."""
        return torch.randn(n, *self.game.theta.shape, generator=self.random).to(self.game.device)

    def eps(self, x: Tensor) -> Tensor:
        """Return the noise, shape of x, that samples are judged under."""
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, if the generator is fit to be kept.

        Raises:
            Diverged: it is not.
        """
        if self.every:
            self.checked(self.samples(self.main, self.weights()))
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; there is nothing to remember."""


def spaced(prompts: Sequence[str]) -> list[str]:
    """Return SAMPLES prompts, evenly spaced over those given; some are repeated, if there are fewer."""
    return [prompts[i * len(prompts) // SAMPLES] for i in range(SAMPLES)]


def rolled(c: Condition) -> Condition:
    """Return the conditions half a turn on: what stands next to one another often means the same thing."""
    n = len(c)
    return c[(torch.arange(n, device=c.tokens.device) + n // 2) % n]


def repeated(c: Condition) -> Condition:
    """Return PROMPTS of the conditions, evenly spaced, NOISES times each, one after the other."""
    rows = torch.arange(PROMPTS, device=c.tokens.device) * len(c) // PROMPTS
    return c[rows.repeat_interleave(NOISES)]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances (n, n) of two sets of n samples, without those of one row of both (one prompt)."""
    apart = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    return torch.cdist(a.flatten(1), b.flatten(1))[apart]


def spread(x: Tensor) -> float:
    """Return the mean distance between two samples, a coordinate."""
    return float(distances(x, x).mean()) / math.sqrt(x[0].numel())


def spread_within(x: Tensor) -> float:
    """Return the mean `spread` of the samples of one prompt, NOISES after NOISES in x (n, ...)."""
    groups = torch.split(x, NOISES)
    return sum(map(spread, groups)) / len(groups)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return 1 - (E|a - a'| + E|b - b'|) / 2 E|a - b|: the energy distance of two sets, as a share of its maximum."""
    between = distances(a, b).mean()
    within = (distances(a, a).mean() + distances(b, b).mean()) / 2
    return (1 - within / between).item()


@torch.no_grad()
def recognised(phi: Denoiser, x: Tensor, c: Condition, other: Condition, eps: Tensor) -> float:
    """Return the share of samples x (b, ...) that phi denoises better under `c` than under `other`; a tie is half."""
    wrong = []
    for told in (c, other):
        error = torch.zeros(len(x), device=x.device)
        for ratio in LEVELS:
            t = torch.full((len(x),), phi.path.time(ratio), device=x.device)
            truth = native(phi.kind, x, eps, *phi.path.levels(t, x))
            error += (phi(phi.path.noised(x, eps, t), t, told) - truth).square().flatten(1).mean(1)
        wrong.append(error)
    return ((wrong[0] < wrong[1]).float() + (wrong[0] == wrong[1]).float() / 2).mean().item()
