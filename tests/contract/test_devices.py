"""Everything that works on the CPU works where the model lies elsewhere, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge import sae, studies, tokens
from expunge.backbones import tiny, toy
from expunge.backbones.classcond import ClassModel
from expunge.backbones.unet import UNetModel
from expunge.bench import measures
from expunge.concept import Concept
from expunge.edits import Edit, GatedEdit, WeightEdit, load_edit
from expunge.edits.lowrank import compress
from expunge.judges.embedding import embedding
from expunge.kernel.critic import led_away
from expunge.kernel.model import Model, Sampling
from expunge.kernel.saliency import smallest
from expunge.kernel.state import Step
from expunge.methods import METHODS

from ..pretend import Far, accelerator
from ..test_studies import COLD, HOT
from ..test_studies import make as make_study
from .test_methods import CONCEPT, ENCODERS, OTHER, SHORT, erase, short

SAMPLING = Sampling(steps=1, guidance=2.0, size=16)
QUICK = {"steps": 2, "sampling_steps": 2, "maps": 1, "draws": 2}


def on_toy(device: str) -> Model:
    model = toy.model()
    model.network.to(device)
    return model


MODELS: dict[str, Callable[[str], Model]] = {
    "toy": on_toy,
    "tiny": lambda device: UNetModel(tiny.pipeline(window=64).to(device), "tiny", sampling=SAMPLING),
    "xl": lambda device: UNetModel(tiny.xl_pipeline().to(device), "tiny-xl", sampling=SAMPLING),
    "class": lambda device: ClassModel(tiny.class_pipeline().to(device), "tiny", replace(tiny.CLASSES, steps=1)),
}
ROWS: list[tuple[str, str, dict[str, Any]]] = [(n, "toy", {}) for n in METHODS if n not in ENCODERS]
ROWS += [("esd", "toy", {"smallest": 0.3}), ("esd", "toy", {"rank": 1}), ("sfd", "toy", {"probe": 1})]
ROWS += [("ap", "toy", {"adversary": a}) for a in ("gumbel", "pgd")]
ROWS += [(n, "tiny", {"steps": 1}) for n in (*ENCODERS, "neggrad")] + [("uce", "tiny", {"reads": "tokens"})]
ROWS += [("spm", "xl", {"steps": 1}), ("sdd", "class", {"steps": 1, "group": "all"})]


def here_and_there(act: Callable[[str], Any]) -> tuple[Any, Any]:
    """Return what an act gives on the CPU and on the pretend device."""
    here = act("cpu")
    with accelerator() as device:
        return here, act(device)


class Stopped(Exception):
    """Somebody has pulled the plug."""


def stop(step: Step) -> None:
    if "drawn" not in step.losses:
        raise Stopped


def near(x: Tensor) -> Tensor:
    return x.near if isinstance(x, Far) else x


def same(edit: Edit, other: Edit, rounding: float = 0.0) -> None:
    """Two edits are one; the network of `tiny` is computed by other kernels, and Adam's first step is the sign."""
    ours, theirs = edit.tensors(), {k: near(v) for k, v in other.tensors().items()}
    assert ours.keys() == theirs.keys()
    for k, v in ours.items():
        torch.testing.assert_close(theirs[k].detach(), v.detach(), atol=rounding, rtol=0, check_stride=False)
    assert edit.card
    assert other.card
    for k, losses in edit.card.losses.items():
        assert other.card.losses[k] == pytest.approx(losses, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The sparse autoencoder for ItD, trained on the device as on the CPU."""
    folder = tmp_path_factory.mktemp("sae")
    prompts = [f"{a} {b}" for a in ("a", "my", "red", "big", "no") for b in ("cat", "dog", "bomb", "house", "tree")]
    settings = sae.Training(expansion=4, k=4, steps=10, batch=8, lr=1e-2)
    here, there = here_and_there(lambda d: sae.train(MODELS["tiny"](d), prompts, folder / d, settings))
    for name, own in here.saes.items():
        torch.testing.assert_close(near(there.saes[name].encoder), own.encoder, atol=1e-4, rtol=0)
    before, SHORT["sae"] = SHORT.get("sae"), str(folder / "cpu")
    yield
    SHORT["sae"] = before


def test_the_pretend_device_refuses_what_cuda_refuses() -> None:
    x = torch.ones(2, 3)
    with accelerator() as device:
        far, row = x.to(device), torch.tensor([1], device=device)
        for wrong in (
            lambda: far + x,
            lambda: torch.cat([x, far]),
            lambda: x[row],
            lambda: x.add_(far.sum()),
            lambda: torch.randn(2, generator=torch.Generator(), device=device),
        ):
            with pytest.raises(RuntimeError, match="pretend device"):
                wrong()
        with pytest.raises(TypeError, match="pretend device"):
            far.numpy()
        assert torch.equal((far[torch.tensor([1])] + far[[0]] * torch.tensor(2.0)).cpu(), 3 * x[:1])


@pytest.mark.parametrize(("name", "backbone", "changes"), ROWS, ids=str)
def test_a_method_gives_the_same_edit(name: str, backbone: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """On the device interrupted after an update: what comes back from a checkpoint comes back to the device."""
    concepts = [CONCEPT, OTHER] if backbone != "class" else [replace(CONCEPT, kind="class", templates=())]
    method = short(name, **(QUICK | changes))

    def act(device: str) -> tuple[Edit, Tensor]:
        model = MODELS[backbone](device)
        ask: dict[str, Any] = {"prompts": ["bomb"], "seeds": [0], "steps": 1, "guidance": 1.0}
        rest: dict[str, Any] = {"seed": 0, "out": tmp_path / device, "save_every": 0}
        if device != "cpu":
            with pytest.raises(Stopped):
                erase(model, concepts, method, progress=stop, **rest)
        edit = erase(model, concepts, method, resume=device != "cpu", **rest)
        with edit.on(model):
            drawn = model.generate(**ask)
        with load_edit(tmp_path / device).on(model):
            assert torch.equal(model.generate(**ask), drawn)
        return edit, drawn

    (here, drawn), (there, other) = here_and_there(act)
    assert type(other) is Tensor
    same(here, there, 0.0 if backbone == "toy" else 1e-3)
    torch.testing.assert_close(other, drawn, atol=0.0 if backbone == "toy" else 1e-3, rtol=0)


def test_a_study_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures become a word, its reward model a critic; how that is fitted knows nothing of devices."""
    generator = torch.Generator().manual_seed(0)
    images, rates = torch.rand(3, 3, 16, 16, generator=generator), torch.rand(3, generator=generator).double()
    width = embedding()(images[:1]).shape[1]
    said = {"weights": torch.randn(width, generator=generator).tolist(), "bias": 0.0, "low": 0.0, "high": 1.0}
    verdict = studies.Verdict(HOT, COLD, {}, said)
    monkeypatch.setattr(tokens, "STEPS", 2)
    monkeypatch.setattr(studies, "learn", lambda *_: (verdict, images, rates))
    concept = Concept("heat", images=make_study(tmp_path / "study"))
    method = short("hfi", **(QUICK | {"steps": 1, "inversion": 2}))

    def led(device: str) -> tuple[Edit, Tensor]:
        model = MODELS["tiny"](device)
        edit, critic = erase(model, concept, method, seed=0, out=tmp_path / device), studies.critic(verdict, model)
        assert critic
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        t = torch.full((2,), 500, device=device)
        return edit, led_away(model.denoiser, [critic], x, t, model.encode("snow").batch(len(x)), 1.0).cpu()

    (here, clean), (there, other) = here_and_there(led)
    same(here, there, 1e-3)
    torch.testing.assert_close(other, clean, atol=1e-3, rtol=0)


def test_what_is_measured_of_edits() -> None:
    """Those that were made here and those that were read, whatever device they were made on."""

    def act(device: str) -> list[Any]:
        model = MODELS["toy"](device)
        gated = [erase(model, c, short("spm", **QUICK), seed=0) for c in (CONCEPT, OTHER)]
        assert isinstance(gated[0], GatedEdit)
        read = GatedEdit.from_tensors({k: v.detach().cpu() for k, v in gated[1].tensors().items()}, gated[1].card)
        both = GatedEdit.joined([gated[0], read])
        full = erase(model, CONCEPT, short("esd", **QUICK), seed=0)
        assert isinstance(full, WeightEdit)
        stored = WeightEdit({k: v.detach().cpu() for k, v in full.values.items()}, full.card)
        small, lost = compress(stored, model, rank=1)
        z = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
        pruned = WeightEdit(measures.pruned(stored.values, 0.3))
        live = {k: v.detach() for k, v in model.network.named_parameters()}
        changes = [measures.unconditional(model, e, z) for e in (both, full, stored, small, pruned)]
        with both.on(model, transfer=True):
            moved = model.generate(["bomb"], seeds=[0])
        return [*changes, lost, moved.sum().item(), *(m.sum().item() for m in smallest(live, 0.3).values())]

    here, there = here_and_there(act)
    assert there == pytest.approx(here, rel=1e-4, abs=1e-6)
