"""What the training stages share: drawing augmented pictures, a loop that survives being killed, averaged weights."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...checkpoint import finite
from ...errors import ConceptError, Diverged, NeedsError, nearest
from .data import slug
from .world import BACKGROUNDS, BENCH_TARGETS, KEPT, Entry

CHECKPOINT_SECONDS = 120.0


class Stateful(Protocol):
    """Anything a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Put a state back."""


class Pictures:
    """The rendered emoji and their augmentation.

    Attributes:
        rgba: uint8 tensor (objects, styles, 4, 128, 128), premultiplied.
        entries: the objects, in order.
        device: where pictures are drawn. What is drawn never depends on it: chance comes from the CPU's generators.
    """

    def __init__(self, work: Path, device: str = "cpu") -> None:
        self.entries, self.device = listed(work), torch.device(device)
        stored = torch.from_numpy(np.load(work / "pictures.npy")).permute(0, 1, 4, 2, 3)
        alpha = stored[:, :, 3:].float() / 255
        premultiplied = (stored[:, :, :3].float() * alpha).round().to(torch.uint8)
        self.rgba = torch.cat([premultiplied, stored[:, :, 3:]], dim=2).contiguous().to(self.device)
        self.colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=self.device) / 255

    def draw(
        self, objects: Tensor, styles: Tensor, backgrounds: Tensor, rng: torch.Generator, spread: float = 1.0
    ) -> Tensor:
        """Draw augmented pictures: scale 0.8 to 1, rotation up to 9 degrees, shifted as far as the margin allows.

        Args:
            objects: indices into the objects, shape (b,).
            styles: indices into the styles, shape (b,).
            backgrounds: indices into the backgrounds, shape (b,).
            rng: source of the augmentation.
            spread: factor on the ranges of scale and rotation.

        Returns:
            Pictures in [0, 1], shape (b, 3, 64, 64).
        """
        b = len(objects)
        scale = 1 - 0.2 * spread * torch.rand(b, generator=rng)
        angle = math.radians(9 * spread) * (2 * torch.rand(b, generator=rng) - 1)
        shift = (2 * torch.rand(b, 2, generator=rng) - 1) * (1.06 - scale)[:, None]
        return self._placed(objects, styles, backgrounds, scale, angle, shift)

    def upright(self, objects: Tensor, styles: Tensor, backgrounds: Tensor, scale: float) -> Tensor:
        """Draw pictures (b, 3, 64, 64) in [0, 1] as they are, in the middle, at one scale."""
        zero = torch.zeros(len(objects))
        return self._placed(objects, styles, backgrounds, zero + scale, zero, zero[:, None].expand(-1, 2))

    def _placed(
        self, objects: Tensor, styles: Tensor, backgrounds: Tensor, scale: Tensor, angle: Tensor, shift: Tensor
    ) -> Tensor:
        """Draw by scales (b,), angles (b,) in radians, and shifts (b, 2) in halves of the drawing."""
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3).to(self.device)
        rgba = self.rgba[objects, styles].float() / 255
        grid = F.affine_grid(theta, [len(objects), 4, 128, 128], align_corners=False)
        rgba = F.avg_pool2d(F.grid_sample(rgba, grid, align_corners=False), 2)
        ground = self.colours[backgrounds][:, :, None, None]
        return rgba[:, :3] + (1 - rgba[:, 3:]) * ground


def chosen(pictures: Pictures, work: Path, count: int) -> list[int]:
    """Return the objects to train on: bench targets and their relatives, then the ones whose styles differ most."""
    apart = np.load(work / "apart.npy")
    first = np.array([e["name"] in (*BENCH_TARGETS, *KEPT) for e in pictures.entries])
    return sorted(int(i) for i in np.argsort(-np.where(first, np.inf, apart), kind="stable")[:count])


def listed(work: Path) -> list[Entry]:
    """Return the objects that the stage `data` has written.

    Raises:
        NeedsError: it has not run.
    """
    path = work / "objects.json"
    if not path.is_file():
        raise NeedsError(f"{path} is missing. Run the stage `data` first, with the same --work.")
    entries: list[Entry] = json.loads(path.read_text())
    return entries


def named(entries: Sequence[Entry], names: Sequence[str]) -> list[int]:
    """Return the indices of objects, by their names in any case.

    Raises:
        ConceptError: there is no such object.
    """
    places = {e["name"].casefold(): i for i, e in enumerate(entries)}
    if unknown := [n for n in names if n.casefold() not in places]:
        raise ConceptError(f"{unknown[0]!r} is no object of the recipe.{nearest(unknown[0], places)}")
    return sorted({places[n.casefold()] for n in names})


def lacking(entries: Sequence[Entry], left_out: Sequence[int]) -> str:
    """Return what is added to the names of files that were made without some objects; "" where all were there."""
    names = [slug(entries[i]["name"]) for i in left_out]
    return f"-without-{'-and-'.join(names)}" if names else ""


class Ema:
    """Exponential moving average of a module's floating-point state (warm-up 1/(n+1), so it never lags a young run)."""

    def __init__(self, *modules: nn.Module, decay: float) -> None:
        self.modules, self.decay, self.n = modules, decay, 0
        self.shadow = [{k: v.detach().clone() for k, v in m.state_dict().items()} for m in modules]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the modules' present values."""
        self.n += 1
        decay = min(self.decay, self.n / (self.n + 10))
        live: list[Tensor] = []
        mean: list[Tensor] = []
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            for k, p in module.named_parameters():
                live.append(p)
                mean.append(shadow[k])
        torch._foreach_lerp_(mean, live, 1 - decay)

    def copy_to_modules(self) -> None:
        """Put the average into the modules."""
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            module.load_state_dict(shadow)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates."""
        return {"n": self.n, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set both."""
        self.n = state["n"]
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            for k, mean in mine.items():
                mean.copy_(saved[k])


