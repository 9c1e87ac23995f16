"""Stage `vae`: the autoencoder, 64x64x3 pictures to 16x16x4 latents.

Small batches: early training of an autoencoder is limited by the number of updates, not by the noise of the gradient.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from .training import Ema, Pictures, cosine, generator, loop
from .world import BACKGROUNDS, STYLES

BATCH = 8
KL = 1e-4  # weight of the divergence, averaged over latent dimensions; the loss is a mean over pixels in [-1, 1]
DETAIL = 0.1  # weight of the absolute error, which keeps edges crisper than the squared one alone


def network() -> AutoencoderKL:
    """Build the untrained autoencoder."""
    torch.default_generator.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def random_pictures(pictures: Pictures, n: int, rng: torch.Generator) -> Tensor:
    """Draw n augmented pictures of any object, style and background, in [-1, 1]."""
    o = torch.randint(len(pictures.entries), (n,), generator=rng)
    s = torch.randint(len(STYLES), (n,), generator=rng)
    b = torch.randint(len(BACKGROUNDS), (n,), generator=rng) * (torch.rand(n, generator=rng) < 0.6)
    return pictures.draw(o, s, b, rng) * 2 - 1


def train(work: Path, steps: int = 6000, lr: float = 2e-3, device: str = "cpu") -> None:
    """Train the autoencoder and save it to `work/vae` with the latents' scale measured on 512 pictures."""
    pictures = Pictures(work, device)
    vae = network().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-3)
    ema = Ema(vae, decay=0.998)

    def update(_step: int, rng: torch.Generator) -> Tensor:
        x = random_pictures(pictures, BATCH, rng)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng).to(pictures.device)
        y = vae.decode(z).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss: Tensor = F.mse_loss(y, x) + DETAIL * F.l1_loss(y, x) + KL * divergence
        return loss

    states = {"vae": vae, "ema": ema}
    loop("vae", work, steps, states, optimizer, lambda i: cosine(i, steps, flat=0.3), update, after=ema.update)
    ema.copy_to_modules()
    vae.eval()
    scale, psnr = measure(vae, pictures)
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(work / "vae")
    tqdm.write(f"vae: PSNR {psnr:.2f} dB on 512 fresh augmentations, scaling factor {scale:.4f}")


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: Pictures, n: int = 512) -> tuple[float, float]:
    """Return (1 / standard deviation of the latents, mean PSNR in dB) over n augmentations unseen in training."""
    rng = generator(10_000, 0)
    squares, latents = [], []
    for _ in range(n // 32):
        x = random_pictures(pictures, 32, rng)
        z = vae.encode(x).latent_dist.mode()
        latents.append(z)
        squares.append(((vae.decode(z).sample.clamp(-1, 1) - x) / 2).square().flatten(1).mean(1))
    return 1 / torch.cat(latents).std().item(), (-10 * torch.cat(squares).log10()).mean().item()
