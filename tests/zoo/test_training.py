"""The loop that every training of the zoo runs in: killed, resumed, diverging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from expunge.errors import Diverged
from expunge.zoo.emoji.training import Ema, cosine, loop


def fit(work: Path, stop: int | None = None, wrong: Callable[[int, nn.Linear, Tensor], Tensor] | None = None) -> Tensor:
    """Train a linear map by the recipe's loop.

    Args:
        work: where checkpoint and log go.
        stop: raises at this step, as a kill would end it.
        wrong: is given every step, the map and the loss, and returns another loss.
    """
    torch.default_generator.manual_seed(0)
    net = nn.Linear(4, 1)
    ema = Ema(net, decay=0.9)
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)

    def update(step: int, rng: torch.Generator) -> Tensor:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=rng)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        return wrong(step, net, loss) if wrong else loss

    loop(
        "net",
        work,
        30,
        {"net": net, "ema": ema},
        optimizer,
        lambda i: cosine(i, 30, warmup=5),
        update,
        after=ema.update,
    )
    ema.copy_to_modules()
    return net.weight.detach().clone()


def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expunge.zoo.emoji.training.CHECKPOINT_SECONDS", 0.0)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop=17)
    assert torch.load(tmp_path / "killed" / "net.ckpt", weights_only=True)["step"] == 17
    assert torch.equal(fit(tmp_path / "killed"), whole)


def nan_loss(step: int, _: nn.Linear, loss: Tensor) -> Tensor:
    return loss * float("nan") if step == 17 else loss


def nan_gradient(step: int, net: nn.Linear, loss: Tensor) -> Tensor:
    """A finite loss with an infinite gradient: of the root of nothing."""
    return loss + (net.weight - net.weight.detach()).square().sum().sqrt() if step == 17 else loss


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(nan_loss, "the loss was nan at step 17"), (nan_gradient, "a weight or a moment of the optimiser was NaN")],
)
@pytest.mark.parametrize("every", [0.0, 3600.0])
def test_a_training_that_diverges_stops_with_its_last_good_checkpoint(
    wrong: Callable[[int, nn.Linear, Tensor], Tensor],
    says: str,
    every: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("expunge.zoo.emoji.training.CHECKPOINT_SECONDS", every)
    if every:
        # without a checkpoint between, the next loss tells what the gradient did
        says = says if wrong is nan_loss else "the loss was nan at step 18"
    with pytest.raises(Diverged, match=f"training diverged: {says}") as told:
        fit(tmp_path, wrong=wrong)
    assert "lower learning rate" in str(told.value)
    if every:
        assert "No checkpoint had been written yet" in str(told.value)
        assert not (tmp_path / "net.ckpt").exists()
        return
    assert told.value.step == 17
    assert f"The last good state, after 17 steps, lies in {tmp_path / 'net.ckpt'}" in str(told.value)
    saved = torch.load(tmp_path / "net.ckpt", weights_only=True)
    assert saved["step"] == 17
    assert saved["net"]["weight"].isfinite().all()
    # and training goes on from there
    again = tmp_path / "again"
    again.mkdir()
    assert torch.equal(fit(tmp_path), fit(again))


def test_learning_rate_warms_up_holds_and_decays() -> None:
    assert cosine(0, 1000) == pytest.approx(0.01)
    assert cosine(300, 1000, flat=0.5) == 1
    assert cosine(1000, 1000) == pytest.approx(0.02)
