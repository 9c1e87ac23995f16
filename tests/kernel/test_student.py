"""Teacher and student in one network, checked against a full copy."""

from __future__ import annotations

import copy

import pytest
import torch

from expunge.backbones import tiny
from expunge.errors import EmptySelection, Unsupported
from expunge.kernel.descent import Descent, mse
from expunge.kernel.student import Ema


@pytest.mark.parametrize("group", ["cross-attention", "self-attention", "no-cross-attention", "text-readers", "all"])
def test_teacher_equals_a_frozen_copy_and_gradients_stay_right(group: str) -> None:
    model = tiny.model()
    denoiser = model.denoiser
    frozen = copy.deepcopy(denoiser.module)
    g = torch.Generator().manual_seed(0)
    x, t, c = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([100, 800]), model.encode(["a bomb", "cat"])
    student = denoiser.unlock(group)
    opt = Descent(student.weights, lr=1e-2)
    for _ in range(3):
        opt.step(loss=mse(denoiser(x, t, c), torch.zeros(())))
    with torch.no_grad():
        want = denoiser.call(frozen, x, t, c)
    assert not torch.equal(denoiser(x, t, c), want)
    torch.testing.assert_close(denoiser.teacher(x, t, c), want, atol=0, rtol=0)
    # gradient with the teacher asked between forward and backward pass, against one where the copy is the teacher
    grads = []
    for teacher in (denoiser.teacher, lambda *a: denoiser.call(frozen, *a).detach()):
        for p in student.weights.values():
            p.grad = None
        out = denoiser(x, t, c)
        mse(out, teacher(x, t, c)).backward()
        grads.append([p.grad.clone() for p in student.weights.values() if p.grad is not None])
    assert len(grads[0]) > 0
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)
    denoiser.lock()
    assert model.fingerprint() == model.hash or all(
        torch.equal(a, b)
        for a, b in zip(denoiser.module.state_dict().values(), frozen.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_the_root_mean_square_is_of_the_network_s_own_weights(rank: int) -> None:
    denoiser = tiny.model().denoiser
    student = denoiser.unlock("cross-attention", rank, torch.Generator().manual_seed(0))
    own = torch.cat([p.flatten() for n, p in denoiser.module.named_parameters() if n in student.names])
    assert 0 < student.rms == pytest.approx(own.square().mean().sqrt().item(), rel=1e-5)


def test_low_rank_student_starts_as_the_base_and_leaves_no_trace() -> None:
    model = tiny.model()
    denoiser = model.denoiser
    x, t, c = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([100, 800]),
        model.encode("a bomb"),
    )
    base = denoiser.teacher(x, t, c)
    fingerprint = model.fingerprint()
    student = denoiser.unlock("no-cross-attention", rank=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoiser.teacher(x, t, c), base, atol=0, rtol=0)
    Descent(student.weights, lr=1e-2).step(loss=mse(denoiser(x, t, c), torch.zeros(())))
    assert (denoiser(x, t, c).detach() - base).abs().max() > 1e-4
    torch.testing.assert_close(denoiser.teacher(x, t, c), base, atol=0, rtol=0)
    denoiser.lock()
    assert model.fingerprint() == fingerprint
    torch.testing.assert_close(denoiser.teacher(x, t, c), base, atol=0, rtol=0)


def test_swapping_refuses_gradients() -> None:
    student = tiny.model().denoiser.unlock("text-readers")
    with pytest.raises(RuntimeError, match="no_grad"), student.using(student.original):
        pass


def test_unknown_group_names_the_allowed_ones() -> None:
    with pytest.raises(EmptySelection, match="cross-attention.*Did you mean"):
        tiny.model().denoiser.unlock("cros-attention")


def test_a_group_without_layers_has_no_low_rank_update() -> None:
    """A table of classes is no layer that an update could be added to; trained itself it is a group like others."""
    model = tiny.class_model()
    with pytest.raises(EmptySelection, match="rank=2 trains updates of linear .* group 'class-embedding' .* has none"):
        model.denoiser.unlock("class-embedding", rank=2)
    assert model.denoiser.unlock("class-embedding").weights


def test_weights_in_half_precision_are_trained_by_low_rank_updates_alone() -> None:
    """Half the distance to the next number there is more than a step of 1e-4, for every weight of size 0.2 or more."""
    weight = torch.tensor(0.2, dtype=torch.bfloat16)
    assert weight - 1e-4 == weight
    denoiser = tiny.model().denoiser
    denoiser.module.bfloat16()
    with pytest.raises(Unsupported, match="is torch.bfloat16, in which .* Load the model with dtype=torch.float32"):
        denoiser.unlock("text-readers")
    update = denoiser.unlock("text-readers", rank=2).weights
    assert {p.dtype for p in update.values()} == {torch.float32}


def test_dead_loss_is_an_error() -> None:
    student = tiny.model().denoiser.unlock("text-readers")
    with pytest.raises(ValueError, match="no gradient"):
        Descent(student.weights, 1e-3).step(erase=torch.tensor(1.0))


def test_an_update_of_1e_5_is_not_lost() -> None:
    student = tiny.model().denoiser.unlock("text-readers")
    before = student.snapshot()
    Descent(student.weights, lr=1e-5).step(loss=sum((p.sum() for p in student.weights.values()), torch.zeros(())))
    for k, p in student.weights.items():
        torch.testing.assert_close(before[k] - p.detach(), torch.full_like(p, 1e-5), atol=2e-7, rtol=0)


def test_mask_never_moves_what_it_covers() -> None:
    student = tiny.model().denoiser.unlock("text-readers")
    mask = {k: (torch.arange(p.numel()).view_as(p) % 2).float() for k, p in student.weights.items()}
    before = student.snapshot()
    opt = Descent(student.weights, lr=1e-2, mask=mask)
    for _ in range(3):
        opt.step(loss=sum((p.square().sum() for p in student.weights.values()), torch.zeros(())))
    for k, p in student.weights.items():
        moved = before[k] != p.detach()
        assert moved[mask[k] == 1].any()
        assert not moved[mask[k] == 0].any()


def test_a_saved_average_is_taken_over_where_the_weights_are() -> None:
    """A checkpoint is read into main memory, wherever the model is; here the type stands for the device."""
    student = tiny.model().denoiser.unlock("text-readers")
    saved = {k: v.double() + 1 for k, v in student.original.items()}
    ema = Ema(student, decay=0.5)
    ema.load_state_dict(saved)
    assert all(v.dtype == student.weights[k].dtype for k, v in ema.shadow.items())
    assert all(torch.equal(v, saved[k].float()) for k, v in ema.shadow.items())


def test_ema_is_the_weighted_sum_of_the_history() -> None:
    student = tiny.model().denoiser.unlock("text-readers")
    ema = Ema(student, decay=0.5)
    name, p = next(iter(student.weights.items()))
    start = p.detach().clone()
    for k in (1.0, 2.0):
        with torch.no_grad():
            p.copy_(start + k)
        ema.update()
    torch.testing.assert_close(ema.shadow[name], start + 0.5 * 2 + 0.25 * 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [1, 30, 300])
def test_a_long_average_of_a_short_history_forgets_the_first_weights(n: int) -> None:
    """Weights at i + 1 after update i: with the warm-up the average is 0.9 n after n updates, by induction."""
    student = tiny.model().denoiser.unlock("text-readers")
    plain, warm = Ema(student, decay=0.999), Ema(student, decay=0.999)
    name, p = next(iter(student.weights.items()))
    start = p.detach().clone()
    for i in range(n):
        with torch.no_grad():
            p.copy_(start + i + 1)
        plain.update()
        warm.update(i)
    moved = {kind: (ema.shadow[name] - start).mean().item() for kind, ema in (("plain", plain), ("warm", warm))}
    assert moved["plain"] < 0.15 * n
    assert moved["warm"] == pytest.approx(0.9 * n, rel=1e-4)


def test_the_warm_up_ends_at_the_decay() -> None:
    student = tiny.model().denoiser.unlock("text-readers")
    plain, warm = Ema(student, decay=0.5), Ema(student, decay=0.5)
    with torch.no_grad():
        next(iter(student.weights.values())).add_(1)
    # (1 + 8) / (10 + 8) = 0.5
    for i, alike in ((7, False), (8, True), (1000, True)):
        plain.load_state_dict(student.original)
        warm.load_state_dict(student.original)
        plain.update()
        warm.update(i)
        assert all(torch.equal(plain.shadow[k], v) for k, v in warm.shadow.items()) == alike


def test_the_first_trained_layer_may_be_a_norm_in_channels_last_order() -> None:
    """Torch crashes there on the CPU, and takes the process with it."""
    grads = []
    for order in (torch.contiguous_format, torch.channels_last):
        denoiser = tiny.model().denoiser
        denoiser.module.to(memory_format=order)
        hooks = sum(len(m._forward_pre_hooks) for m in denoiser.module.modules())
        student = denoiser.unlock("transformer-blocks")
        x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 800])
        mse(denoiser(x, t, tiny.model().encode(["a bomb", "cat"])), torch.zeros(())).backward()
        grads.append({name: p.grad for name, p in student.weights.items()})
        denoiser.lock()
        assert sum(len(m._forward_pre_hooks) for m in denoiser.module.modules()) == hooks
    norms = [name for name in grads[0] if "attentions.0.norm." in name]
    assert norms
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)
