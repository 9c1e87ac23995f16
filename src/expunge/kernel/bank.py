"""A bank of noisy latents: one batched rollout yields many (x_t, t) pairs, each latent with its own time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError
from .condition import Condition
from .denoiser import Denoiser
from .sampler import Predict, guided, trajectory
from .state import State


class Drawn(NamedTuple):
    """A batch from the bank: latents (b, ...), their times (b,), and which condition each was rolled out under (b,)."""

    x_t: Tensor
    t: Tensor
    k: Tensor


class Bank:
    """Latents on the sampling trajectories of a prompt distribution.

    The published loops roll out a fresh trajectory for every update and keep one latent of it, about 25 guided network
    calls for one sample. Here every latent of a rollout is used, `reuse` times, before the next rollout. Times are
    jittered within a sampling step, once a trajectory, so that all times are visited while each latent stays exactly at
    its own.

    Args:
        denoiser: gives path, parameterisation and latent shape.
        predict: native prediction that samples; the student (on-policy), an average, or the teacher (frozen).
        c: the prompts' conditions (k), concept after concept; each trajectory draws one.
        sizes: prompts of each concept, which sum to k: concepts take turns, however many prompts they have.
        null: the unconditional condition (1).
        state: of the fit; supplies randomness.
        batch: latents a draw.
        rollouts: trajectories a refresh.
        steps: sampling steps a trajectory.
        guidance: guidance scale while sampling; 1 is none.
        reuse: how often each latent is drawn before a refresh.
        beta: parameters (a, b) of the Beta distribution of where on their trajectories latents are drawn, from 0 at
            pure noise to 1 at the picture; None draws each `reuse` times, else that is the mean.

    Raises:
        SettingError: a batch of more latents than the bank gives between two refreshes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        predict: Predict,
        c: Condition,
        null: Condition,
        state: State,
        *,
        sizes: Sequence[int] = (),
        batch: int,
        rollouts: int,
        steps: int,
        guidance: float,
        reuse: int,
        beta: tuple[float, float] | None = None,
    ) -> None:
        if batch > (held := rollouts * steps * reuse):
            raise SettingError(
                f"batch={batch} is more than the bank gives before a refresh: rollouts={rollouts} x "
                f"sampling_steps={steps} x reuse={reuse} = {held} latents. Lower batch or raise rollouts."
            )
        self.denoiser, self.predict, self.c, self.null = denoiser, predict, c, null
        self.generator = state.generator
        self.batch, self.rollouts, self.sampling, self.guidance, self.reuse = batch, rollouts, steps, guidance, reuse
        self.beta = beta
        self.sizes = torch.tensor(sizes or [len(c)])
        self.data: dict[str, Tensor] = {}
        self.order = self.turns = torch.empty(0, dtype=torch.long)

    def draw(self) -> Drawn:
        """Return the next batch, rolling out again when what is left of the last rollout would not fill it."""
        return self.held(self.next())

    def next(self) -> Tensor:
        """Return the places of the next batch, (b,), after a rollout where one is due."""
        if len(self.order) < self.batch:
            self.refresh()
        index, self.order = self.order[: self.batch], self.order[self.batch :]
        return index.to(self.data["x"].device)

    def held(self, index: Tensor) -> Drawn:
        """Return what lies in some places (b,)."""
        return Drawn(*(self.data[name][index] for name in ("x", "t", "k")))

    @torch.no_grad()
    def refresh(self) -> None:
        """Roll out afresh."""
        device, n = self.c.tokens.device, self.rollouts
        k = self.prompts(n)
        x = torch.randn(n, *self.denoiser.shape, generator=self.generator).to(device, self.c.tokens.dtype)
        jitter = torch.rand(n, generator=self.generator)
        times = self.jittered(jitter).to(device)
        e = guided(self.predict, self.c[k.to(device)], self.null, self.guidance)
        pairs = list(trajectory(self.denoiser, e, x, times))[:-1]
        self.data = {
            "x": torch.cat([x_t for x_t, _ in pairs]),
            "t": torch.cat([t for _, t in pairs]),
            "k": k.to(device).repeat(len(pairs)),
        }
        self.order = self.drawing_order()

    def prompts(self, n: int) -> Tensor:
        """Return a prompt for each of n trajectories: of every concept once, in shuffled passes, before any again."""
        while len(self.turns) < n:
            self.turns = torch.cat([self.turns, torch.randperm(len(self.sizes), generator=self.generator)])
        concept, self.turns = self.turns[:n], self.turns[n:]
        within = (torch.rand(n, generator=self.generator) * self.sizes[concept]).long()
        return (self.sizes.cumsum(0) - self.sizes)[concept] + within

    def drawing_order(self) -> Tensor:
        """Return the indices of the latents to draw until the next refresh, (reuse * rollouts * steps,)."""
        if self.beta is None:
            m = len(self.data["t"])
            return torch.cat([torch.randperm(m, generator=self.generator) for _ in range(self.reuse)])
        share = ((torch.arange(self.sampling) + 0.5) / self.sampling).repeat_interleave(self.rollouts)
        a, b = self.beta
        density = share ** (a - 1) * (1 - share) ** (b - 1)
        return torch.multinomial(density, self.reuse * len(share), replacement=True, generator=self.generator)

    def jittered(self, u: Tensor) -> Tensor:
        """Return one schedule a trajectory, (steps, b).

        Each time is lowered by the share u (b,) of the way to the next. The first stays where it is: a rollout
        begins at the sampler's own first time, which is where pure noise belongs.
        """
        grid = self.denoiser.path.grid(self.sampling)
        following = torch.cat([grid[1:], grid.new_zeros(1)])
        times = grid[:, None] - (grid - following)[:, None] * u.to(grid.device) * 0.999
        times[0] = grid[0]
        return times if grid.is_floating_point() else times.floor().long()

    def state_dict(self) -> dict[str, Any]:
        """Return latents and drawing order."""
        return {**self.data, "order": self.order, "turns": self.turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved bank."""
        self.data = {k: v.to(self.c.tokens.device) for k, v in state.items() if k not in ("order", "turns")}
        self.order, self.turns = state["order"], state["turns"]


class Aimed(Bank):
    """A bank whose latents have targets that cost more than they do: found once, however often a latent is drawn.

    Args:
        aim: latents (b, ...), times (b,) and conditions (b) -> targets, shape of the latents.
        args, kwargs: see `Bank`.
    """

    def __init__(self, *args: Any, aim: Callable[[Tensor, Tensor, Condition], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aim = aim

    def aimed(self) -> tuple[Drawn, Tensor]:
        """Return the next batch, and its targets."""
        index = self.next()
        new = index[~self.data["known"][index]].unique()  # type: ignore[no-untyped-call]
        if len(new):
            x_t, t, k = self.held(new)
            self.data["target"][new] = self.aim(x_t, t, self.c[k])
            self.data["known"][new] = True
        return self.held(index), self.data["target"][index]

    def refresh(self) -> None:
        """Roll out afresh."""
        super().refresh()
        x = self.data["x"]
        self.data |= {"target": torch.zeros_like(x), "known": torch.zeros(len(x), dtype=torch.bool, device=x.device)}
