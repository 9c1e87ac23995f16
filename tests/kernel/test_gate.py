"""Gates that read encodings, and the membranes that they open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from expunge.backbones import tiny
from expunge.errors import ConceptError, Unsupported
from expunge.kernel.gate import Gate, Membranes, planted
from expunge.kernel.lowrank import product

EXACT = 1e-5  # float32 values of order 1
NEUTRAL = ["a cat", "cat", "a dog", "dog", "a", ""]


@pytest.fixture
def model() -> tiny.UNetModel:
    return tiny.model()


def gate(model: tiny.UNetModel, word: str = "bomb") -> Gate:
    return Gate.between(model.encode([word, f"a {word}"]).tokens, model.encode(NEUTRAL).tokens)


def test_neutral_prompts_close_the_gate_exactly_and_the_concept_opens_it(model: tiny.UNetModel) -> None:
    read = gate(model)
    assert read(model.encode(["bomb", "a bomb"]).tokens).tolist() == [1, 1]
    for batch in (NEUTRAL, NEUTRAL[:1], NEUTRAL * 5):
        assert read(model.encode(batch).tokens).eq(0).all()


def test_between_closed_and_open_the_gate_is_linear() -> None:
    read = Gate(torch.eye(2)[:1], closed=0.5)
    angles = torch.tensor([0.4, 0.5, 0.55, 0.625, 0.75, 1.0])
    c = torch.stack([angles, (1 - angles**2).sqrt()], 1)[:, None]
    torch.testing.assert_close(read(c), torch.tensor([0, 0, 0.2, 0.5, 1.0, 1.0]), atol=EXACT, rtol=0)


def test_a_concept_that_reads_like_what_is_kept_is_refused(model: tiny.UNetModel) -> None:
    c = model.encode(["a cat"]).tokens
    with pytest.raises(ConceptError, match="no gate can tell"):
        Gate.between(c, model.encode(NEUTRAL).tokens)
    # one prompt that has lost its word does not spoil the gate of the others
    assert Gate.between(model.encode(["a cat", "bomb"]).tokens, model.encode(NEUTRAL).tokens).closed < 1


class Net(nn.Module):
    """Called as the Gaussian world is: the encoding is a positional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 5), nn.Conv2d(3, 6, 3, padding=1, stride=2)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(tokens), self.conv(x)


@pytest.fixture
def net() -> Iterator[tuple[Net, Membranes, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    module = Net()
    factors = planted(module, ["linear.weight", "linear.bias", "conv.weight"], 2, g)
    with torch.no_grad():
        for _, up in factors.values():
            up.copy_(torch.randn(up.shape, generator=g))
    tokens = torch.eye(4).repeat(3, 1, 1)[:, :2]
    membranes = Membranes(module, factors, [Gate(torch.eye(4)[[i]], 0.5) for i in (0, 3)])
    yield module, membranes, torch.randn(3, 3, 8, 8, generator=g), tokens
    membranes.close()


@torch.no_grad()
def test_updates_add_up_linearly_and_without_cross_terms(net: tuple[Net, Membranes, Tensor, Tensor]) -> None:
    """Each sample gets sum_k gamma_k up_k down_k: once gamma, and no membrane's down through another's up."""
    module, membranes, x, tokens = net
    rows = torch.tensor([[1.0, 0.0], [0.25, 0.5], [0.0, 0.0]])
    with membranes.under(None):
        base = module(x, tokens)
    with membranes.under(rows):
        out = module(x, tokens)
    assert set(membranes.factors) == {"linear.weight", "conv.weight"}
    for name, before, after, apply in (
        ("linear.weight", base[0], out[0], lambda w: nn.functional.linear(tokens, w)),
        ("conv.weight", base[1], out[1], lambda w: nn.functional.conv2d(x, w, None, 2, 1)),
    ):
        down, up = membranes.factors[name]
        ones = [apply(product(down[[k]], up[:, [k]])) for k in range(2)]
        assert (after - before).abs().max() > 0.1
        for i, (g0, g1) in enumerate(rows.tolist()):
            torch.testing.assert_close(after[i] - before[i], g0 * ones[0][i] + g1 * ones[1][i], atol=EXACT, rtol=0)
        assert torch.equal(after[2], before[2])


@torch.no_grad()
def test_the_network_s_own_encoding_decides_unless_told(net: tuple[Net, Membranes, Tensor, Tensor]) -> None:
    module, membranes, x, tokens = net
    with membranes.under(None):
        base = module(x, tokens)[1]
    told = module(x, torch.zeros_like(tokens))[1]
    assert torch.equal(told, base)
    with membranes.under(torch.tensor([[1.0, 0.0]] * 3)):
        wanted = module(x, tokens)[1]
    assert not torch.equal(wanted, base)
    assert torch.equal(module(x, tokens)[1], wanted)


def test_a_network_that_is_called_without_an_encoding_is_refused(net: tuple[Net, Membranes, Tensor, Tensor]) -> None:
    module, _, x, _ = net
    with pytest.raises(Unsupported, match="0 inputs of Net look like it"):
        module(x, torch.zeros(3, 4))


def test_planted_membranes_change_nothing(model: tiny.UNetModel) -> None:
    c = model.encode(["bomb", "a cat"])
    x, t = torch.randn(2, *model.denoiser.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 20])
    base = model.denoiser(x, t, c)
    names = model.denoiser.names("transformer-blocks")
    factors = planted(model.denoiser.module, names, 1, torch.Generator().manual_seed(0))
    membranes = Membranes(model.denoiser.module, factors, [gate(model)])
    assert torch.equal(model.denoiser(x, t, c), base)
    with torch.no_grad():
        for _, up in factors.values():
            up.fill_(0.1)
    moved = (model.denoiser(x, t, c) - base).detach().abs().amax((1, 2, 3))
    assert moved[0] > 1e-3
    assert moved[1] == 0
    membranes.close()
    assert torch.equal(model.denoiser(x, t, c), base)