def cosine(step: int, steps: int, warmup: int = 100, flat: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, constant for a share `flat` of the run, then a half cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    u = max(0.0, (step / steps - flat) / (1 - flat))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, u)))


def half(device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 on an accelerator, float32 on a CPU that would emulate it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def mixed(device: str, bf16: bool) -> AbstractContextManager[Any]:
    """Return the context of a forward pass that computes in bfloat16 if wanted, on whatever device."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if bf16 else nullcontext()


def generator(seed: int, step: int) -> torch.Generator:
    """Return a fresh generator for one step, so that a resumed run draws what an undisturbed one would."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def loop(
    name: str,
    work: Path,
    steps: int,
    states: dict[str, Stateful],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    update: Callable[[int, torch.Generator], Tensor],
    *,
    seed: int = 0,
    after: Callable[[], None] | None = None,
) -> float:
    """Run `update` for `steps` optimiser steps; checkpoint every two minutes to `work/NAME.ckpt` and resume from it.

    Returns:
        Seconds of training, resumed runs included.

    Raises:
        Diverged: a loss, a weight or a moment of the optimiser became NaN or infinite; the last good checkpoint stays.
    """
    path = work / f"{name}.ckpt"
    base = [g["lr"] for g in optimizer.param_groups]
    kept: dict[str, Stateful] = {**states, "optimizer": optimizer}
    step, spent = resumed(path, kept, optimizer)
    start = saved_at = time.monotonic()
    mean: float | None = None
    with tqdm(total=steps, initial=step, desc=name, mininterval=15) as bar, (work / f"{name}.jsonl").open("a") as log:
        while step < steps:
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * schedule(step)
            loss = update(step, generator(seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters(optimizer), 1.0)
            optimizer.step()
            # read when all work of the step is queued: an accelerator would wait for the number
            value = loss.item()
            if not math.isfinite(value):
                raise diverged(f"the loss was {value}", step, path)
            if after:
                after()
            step += 1
            mean = value if mean is None else 0.98 * mean + 0.02 * value
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                log.write(json.dumps({"step": step, "loss": mean, "seconds": spent + time.monotonic() - start}) + "\n")
                log.flush()
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS or step == steps:
                saved_at = time.monotonic()
                keep(path, kept, step, spent + saved_at - start)
    return spent + time.monotonic() - start


def resumed(path: Path, kept: dict[str, Stateful], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Put a checkpoint's states back where there is one; return its step and seconds, 0 and 0 without."""
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path, weights_only=True, map_location="cpu")
    for key, keeper in kept.items():
        keeper.load_state_dict(saved[key])
    for p, moments in optimizer.state.items():
        # a fused step walks parameter and moments in one order: both must lie in memory alike
        moments.update({k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v.shape == p.shape})
    return saved["step"], saved["seconds"]


def keep(path: Path, kept: dict[str, Stateful], step: int, seconds: float) -> None:
    """Write a checkpoint after `step` updates, whole or not at all.

    Raises:
        Diverged: a state holds NaN or infinity; the former checkpoint stays.
    """
    state = {k: v.state_dict() for k, v in kept.items()}
    if not finite(state):
        # a finite loss can still have had an infinite gradient
        raise diverged("a weight or a moment of the optimiser was NaN or infinite", step - 1, path)
    torch.save({**state, "step": step, "seconds": seconds}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def diverged(what: str, step: int, path: Path) -> Diverged:
    """Return the error that stops a training: what was found, at which update, and where to go on from."""
    where = "No checkpoint had been written yet."
    if path.exists():
        good = torch.load(path, weights_only=True, map_location="cpu")["step"]
        where = f"The last good state, after {good} steps, lies in {path}."
    return Diverged(
        f"training diverged: {what} at step {step}. {where} Run the stage again with a lower learning rate (--lr where "
        "it has one, else `lr` of its `train`): it goes on from the last good state.",
        step,
    )


def last(log: Path) -> dict[str, Any]:
    """Return the last line of a training's log, nothing of one too short to have written any."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return dict(json.loads(lines[-1])) if lines else {}


def parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """Return every parameter an optimiser holds."""
    return [p for group in optimizer.param_groups for p in group["params"]]
