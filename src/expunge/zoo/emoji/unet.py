"""Stage `unet`: the text encoder, then the denoiser that listens to it, on latents encoded once."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from . import text
from .training import Ema, Pictures, chosen, cosine, half, lacking, loop, named
from .world import BACKGROUNDS, STYLES, Entry

BATCH = 32
SCALE = 0.88  # of the drawings in the picture
GAZE = 0.03  # weight of the attention's cross-entropy in the loss, see `Gaze`
TOLD = 0.1  # weight of a probe's squared error in the loss, see `Probes`
PLACE = 0.015  # weight of a probe's cross-entropy in the loss, see `Probes`
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


class Probes(nn.Module):
    """Linear probes, thrown away after training, that teach the U-Net's way up what it is slow to find by itself.

    *The drawing.* A probe behind the last attention of a resolution is to tell each cell's share of the clean latent,
    as the text encoder's tokens do; what noise has not hidden counts less.

    *The place.* Upsampling repeats a cell four times, and the convolution after it treats the four alike: they cannot
    part what the coarse cell knows of them until the network has made itself a sign for the quarter. After 4,500 steps
    there was hardly one at 16x16 (a linear map explained .05 to .10 of it), and from pure noise .24 to .41 of the
    finest details were unexplained, against .12 of the coarser ones (docs/dev/log.md).
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.told: list[Tensor] = []
        self.placed: list[Tensor] = []
        drawing: list[nn.Module] = []
        place: list[nn.Module] = []
        for block in unet.up_blocks[:-1]:
            attention, upsampler = block.attentions[-1], block.upsamplers[0]
            attention.register_forward_hook(lambda _, __, out: self.told.append(out[0]))
            upsampler.register_forward_hook(lambda _, __, out: self.placed.append(out))
            share = 4 ** (len(unet.up_blocks) - len(drawing))  # numbers of the 4x16x16 latent in a cell
            drawing.append(nn.Conv2d(attention.out_channels, share, 1))
            place.append(nn.Conv2d(upsampler.conv.out_channels, 4, 1))
        self.drawing, self.place = nn.ModuleList(drawing), nn.ModuleList(place)

    def loss(self, x0: Tensor, hidden: Tensor) -> Tensor:
        """Return the loss of the forward passes since the last call.

        Args:
            x0: clean latents, (b, 4, 16, 16).
            hidden: share of noise in the noised ones, 1 - alpha_bar, (b,).
        """
        total = x0.new_zeros(())
        for probe, x in zip(self.drawing, self.told, strict=True):
            error = (F.pixel_shuffle(probe(x).float(), x0.shape[-1] // x.shape[-1]) - x0).square().mean((1, 2, 3))
            total = total + TOLD * (hidden * error).mean()
        for probe, x in zip(self.place, self.placed, strict=True):
            row, column = (torch.arange(n, device=x.device) % 2 for n in x.shape[2:])
            quarter = (2 * row[:, None] + column).expand(len(x), -1, -1)
            total = total + PLACE * F.cross_entropy(probe(x).float(), quarter)
        self.told.clear()
        self.placed.clear()
        return total


def watched(unet: UNet2DConditionModel) -> list[Gaze]:
    """Let the U-Net's cross-attentions keep their weights."""
    gazes = {name: Gaze() for name in unet.attn_processors if ".attn2." in name}
    # a third of a training step on CPU is the backward pass of fused attention
    unet.set_attn_processor({name: gazes.get(name) or AttnProcessor() for name in unet.attn_processors})
    return list(gazes.values())


@torch.no_grad()
def whitening(reader: nn.Module, words: CLIPTokenizer, entries: Sequence[Entry]) -> Tensor:
    """Return the symmetric matrix (width, width) that makes every direction of the encoded captions equally long.

    The readers learn from encodings multiplied by it, and `folded` moves it into their weights. What tells like
    drawings apart lies in the encoding's short directions, which gradient descent finds last: of 256, the 64 longest
    leave .19 of the drawings unexplained, 128 leave .10 and all .07 (docs/dev/log.md).
    """
    dice = random.Random(0)
    drawn = [text.scene(dice, range(len(entries))) for _ in range(2048)]
    captions = [text.caption(entries[o], s, told, dice) for o, s, _, told in drawn]
    device = next(reader.parameters()).device
    moment = torch.zeros(text.WIDTH, text.WIDTH, device=device)
    for batch in [captions[i : i + 128] for i in range(0, len(captions), 128)]:
        hidden = reader(text.tokens(words, batch).to(device)).last_hidden_state[:, -text.PATCHES :].flatten(0, 1)
        moment += hidden.mT @ hidden / (len(captions) * text.PATCHES)
    length, direction = torch.linalg.eigh(moment.double())
    # one direction is empty, the layer norm's
    matrix: Tensor = (direction * length.clamp(min=0.05).rsqrt()) @ direction.mT
    return matrix.float()


@torch.no_grad()
def folded(unet: UNet2DConditionModel, matrix: Tensor) -> UNet2DConditionModel:
    """Multiply the text readers of `unet` by `matrix`, in place."""
    for name, layer in unet.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            layer.weight.copy_(layer.weight @ matrix.to(layer.weight))
    return unet


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


def lesson(
    unet: UNet2DConditionModel,
    gazes: Sequence[Gaze],
    probes: Probes,
    x0: Tensor,
    encoded: Tensor,
    alpha_bar: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """Return the loss of latents x0 (b, 4, 16, 16) drawn by their captions' encodings (b, n, d)."""
    device = encoded.device
    z, v, t, weight = (x.to(device) for x in noised(x0, alpha_bar, rng))
    with half(device):
        out = unet(z, t, encoder_hidden_states=encoded).sample
        aid = probes.loss(x0.to(device), 1 - alpha_bar.to(device)[t])
    error: Tensor = (weight * (out.float() - v).square()).mean()
    return error + GAZE * torch.stack([gaze.loss() for gaze in gazes]).mean() + aid


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
    shown = [i for i in chosen(pictures, work, count) if i not in left_out]
    kept = [i for i in range(len(pictures.entries)) if i not in left_out]
    latents = encode(work, pictures, vae)
    words = text.tokenizer(pictures.entries)
    reader, noise = text.encoder(words).train().to(device), scheduler()
    text.pretrain(
        work, reader, words, [pictures.entries[i] for i in kept], latents[kept, :, 0].float(), name=f"text{tail}"
    )
    reader.eval().requires_grad_(False)
    matrix = whitening(reader, words, [pictures.entries[i] for i in kept])
    # convolutions are two thirds of a step, and a seventh faster in this layout
    unet = network().to(device, memory_format=torch.channels_last)
    gazes, probes = watched(unet), Probes(unet).to(device)
    learned = [*unet.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(learned, lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = Ema(unet, decay=EMA)

    def update(step: int, rng: torch.Generator) -> Tensor:
        dice = random.Random(step)
        which, captions = asked(pictures, shown, batch, dice)
        x0 = latents[tuple(which)].float()
        with torch.no_grad(), half(pictures.device):
            encoded = reader(text.tokens(words, captions).to(device)).last_hidden_state @ matrix
        return lesson(unet, gazes, probes, x0, encoded, noise.alphas_cumprod, rng)

    states = {"unet": unet, "probes": probes, "ema": ema}
    loop(name + tail, work, steps, states, optimizer, lambda i: cosine(i, steps, flat=0.3), update, after=ema.update)
    ema.copy_to_modules()
    drawn = [pictures.entries[i]["name"] for i in shown]
    export(work / f"pipeline{tail}", folded(unet, matrix), reader, words, vae, drawn)


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
    folded(unet, whitening(reader, words, pictures.entries))
    export(work / "pipeline", unet, reader, words, AutoencoderKL.from_pretrained(work / "vae"), drawn)
