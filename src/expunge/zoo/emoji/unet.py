"""Stage `unet`: the denoiser, and the text encoder along with it, on latents encoded once."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from tqdm import tqdm

from . import text
from .training import Ema, Pictures, chosen, cosine, generator, half, lacking, loop, named
from .world import BACKGROUNDS, STYLES

BATCH = 32
AUGMENTATIONS = 24  # encoded a picture: three of four on white, the others on a random colour
# of the augmentation: what a prompt leaves open costs sharpness at high noise, and seeds must differ still
SPREAD = 0.6
FIRST = 48  # objects drawn until step WIDEN: shapes are learned from few, then passed on to all
WIDEN = 2000
SNR = 5.0  # signal-to-noise ratio above which a time counts less, in proportion (after min-SNR, arXiv:2303.09556)
EMA = 0.998
DROP = 0.1  # share of empty captions, for classifier-free guidance


def network() -> UNet2DConditionModel:
    """Build the untrained U-Net. Attention at 8x8 and 4x4 only: at 16x16 it costs more than it gives."""
    torch.default_generator.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text.WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    # a third of a training step on CPU is the backward pass of fused attention
    unet.set_attn_processor(AttnProcessor())
    return unet


def scheduler() -> DDIMScheduler:
    """Return the noise schedule of training and sampling."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


@torch.no_grad()
def encode(work: Path, pictures: Pictures, objects: list[int], vae: AutoencoderKL) -> dict[str, Tensor]:
    """Encode augmented pictures of the objects once; kept in `work/latents-N.pt`."""
    path = work / f"latents-{len(objects)}.pt"
    if path.exists():
        stored: dict[str, Tensor] = torch.load(path, weights_only=True)
        return stored
    o = torch.tensor(objects).repeat_interleave(len(STYLES) * AUGMENTATIONS)
    s = torch.arange(len(STYLES)).repeat_interleave(AUGMENTATIONS).repeat(len(objects))
    rng = generator(20_000, 0)
    coloured = torch.arange(len(o)) % 4 == 3
    b = torch.randint(1, len(BACKGROUNDS), (len(o),), generator=rng) * coloured
    z = []
    for i in tqdm(range(0, len(o), 64), desc="encode", mininterval=15):
        x = pictures.draw(o[i : i + 64], s[i : i + 64], b[i : i + 64], rng, SPREAD) * 2 - 1
        z.append((vae.encode(x).latent_dist.mode() * vae.config.scaling_factor).half().cpu())
    out = {"z": torch.cat(z), "o": o, "s": s, "b": b}
    torch.save(out, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return out


def captions(pictures: Pictures, data: dict[str, Tensor], rows: Tensor, dice: random.Random) -> list[str]:
    """Return a caption of each encoded picture; a share of them is empty."""
    return [
        ""
        if dice.random() < DROP
        else text.caption(pictures.entries[int(data["o"][j])], int(data["s"][j]), int(data["b"][j]), dice)
        for j in rows.tolist()
    ]


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
    """Train U-Net and text encoder and save the pipeline to `work/pipeline` (averaged weights).

    Args:
        work: folder of the stages before; checkpoints and the result go there too.
        count: objects to draw.
        steps: optimiser updates.
        lr: highest learning rate of the U-Net; the text encoder's is a third.
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
    data = encode(work, pictures, objects, vae)
    seen = ~torch.isin(data["o"], torch.tensor(left_out, dtype=torch.long))
    early = torch.isin(data["o"], torch.tensor(chosen(pictures, work, min(FIRST, count))))
    first, everything = (rows.nonzero().flatten() for rows in (seen & early, seen))
    words = text.tokenizer(pictures.entries)
    # convolutions are two thirds of a step, and a seventh faster in this layout
    unet = network().to(device, memory_format=torch.channels_last)
    reader, noise = text.encoder(words).train().to(device), scheduler()
    told = [entry for i, entry in enumerate(pictures.entries) if i not in left_out]
    text.pretrain(work, reader, words, told, name=f"text{tail}")
    groups = [{"params": unet.parameters(), "lr": lr}, {"params": reader.parameters(), "lr": lr / 3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = Ema(unet, reader, decay=EMA)

    def update(step: int, rng: torch.Generator) -> Tensor:
        pool = first if step < WIDEN else everything
        i = pool[torch.randint(len(pool), (batch,), generator=rng)]
        ids = text.tokens(words, captions(pictures, data, i, random.Random(step))).to(device)
        z, v, t, weight = (x.to(device) for x in noised(data["z"][i].float(), noise.alphas_cumprod, rng))
        with half(pictures.device):
            out = unet(z, t, encoder_hidden_states=reader(ids).last_hidden_state).sample
        loss: Tensor = (weight * (out.float() - v).square()).mean()
        return loss

    states = {"unet": unet, "text": reader, "ema": ema}
    loop(name + tail, work, steps, states, optimizer, lambda i: cosine(i, steps, flat=0.75), update, after=ema.update)
    ema.copy_to_modules()
    drawn = [pictures.entries[i]["name"] for i in objects if i not in left_out]
    export(work / f"pipeline{tail}", unet, reader, words, vae, drawn)


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
    unet, reader = network(), text.encoder(words)
    saved = torch.load(work / f"{name}.ckpt", weights_only=True, map_location="cpu")
    ema = Ema(unet, reader, decay=EMA)
    ema.load_state_dict(saved["ema"])
    ema.copy_to_modules()
    drawn = [pictures.entries[i]["name"] for i in chosen(pictures, work, count)]
    export(work / "pipeline", unet, reader, words, AutoencoderKL.from_pretrained(work / "vae"), drawn)
