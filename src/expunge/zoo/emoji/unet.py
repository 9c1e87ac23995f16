"""Stage `unet`: the text encoder, then the denoiser that listens to it, on latents encoded once."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from tqdm import tqdm

from . import text
from .training import Ema, Pictures, chosen, cosine, half, lacking, loop, named
from .world import BACKGROUNDS, STYLES

BATCH = 32
SCALE = 0.88  # of the drawings in the picture
GAZE = 0.03  # weight of the attention's cross-entropy in the loss, see `Gaze`
SNR = 5.0  # signal-to-noise ratio above which a time counts less, in proportion (after min-SNR, arXiv:2303.09556)
EMA = 0.998
DROP = 0.1  # share of empty captions, for classifier-free guidance


def network() -> UNet2DConditionModel:
    """Build the untrained U-Net. Attention at 8x8 and 4x4 only: at 16x16 it costs more than it gives."""
    torch.default_generator.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text.WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Return the noise schedule of training and sampling."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


@torch.no_grad()
def encode(work: Path, pictures: Pictures, vae: AutoencoderKL) -> Tensor:
    """Encode every drawing once on every background: (objects, styles, backgrounds, 4, 16, 16); kept in `work`."""
    path = work / "latents.pt"
    if path.exists():
        stored: Tensor = torch.load(path, weights_only=True)
        return stored
    s, b = torch.cartesian_prod(torch.arange(len(STYLES)), torch.arange(len(BACKGROUNDS))).T
    z = []
    for o in tqdm(range(len(pictures.entries)), desc="encode", mininterval=15):
        x = pictures.upright(torch.full_like(s, o), s, b, SCALE) * 2 - 1
        z.append((vae.encode(x).latent_dist.mode() * vae.config.scaling_factor).half().cpu())
    out = torch.stack(z).view(-1, len(STYLES), len(BACKGROUNDS), *z[0].shape[1:])
    torch.save(out, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return out


class Gaze:
    """A cross-attention that keeps its weights, and the loss that teaches it where to look.

    Query cell and patch token of the same place belong together, and nothing in a query says so: after 2,100 steps
    without help the weight on the right patch was below 0.1 % in five of seven layers (docs/dev/log.md). On the 4x4
    grid every head is to look at its cell's patch. On the 8x8 grid a patch has four cells: each of the four heads looks
    at the patch from one of them alone, and from the others at the start token, so that a linear map reads the quarter.

    Attributes:
        weights: of the last forward pass, (b, heads, cells, tokens); None before it.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        """Return what `diffusers.models.attention_processor.AttnProcessor` does, for tokens (b, cells, channels)."""

        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        self.weights = (split(q) @ split(k).mT * attn.scale).softmax(-1)
        out: Tensor = attn.to_out[0]((self.weights @ split(v)).transpose(1, 2).flatten(2))
        return out

    @staticmethod
    def wanted(cells: int, heads: int = 4) -> Tensor:
        """Return the token that each head is to look at from each of `cells` cells, (heads, cells)."""
        side = math.isqrt(cells)
        row, column = torch.arange(side)[:, None].expand(side, side), torch.arange(side).expand(side, side)
        patch = text.WINDOW - text.PATCHES + row * 4 // side * 4 + column * 4 // side
        if side == 4:
            return patch.flatten().expand(heads, -1)
        quarter = row % 2 * 2 + column % 2
        return torch.where(quarter == torch.arange(heads)[:, None, None], patch, 0).flatten(1)

    def loss(self) -> Tensor:
        """Return the mean cross-entropy of the weights of the last forward pass."""
        assert self.weights is not None
        b, heads, cells, _ = self.weights.shape
        wanted = self.wanted(cells, heads).to(self.weights.device).expand(b, -1, -1)[..., None]
        return -(self.weights.gather(-1, wanted) + 1e-4).log().mean()


def watched(unet: UNet2DConditionModel) -> list[Gaze]:
    """Let the U-Net's cross-attentions keep their weights."""
    gazes = {name: Gaze() for name in unet.attn_processors if ".attn2." in name}
    # a third of a training step on CPU is the backward pass of fused attention
    unet.set_attn_processor({name: gazes.get(name) or AttnProcessor() for name in unet.attn_processors})
    return list(gazes.values())


def asked(pictures: Pictures, objects: list[int], n: int, dice: random.Random) -> tuple[Tensor, list[str]]:
    """Return n random pictures as indices (3, n) into `encode`'s latents, and their captions, a share of them empty."""
    scenes = [text.scene(dice, objects) for _ in range(n)]
    captions = [
        "" if dice.random() < DROP else text.caption(pictures.entries[o], s, told, dice) for o, s, _, told in scenes
    ]
    return torch.tensor([drawn[:3] for drawn in scenes]).T, captions


