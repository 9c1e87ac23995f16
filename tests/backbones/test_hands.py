"""Pictures drawn by several threads are those that one thread draws."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from expunge.backbones import hands, tiny
from expunge.backbones.unet import UNetModel
from expunge.kernel.model import Sampling

PROMPTS = [f"prompt {i}" for i in range(7)]
CPU = torch.device("cpu")


def with_memory() -> UNetModel:
    """Return a model whose scheduler keeps what it saw in earlier steps, as DDIM does not."""
    model = tiny.model()
    model.pipe.scheduler = DPMSolverMultistepScheduler.from_config(model.pipe.scheduler.config)
    return model


MODELS: dict[str, Any] = {
    "one encoder": tiny.model,
    "two encoders": lambda: UNetModel(tiny.xl_pipeline(), "xl", sampling=Sampling(2, 3.0, 16)),
    "a scheduler that remembers": with_memory,
}


@pytest.fixture(autouse=True)
def cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def drawn_by(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the threads that draw."""
    names, each = set[str](), hands.each

    def watched(draw: Any, *rest: Any) -> Iterator[Tensor]:
        def noted(pipe: Any, i: int) -> Tensor:
            names.add(threading.current_thread().name)
            pictures: Tensor = draw(pipe, i)
            return pictures

        return each(noted, *rest)

    monkeypatch.setattr(hands, "each", watched)
    return names


# numpy 2 about a line of diffusers'
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_threads_draw_what_one_draws(name: str, drawn_by: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = MODELS[name](), list[int]()
    monkeypatch.setattr(hands, "TOGETHER", 2)
    scheduler = model.pipe.scheduler
    several = model.generate(PROMPTS, seeds=range(7), steps=3, progress=told.append)
    assert threading.main_thread().name not in drawn_by
    assert told == [2, 2, 2, 1]
    assert torch.get_num_threads() == 2
    assert model.pipe.scheduler is scheduler
    drawn_by.clear()
    alone = model.generate(PROMPTS, seeds=range(7), steps=3, batch=1)
    torch.testing.assert_close(several, alone, atol=1e-5, rtol=0)
    torch.set_num_threads(1)
    assert torch.equal(several, model.generate(PROMPTS, seeds=range(7), steps=3, batch=2))
    assert threading.main_thread().name in drawn_by
    assert not torch.equal(several, several.flip(0))


def test_what_remembers_belongs_to_one_thread(drawn_by: set[str]) -> None:
    model = tiny.model()
    model.generate(PROMPTS, seeds=range(7), steps=1)
    assert threading.main_thread().name not in drawn_by
    drawn_by.clear()
    handle = model.pipe.unet.mid_block.register_forward_hook(lambda *_: None)
    model.generate(PROMPTS, seeds=range(7), steps=1)
    assert drawn_by == {threading.main_thread().name}
    handle.remove()


def test_prompts_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft token's hook keeps what it saw until the embedding has been looked up."""
    model, inside, most = tiny.model(), list[int](), list[int]()
    read = model.pipe.encode_prompt

    def slowly(*args: Any, **options: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)
        inside.pop()
        return read(*args, **options)

    monkeypatch.setattr(model.pipe, "encode_prompt", slowly)
    vectors = {n: torch.randn(2, d, generator=torch.Generator().manual_seed(0)) for n, d in model.soft.widths.items()}
    prompts = [f"{'<x>' * (i % 3)} {i}" for i in range(12)]
    with model.soft.tokens({"<x>": vectors}):
        several = model.generate(prompts, seeds=range(12), steps=2)
        assert most == [1, 1]
        torch.set_num_threads(1)
        alone = model.generate(prompts, seeds=range(12), steps=2)
    torch.testing.assert_close(several, alone, atol=1e-5, rtol=0)


def test_a_failure_in_a_thread_is_raised_and_threads_are_given_back() -> None:
    def draw(_: Any, i: int) -> Tensor:
        raise ValueError(f"picture {i}")

    with pytest.raises(ValueError, match="picture 0"):
        list(hands.each(draw, tiny.pipeline(), [0, 1], 2))
    assert torch.get_num_threads() == 2


def test_large_pictures_and_accelerators_are_left_alone() -> None:
    small, large = (4, 16, 16), (4, 64, 64)
    assert hands.split(64, 32, small, CPU) == (16, 2)
    assert hands.split(1, 32, small, CPU) == (1, 1)
    assert hands.split(3, 32, small, CPU) == (2, 2)
    assert hands.split(64, 4, small, CPU) == (4, 2)
    assert hands.split(0, 32, small, CPU) == (1, 1)
    assert hands.split(64, 32, large, CPU) == (32, 1)
    assert hands.split(64, 32, small, torch.device("cuda")) == (32, 1)
    torch.set_num_threads(1)
    assert hands.split(64, 32, small, CPU) == (32, 1)
