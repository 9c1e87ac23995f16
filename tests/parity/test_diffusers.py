"""Our conversions, sampler and pictures against diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from expunge.backbones import tiny, toy
from expunge.backbones.unet import path_of
from expunge.kernel.path import KINDS, PREDICTION, Kind, Path, native, x0_and_eps
from expunge.kernel.sampler import generate

ROUNDING = 2e-5  # float32 through 20 steps of a network
SAME = 1e-10  # float64, one division


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_inverts_the_forward_process(kind: Kind) -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    alpha = torch.tensor([0.9, 0.5, 0.1, 0.7], dtype=torch.float64).view(-1, 1, 1, 1)
    sigma = 1 - alpha if kind == "flow" else (1 - alpha**2).sqrt()
    x_t = alpha * x0 + sigma * eps
    back = x0_and_eps(kind, x_t, native(kind, x0, eps, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(back, (x0, eps), atol=SAME, rtol=0)


# not "linspace": there diffusers' DDIM steps by a fixed 50 along a grid whose gaps are 52 or 53, off its own schedule
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_sampler_equals_ddim(prediction: str, spacing: str) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction, timestep_spacing=spacing,
    )  # fmt: skip
    model = toy.model(PREDICTION[prediction])
    model.denoiser.path = model.network.path = path_of(scheduler)
    c, x = model.encode(["red cat", "bomb"]), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = generate(model.denoiser, c, model.encode(""), x, steps=20, guidance=3.0)
    scheduler.set_timesteps(20)
    with torch.no_grad():
        for t in scheduler.timesteps:
            e_c, e_0 = model.denoiser.pair(x, t.expand(2), c, model.encode(""))
            x = scheduler.step(e_0 + 3.0 * (e_c - e_0), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=ROUNDING, rtol=ROUNDING)


def test_sampler_equals_flow_matching_euler() -> None:
    model = toy.model("flow")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    times = scheduler.timesteps.clone()
    path = Path.straight(lambda _: times)
    model.denoiser.path = model.network.path = path
    c, x = model.encode(["red cat", "bomb"]), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = generate(model.denoiser, c, model.encode(""), x, steps=20, guidance=1.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model.denoiser(x, t.expand(2), c), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_our_sampler_draws_the_pipelines_pictures(prediction: str) -> None:
    model = tiny.model(prediction)
    prompts, seeds = ["a bomb", "a cat"], [0, 1]
    pictures = model.generate(prompts, seeds=seeds)
    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    z = generate(model.denoiser, model.encode(prompts), model.encode(""), x, steps=4, guidance=3.0)
    with torch.no_grad():
        decoded = model.pipe.vae.decode(z / model.pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), pictures, atol=ROUNDING, rtol=0)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    model = tiny.model()
    together = model.generate(["a bomb", "a cat", "a dog"], seeds=[3, 4, 5])
    alone = model.generate(["a cat"], seeds=[4])
    torch.testing.assert_close(together[1:2], alone, atol=ROUNDING, rtol=0)
    assert (together[1] - model.generate(["a cat"], seeds=[9])[0]).abs().max() > ROUNDING
