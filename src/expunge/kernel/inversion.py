"""Textual inversion: pictures become a word.

    v* = argmin_v E || eps - e(x_t, t, c(v)) ||^2                                       (arXiv:2208.01618, Eq. 2)

Only the vectors v of a placeholder move; the network and the text encoder are frozen. The error is taken in the
network's native output, which for an eps network is the paper's and for the others differs by a weight of each t.
Pictures may have weights, E_x r(x) || ... ||^2; they are then drawn as often as they weigh.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn

from .descent import Descent, mse
from .model import Model, Text
from .path import native
from .pool import times
from .state import Step


def start(text: Text, words: str, k: int) -> dict[str, Tensor]:
    """Return k vectors an encoder to start from, (k, d): the mean of some words' tokens, of the vocabulary for none."""
    return {name: vectors.float().mean(0).repeat(k, 1) for name, vectors in text.embedding(words).items()}


def error(
    model: Model,
    z: Tensor,
    prompts: Sequence[str],
    generator: torch.Generator,
    n: int,
    weights: Tensor | None = None,
) -> Tensor:
    """Return Eq. 2's error, estimated on n draws of picture, time, noise and prompt.

    Args:
        model: the frozen model; its prompts may hold placeholders.
        z: latents of the pictures, (m, ...).
        prompts: what describes them.
        generator: of every draw, on the CPU, so that devices agree.
        n: draws; each has its own time and noise.
        weights: of the pictures, (m,), on the CPU; equal ones without.
    """
    denoiser, path = model.denoiser, model.denoiser.path
    if weights is None:
        drawn = torch.randint(len(z), (n,), generator=generator)
    else:
        drawn = torch.multinomial(weights, n, replacement=True, generator=generator)
    x0 = z[drawn.to(z.device)]
    t = times(path, n, generator).to(z.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    c = model.encode([prompts[i] for i in torch.randint(len(prompts), (n,), generator=generator).tolist()])
    return mse(denoiser(path.noised(x0, eps, t), t, c), native(denoiser.kind, x0, eps, *path.levels(t, x0)))


def invert(
    model: Model,
    text: Text,
    z: Tensor,
    placeholder: str,
    prompts: Sequence[str],
    initial: dict[str, Tensor],
    generator: torch.Generator,
    *,
    steps: int = 150,
    batch: int = 8,
    lr: float = 0.1,
    weights: Tensor | None = None,
) -> Generator[Step, None, dict[str, Tensor]]:
    """Yield a Step an update; return the vectors of `placeholder` that best explain pictures, by text encoder.

    Args:
        model: the model; nothing of it changes.
        text: its soft tokens.
        z: latents of the pictures, (m, ...).
        placeholder: the new word.
        prompts: prompts that hold it.
        initial: vectors to start from, (k, d) an encoder.
        generator: of every draw.
        steps: optimiser updates.
        batch: draws an update.
        lr: Adam's learning rate, in standard deviations of the vocabulary's own vectors; falls to zero along a cosine.
        weights: of the pictures, (m,), on the CPU; equal ones without.
    """
    vectors = {name: nn.Parameter(v.to(z.device).float().clone()) for name, v in initial.items()}
    scale = min(float(v.float().std()) for v in text.embedding().values())
    opt = Descent(vectors, lr * scale)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(opt.adam, max(1, steps))
    with text.tokens({placeholder: vectors}):
        for i in range(steps):
            losses = opt.step(inversion=error(model, z, prompts, generator, batch, weights))
            falling.step()
            yield Step(i, steps, losses)
    return {name: v.detach().clone() for name, v in vectors.items()}
