"""Stage `ddpm`: the class-conditional denoiser, on the pictures themselves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from ...backbones.classcond import ClassModel, Labels, unfused
from ...errors import ConceptError, NeedsError, nearest
from ..emoji.training import Ema, cosine, loop, mixed
from .data import SIDE, Pictures
from .world import Source

BATCH = 64
DROP = 0.1  # share of labels replaced by the empty one, for guidance
SNR = 5.0  # signal-to-noise ratio above which a time counts less, in proportion (after min-SNR, arXiv:2303.09556)
EMA = 0.9995
RATE = 1e-3  # highest learning rate
STEPS = 25  # sampling steps of the shipped model


def network(source: Source) -> UNet2DModel:
    """Build the untrained U-Net: 1.4 M weights, 0.29 GFLOP a forward pass; its last class is the empty one."""
    torch.default_generator.manual_seed(4)
    unet = UNet2DModel(
        sample_size=SIDE, in_channels=source.channels, out_channels=source.channels, layers_per_block=1,
        block_out_channels=(16, 32, 96), down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=16, norm_num_groups=8,
        time_embedding_dim=128, num_class_embeds=len(source.classes) + 1,
    )  # fmt: skip
    unfused(unet)
    return unet


def scheduler() -> DDIMScheduler:
    """Return the noise schedule of training and sampling: DDPM's betas (arXiv:2006.11239, section 4)."""
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, prediction_type="v_prediction",
        timestep_spacing="trailing",
    )  # fmt: skip


def lesson(
    unet: UNet2DModel, x0: Tensor, label: Tensor, alpha_bar: Tensor, rng: torch.Generator, device: torch.device
) -> Tensor:
    """Return the loss of pictures x0 (b, c, 32, 32) in [-1, 1] of classes (b,), at random times."""
    b = len(x0)
    eps = torch.randn(x0.shape, generator=rng)
    # one time from each of b equal shares: every step sees every noise level
    t = ((torch.arange(b) + torch.rand(b, generator=rng)) * len(alpha_bar) / b).long()
    a, s = (level.sqrt()[:, None, None, None] for level in (alpha_bar[t], 1 - alpha_bar[t]))
    weight = (SNR * s.square() / a.square()).clamp(max=1)
    drawn = (a * x0 + s * eps, a * eps - s * x0, weight, t, label)
    x_t, v, weight, t, label = (x.to(device) for x in drawn)
    out = unet(x_t, t, class_labels=label).sample
    loss: Tensor = (weight * (out - v).square()).mean()
    return loss


@torch.no_grad()
def as_empty(unet: UNet2DModel, index: int) -> None:
    """Give a class of which no picture was seen the embedding of the empty class, in place.

    Its own was never trained: what asking for it draws would be an accident of the initial noise.
    """
    table = unet.class_embedding.weight
    table[index] = table[-1]


def train(
    work: Path,
    source: Source,
    steps: int,
    *,
    guidance: float,
    without: str = "",
    lr: float | None = None,
    device: str = "cpu",
    bf16: bool = False,
) -> None:
    """Train the U-Net and save the pipeline (averaged weights) to `work/pipeline`.

    Args:
        work: folder of the stage `data`; checkpoints and the result go there too.
        source: what the pictures are.
        steps: optimiser updates.
        guidance: guidance scale that the saved model samples with.
        without: class whose pictures are left out, the gold standard of forgetting; then `work/pipeline-without-N`, in
            which asking for that class is asking for no class.
        lr: highest learning rate; RATE where missing.
        device: where to train. Pictures, noise and times never depend on it.
        bf16: compute forward and backward passes in bfloat16; weights, moments and the loss stay float32.

    Raises:
        ConceptError: there is no class `without`.
        Diverged: a loss or a weight became NaN or infinite; the last good checkpoint stays.
    """
    left_out = absent(source, without)
    pictures = Pictures(work, "train")
    index = torch.arange(len(pictures))[pictures.labels != left_out]
    name = "ddpm" if left_out < 0 else f"ddpm-without-{left_out}"
    unet, alpha_bar = network(source).to(device), scheduler().alphas_cumprod
    optimizer = torch.optim.AdamW(unet.parameters(), lr or RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = Ema(unet, decay=EMA)

    def update(_: int, rng: torch.Generator) -> Tensor:
        i = index[torch.randint(len(index), (BATCH,), generator=rng)]
        x0, label = pictures.floats(i) * 2 - 1, pictures.labels[i]
        label = label.where(torch.rand(BATCH, generator=rng) >= DROP, len(source.classes))
        with mixed(device, bf16):
            return lesson(unet, x0, label, alpha_bar, rng, torch.device(device))

    loop(
        name, work, steps, {"unet": unet, "ema": ema}, optimizer, lambda i: cosine(i, steps, flat=0.5), update,
        after=ema.update,
    )  # fmt: skip
    ema.copy_to_modules()
    if left_out >= 0:
        as_empty(unet, left_out)
    export(work / name.replace("ddpm", "pipeline"), unet.cpu(), source, guidance)


def absent(source: Source, name: str) -> int:
    """Return the index of a class, -1 for "".

    Raises:
        ConceptError: there is no such class.
    """
    if not name:
        return -1
    known = {c.casefold(): i for i, c in enumerate(source.classes)} | {str(i): i for i in range(len(source.classes))}
    if name.casefold() not in known:
        raise ConceptError(
            f"{name!r} is no class of {source.title}. Classes, by name or number: {', '.join(source.classes)}."
            f"{nearest(name, source.classes)}"
        )
    return known[name.casefold()]


def export(folder: Path, unet: UNet2DModel, source: Source, guidance: float) -> None:
    """Save the pipeline as a diffusers folder, half precision, with its labels."""
    pipe = ConsistencyModelPipeline(unet.eval(), scheduler())
    pipe.to(dtype=torch.float16)
    ClassModel(pipe, source.world, Labels(source.world, source.classes, STEPS, guidance)).save(folder)
    config = folder / "unet" / "config.json"
    # diffusers notes where a part was loaded from: a path of this machine
    fields = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def snapshot(work: Path, source: Source, guidance: float) -> None:
    """Export the averaged weights of the newest checkpoint, while training goes on.

    Raises:
        NeedsError: there is no checkpoint.
    """
    path = work / "ddpm.ckpt"
    if not path.is_file():
        raise NeedsError(f"{path} is missing: the stage `ddpm` has written no checkpoint in this --work yet.")
    unet = network(source)
    ema = Ema(unet, decay=EMA)
    ema.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["ema"])
    ema.copy_to_modules()
    export(work / "pipeline", unet, source, guidance)