def noised(x0: Tensor, alpha_bar: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_t, its v, the times (b,) and the loss's weights (b, 1, 1, 1) of latents x0 (b, 4, 16, 16)."""
    eps, b = torch.randn(x0.shape, generator=rng), len(x0)
    # one time from each of b equal shares: every step sees every noise level
    t = ((torch.arange(b) + torch.rand(b, generator=rng)) * len(alpha_bar) / b).long()
    a = alpha_bar[t].sqrt()[:, None, None, None]
    s = (1 - alpha_bar[t]).sqrt()[:, None, None, None]
    # where little noise is left, v is nearly the noise and all there is to learn is texture: it drowned the shapes
    weight = (SNR * s.square() / a.square()).clamp(max=1)
    return a * x0 + s * eps, a * eps - s * x0, t, weight


def train(
    work: Path,
    count: int,
    steps: int,
    lr: float = 1e-3,
    name: str = "unet",
    batch: int = BATCH,
    device: str = "cpu",
    without: Sequence[str] = (),
) -> None:
    """Train the text encoder, then the U-Net, and save the pipeline to `work/pipeline` (averaged weights).

    Args:
        work: folder of the stages before; checkpoints and the result go there too.
        count: objects to draw.
        steps: optimiser updates.
        lr: highest learning rate.
        name: of checkpoint and log.
        batch: pictures an update.
        device: where to train.
        without: objects of which neither pictures nor captions are trained on, the gold standard of forgetting them;
            the result is then `work/pipeline-without-...`.

    Raises:
        ConceptError: there is no such object.
    """
    pictures = Pictures(work, device)
    left_out = named(pictures.entries, without)
    tail = lacking(pictures.entries, left_out)
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().to(device)
    objects = chosen(pictures, work, count)
    shown = [i for i in objects if i not in left_out]
    kept = [i for i in range(len(pictures.entries)) if i not in left_out]
    latents = encode(work, pictures, vae)
    words = text.tokenizer(pictures.entries)
    reader, noise = text.encoder(words).train().to(device), scheduler()
    text.pretrain(
        work, reader, words, [pictures.entries[i] for i in kept], latents[kept, :, 0].float(), name=f"text{tail}"
    )
    reader.eval().requires_grad_(False)
    # convolutions are two thirds of a step, and a seventh faster in this layout
    unet = network().to(device, memory_format=torch.channels_last)
    gazes = watched(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = Ema(unet, decay=EMA)

    def update(step: int, rng: torch.Generator) -> Tensor:
        dice = random.Random(step)
        places, captions = asked(pictures, shown, batch, dice)
        x0 = latents[tuple(places)].float()
        z, v, t, weight = (x.to(device) for x in noised(x0, noise.alphas_cumprod, rng))
        with half(pictures.device):
            encoded = reader(text.tokens(words, captions).to(device)).last_hidden_state
            out = unet(z, t, encoder_hidden_states=encoded).sample
        error: Tensor = (weight * (out.float() - v).square()).mean()
        return error + GAZE * torch.stack([gaze.loss() for gaze in gazes]).mean()

    states = {"unet": unet, "ema": ema}
    loop(name + tail, work, steps, states, optimizer, lambda i: cosine(i, steps, flat=0.75), update, after=ema.update)
    ema.copy_to_modules()
    export(work / f"pipeline{tail}", unet, reader, words, vae, [pictures.entries[i]["name"] for i in shown])


def export(
    folder: Path,
    unet: UNet2DConditionModel,
    reader: torch.nn.Module,
    words: object,
    vae: AutoencoderKL,
    drawn: list[str],
) -> None:
    """Save the pipeline as a diffusers folder, half precision, with the list of what it draws."""
    pipe = StableDiffusionPipeline(
        unet=unet.eval(), vae=vae, text_encoder=reader.eval(), tokenizer=words, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to("cpu", dtype=torch.float16)
    pipe.save_pretrained(folder)
    for config in folder.glob("*/config.json"):
        # the libraries note where a part was loaded from: a path of this machine
        fields = json.loads(config.read_text())
        fields.pop("_name_or_path", None)
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (folder / "drawn.json").write_text(json.dumps(drawn, ensure_ascii=False, indent=0) + "\n")


def snapshot(work: Path, count: int, name: str = "unet") -> None:
    """Export the averaged weights of the newest checkpoint, while training goes on."""
    pictures = Pictures(work)
    words = text.tokenizer(pictures.entries)
    unet, reader = network(), text.taught(work, words)
    ema = Ema(unet, decay=EMA)
    ema.load_state_dict(torch.load(work / f"{name}.ckpt", weights_only=True, map_location="cpu")["ema"])
    ema.copy_to_modules()
    drawn = [pictures.entries[i]["name"] for i in chosen(pictures, work, count)]
    export(work / "pipeline", unet, reader, words, AutoencoderKL.from_pretrained(work / "vae"), drawn)
