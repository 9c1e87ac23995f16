"""An exact world: every prompt is a Gaussian whose score is known, for every parameterisation.

A prompt's words add up to the mean colour of a 4x4 picture, `mu(c) = W sum_words + b`, and its pictures are
`N(mu(c), SPREAD^2)`. The best prediction is then a formula, linear in W, so what a method must converge to is known
exactly and reached in milliseconds. Ships to users: the quickest place to try an idea.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..kernel.condition import Condition
from ..kernel.denoiser import Denoiser
from ..kernel.model import Model, Sampling
from ..kernel.path import Kind, Path, native
from ..kernel.sampler import generate, guided, one_step

WORDS = ("red", "green", "blue", "bright", "dark", "bomb", "dagger", "cat", "dog", "house", "picture", "photo")
WINDOW = 8  # words read; more are cut off
SPREAD = 0.05  # standard deviation of a prompt's pictures, in latent units


class Gaussian(nn.Module):
    """The exact denoiser of `N(mu(c), SPREAD^2)`.

    Attributes:
        to_mean: reads the prompt encoding; its weight is what methods train.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        super().__init__()
        self.path, self.kind = path, kind
        self.to_mean = nn.Linear(len(WORDS), 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.to_mean.weight.copy_(torch.randn(3, len(WORDS), generator=generator) * 0.6)
            self.to_mean.bias.zero_()

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Return E[out | x_t] for latents (b, 3, 4, 4), times (b,) and encodings (b, WINDOW, words)."""
        alpha, sigma = self.path.levels(t, x_t)
        mean = (self.to_mean(tokens) - self.to_mean.bias).sum(1) + self.to_mean.bias
        mu = mean[:, :, None, None]
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = mu + gain * (x_t - alpha * mu)
        return native(self.kind, x0, (x_t - alpha * x0) / sigma, alpha, sigma)


class ToyModel(Model):
    """The Gaussian world as a Model."""

    def __init__(self, kind: Kind = "eps") -> None:
        self.name, self.sampling = "toy", Sampling(steps=10, guidance=1.0, size=4)
        if kind == "flow":
            path = Path.straight(lambda n: torch.linspace(1000, 1000 / n, n))
        else:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            path = Path.discrete((1 - betas).cumprod(0), lambda n: torch.linspace(999, 999 // n, n).long(), 1.0)
        groups: dict[str, Callable[[str], bool]] = {
            "all": lambda _: True,
            "cross-attention": lambda n: n == "to_mean.weight",
            "text-readers": lambda n: n == "to_mean.weight",
            "transformer-blocks": lambda n: n == "to_mean.weight",
        }
        self.network = Gaussian(path, kind)
        self.denoiser = Denoiser(self.network, path, kind, lambda m, x, t, c: m(x, t, c.tokens), (3, 4, 4), groups)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.to_mean.weight.device

    def encode(self, prompts: str | Sequence[str]) -> Condition:
        """Return one-hot words, (b, WINDOW, words); unknown words are nothing."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = torch.zeros(len(prompts), WINDOW, len(WORDS))
        for i, prompt in enumerate(prompts):
            known = [WORDS.index(w) for w in prompt.lower().replace(",", " ").split() if w in WORDS]
            for j, k in enumerate(known[:WINDOW]):
                tokens[i, j, k] = 1
        return Condition(tokens.to(self.device))

    def clipped(self, prompts: Sequence[str]) -> list[tuple[str, str]]:
        """Return (prompt, the part that is cut off) for prompts of more than WINDOW words."""
        return [(p, " ".join(p.split()[WINDOW:])) for p in prompts if len(p.split()) > WINDOW]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        negative: str | None = None,
        batch: int = 32,  # noqa: ARG002 (every Model takes it; here a batch of any size is nothing)
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return one picture per (prompt, seed) pair by this package's own sampler."""
        noise = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds])
        scale = self.sampling.guidance if guidance is None else guidance
        c, null = self.encode(prompts), self.encode(negative or "")
        if self.one_step is None:
            steps = steps or self.sampling.steps
            z = generate(self.denoiser, c, null, noise.to(self.device), steps=steps, guidance=scale)
        else:
            with torch.no_grad():
                z = one_step(self.denoiser, guided(self.denoiser, c, c, 1.0), noise.to(self.device), self.one_step.t)
        if progress:
            progress(len(prompts))
        return (z / 2 + 0.5).clamp(0, 1).cpu()

    def latents(self, images: Tensor) -> Tensor:
        """Return pictures in [-1, 1]: this world has no autoencoder to speak of."""
        return images * 2 - 1

    def pictures(self, latents: Tensor) -> Tensor:
        """Return pictures, which latents here are."""
        return latents / 2 + 0.5

    def modules(self) -> dict[str, nn.Module]:
        """Return the one network."""
        return {"unet": self.network}


def model(kind: Kind = "eps") -> ToyModel:
    """Return the Gaussian world in a parameterisation: eps, x0, v or flow."""
    return ToyModel(kind)
