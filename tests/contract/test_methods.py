"""The contract: every method on every tiny backbone and parameterisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from expunge import door, footprint, sae
from expunge.backbones import tiny, toy
from expunge.backbones.unet import UNetModel
from expunge.concept import Concept
from expunge.edits import Edit, load_edit
from expunge.effort import evaluations
from expunge.errors import ConceptError, NeedsError
from expunge.kernel.model import Model
from expunge.kernel.state import Step
from expunge.methods import METHODS, describe, get
from expunge.records import CHECKPOINT, EDIT

MODELS = {f"toy-{k}": (lambda k=k: toy.model(k)) for k in ("eps", "x0", "v", "flow")}
MODELS |= {f"unet-{p}": (lambda p=p: tiny.model(p)) for p in ("epsilon", "sample", "v_prediction")}
CLASSES = {"class": tiny.class_model}
# methods that change a text encoder itself, which the toy world has not
ENCODERS = ("itd", "fewshot", "tuce")
# these and methods that change how a text is read, or learn a word, refuse a model that reads none
TEXT_ONLY = ("uce", "rece", "speed", "spm", "hfi", *ENCODERS)
CONCEPT = Concept("bomb", templates=("{c}", "a {c}"), keep=("cat",))
OTHER = replace(CONCEPT, name="house", names=("house",))
# its tokenizer takes this for the end of the prompt
MUTE = replace(CONCEPT, name="<|endoftext|>", names=("<|endoftext|>",))
SHORT: dict[str, Any] = {"steps": 2, "batch": 2, "rollouts": 1, "sampling_steps": 3, "lr": 1e-2, "draws": 2}
HOOKED = ("gated", "hook")  # kinds of edits that change no weight
SHORT |= {"maps": 2, "candidates": 3, "every": 1}
SHORT |= {"probe": 0, "fake_lr": 1e-2}
ONE_STEP = {"sfd"}  # their edit is a model of its own, which no LoRA of the base can be


def short(name: str, **changes: Any) -> Any:
    """A method with settings that make it take a moment."""
    method = get(name)
    known = {f.name for f in fields(method)}
    return method(**{k: v for k, v in (SHORT | changes).items() if k in known})


def erase(model: Model, concept: Concept | list[Concept], method: Any, *, seed: int, **rest: Any) -> Edit:
    """Erase; the pictures that a method learns from are drawn from the model."""
    return door.erase(model, concept, method, seed=seed, make_images=3 if method.needs.images else 0, **rest)


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {f"{c}.{n}": p.detach().clone() for c, m in model.modules().items() for n, p in m.named_parameters()}


def case(name: str, backbone: str) -> tuple[Model, Concept, Any]:
    """Return model, concept and method of a row of the table."""
    if backbone in CLASSES:
        return CLASSES[backbone](), replace(CONCEPT, kind="class", templates=()), short(name, group="all")
    return MODELS[backbone](), CONCEPT, short(name)


@pytest.fixture(scope="module", autouse=True)
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Train the tiny text encoder's sparse autoencoder, which ItD is given."""
    path = tmp_path_factory.mktemp("sae") / "sae.safetensors"
    prompts = [f"{a} {b}" for a in ("a", "my", "red", "big", "no") for b in ("cat", "dog", "bomb", "house", "tree")]
    sae.train(tiny.model(), prompts, path, sae.Training(expansion=4, k=4, steps=40, batch=8, lr=1e-2))
    SHORT["sae"] = str(path)


rows = [(n, b) for n in METHODS for b in MODELS if n not in ENCODERS or b.startswith("unet")]
rows += [(n, b) for n in METHODS if n not in TEXT_ONLY for b in CLASSES]
table = pytest.mark.parametrize(("name", "backbone"), rows)
methods = pytest.mark.parametrize("name", METHODS)


def declared(model: Model, method: Any) -> set[str]:
    """Return the names of the parameters that a method says it trains."""
    settings = {f.name: getattr(method, f.name) for f in fields(method)}
    if not method.needs.encoders:
        group = settings.get("group", "text-readers")
        return set(model.denoiser.names("cross-attention" if group == "auto" else group))  # there are no ratings here
    text = model.need_text()
    rules = text.groups[settings.get("part", "mlp")]
    return {n for e, rule in rules.items() for n, _ in model.modules()[e].named_parameters() if rule(n)}


@table
def test_base_comes_back_and_only_declared_weights_change(name: str, backbone: str) -> None:
    model, concept, method = case(name, backbone)
    before, fingerprint = weights(model), model.hash
    edit = erase(model, concept, method, seed=0)
    assert model.fingerprint() == fingerprint
    with edit.on(model):
        changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert changed or edit.kind in HOOKED
    assert {c.partition(".")[2] for c in changed} <= declared(model, method)
    assert model.fingerprint() == fingerprint


@table
def test_same_seed_same_edit(name: str, backbone: str) -> None:
    _, _, method = case(name, backbone)
    one, two, other = (erase(*case(name, backbone), seed=s).tensors() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    # a closed form draws nothing; in the Gaussian world two Adam steps see a gradient's sign, and x_t does not enter it
    if "steps" in {f.name for f in fields(method)} and not backbone.startswith("toy"):
        assert any(not torch.equal(one[k], other[k]) for k in one)


def two_encoders() -> Model:
    """Return the tiny model of two text encoders, with what SDXL tells its network beside their tokens."""
    return UNetModel(tiny.xl_pipeline(), "tiny-xl", sampling=tiny.SAMPLING)


PAIRS = [(n, tiny.model) for n in METHODS]
PAIRS += [(n, two_encoders) for n in ("ap", "spm", "rece", "speed", "ant")]


@pytest.mark.parametrize(("name", "make"), PAIRS, ids=[f"{n}-{make.__name__}" for n, make in PAIRS])
def test_two_concepts_are_both_erased_by_one_edit(name: str, make: Callable[[], Model], tmp_path: Path) -> None:
    """As far as an untrained network can tell: pictures of both change, and an edit of the first alone is another."""
    model, ask = make(), {"prompts": ["a bomb", "a house"], "seeds": [0, 1]}
    base = model.generate(**ask)
    method = short(name, lr=0.05, rollouts=2)
    edit, first = (erase(model, concepts, method, seed=0) for concepts in ([CONCEPT, OTHER], [CONCEPT]))
    assert model.fingerprint() == model.hash
    with edit.on(model):
        both = model.generate(**ask)
    assert ((both - base).abs().amax((1, 2, 3)) > 1e-3).all()
    with first.on(model):
        one = model.generate(**ask)
    assert (both - one)[1].abs().max() > 1e-3
    assert edit.card is not None
    assert [c["name"] for c in edit.card.concepts] == ["bomb", "house"]
    edit.save(tmp_path / "edit.safetensors")
    with load_edit(tmp_path / "edit.safetensors").on(model):
        assert torch.equal(model.generate(**ask), both)


@methods
def test_a_word_that_the_text_encoder_does_not_hear_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything is drawn or trained, also where another concept is heard."""
    model, method, seen = tiny.model(), short(name), list[Step]()
    assert torch.equal(*model.encode(["a <|endoftext|>", "a"]).tokens)
    for concepts in (MUTE, [CONCEPT, MUTE]):
        with pytest.raises(ConceptError, match=r"reads prompts of '<\|endoftext\|>' as it reads them without it"):
            erase(model, concepts, method, seed=0, out=tmp_path / "run", progress=seen.append)
        assert not seen
        assert not (tmp_path / "run").exists()
    assert model.fingerprint() == model.hash


@methods
def test_save_and_load_give_the_same_pictures(name: str, tmp_path: Path) -> None:
    model = tiny.model()
    ask = {"prompts": ["a bomb", "a cat"], "seeds": [0, 1]}
    base = model.generate(**ask)
    edit = erase(model, CONCEPT, short(name, lr=0.05), seed=0)
    with edit.on(model):
        direct = model.generate(**ask)
    assert (direct - base).abs().max() > 1e-3
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.card == edit.card
    with again.on(model):
        assert torch.equal(model.generate(**ask), direct)
    assert torch.equal(model.generate(**ask), base)


@pytest.mark.parametrize("name", [n for n in METHODS if "steps" in {f.name for f in fields(get(n))}])
def test_no_steps_is_the_identity(name: str) -> None:
    model = tiny.model()
    before = weights(model)
    base = model.generate(["bomb"], seeds=[0])
    edit = erase(model, CONCEPT, short(name, steps=0), seed=0)
    with edit.on(model):
        after = weights(model)
        if edit.kind in HOOKED:
            assert torch.equal(model.generate(["bomb"], seeds=[0]), base)
    assert all(torch.equal(after[k], before[k]) for k in before)
    with erase(model, CONCEPT, short(name, steps=1), seed=0).on(model):
        if edit.kind in HOOKED:
            assert not torch.equal(model.generate(["bomb"], seeds=[0]), base)
        else:
            assert any(not torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("rank", [0, 2])
def test_an_edit_that_has_learned_nothing_draws_the_same_pictures(rank: int, tmp_path: Path) -> None:
    """To the bit, read back from its file and applied: neither form of an edit rounds."""
    model = tiny.model()
    ask = {"prompts": ["a bomb", "a cat"], "seeds": [0, 1]}
    base = model.generate(**ask)
    for steps in (0, 1):
        erase(model, CONCEPT, short("esd", rank=rank, steps=steps, lr=0.1), seed=0).save(tmp_path / "edit.safetensors")
        with load_edit(tmp_path / "edit.safetensors").on(model):
            assert torch.equal(model.generate(**ask), base) == (steps == 0)
    assert torch.equal(model.generate(**ask), base)


def nbytes(path: Path) -> int:
    """Bytes of the tensors in a file."""
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(k).nbytes for k in file.keys())  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize(("name", "rank"), [*((n, 0) for n in METHODS), ("esd", 2), ("sfd", 2)])
def test_a_run_takes_no_more_disk_than_was_asked_for(name: str, rank: int, tmp_path: Path) -> None:
    """At its fullest: two checkpoints of the last state and the edit, drawn pictures and texts not counted."""
    model, checkpoints = tiny.model(), list[int]()
    method = short(name, **({"rank": rank} if rank else {}))
    # a membrane each
    concepts = [CONCEPT, OTHER] if name == "spm" else [CONCEPT]

    def look(step: Step) -> None:
        if (tmp_path / CHECKPOINT).is_file() and "drawn" not in step.losses:
            checkpoints.append(nbytes(tmp_path / CHECKPOINT))

    edit = door.erase(
        model, concepts, method, out=tmp_path, save_every=0, progress=look, make_images=3 if method.needs.images else 0
    )
    lora = sum(nbytes(p) for p in (tmp_path / "lora").glob("*"))
    taken = 2 * max(checkpoints) + nbytes(tmp_path / EDIT) + lora
    assert edit.card is not None
    request = {"settings": edit.card.settings, "concepts": edit.card.concepts}
    asked = footprint.needed(model, method, request) - footprint.SLACK
    assert taken <= asked
    if "group" in edit.card.settings:
        assert asked <= 3 * taken


def test_ratings_may_train_every_weight_and_are_given_the_room_for_it() -> None:
    model, method = tiny.model(), get("hfi")()
    settings = {f.name: getattr(method, f.name) for f in fields(method)}

    def asked(**changes: Any) -> int:
        concept = {**asdict(CONCEPT), "images": changes.pop("images", None)}
        return footprint.needed(model, method, {"settings": settings | changes, "concepts": [concept]})

    assert asked() == asked(group="cross-attention") < asked(group="all") == asked(images="study")


@methods
def test_settings_survive_repr_and_card(name: str) -> None:
    method = short(name)
    assert eval(repr(method), {type(method).__name__: type(method)}) == method  # noqa: S307
    card = erase(tiny.model() if name in ENCODERS else toy.model(), CONCEPT, method, seed=3).card
    assert card is not None
    assert type(card).from_json(card.to_json()) == card
    assert type(method)(**card.settings) == method
    assert card.seed == 3


@pytest.mark.parametrize(
    "name", [n for n in METHODS if "rank" in {f.name for f in fields(get(n))} and n not in ONE_STEP]
)
@pytest.mark.parametrize("style", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
def test_low_rank_edit_loads_as_a_lora_and_draws_the_same(name: str, style: str, tmp_path: Path) -> None:
    model = tiny.model()
    ask = {"prompts": ["a bomb", "a cat"], "seeds": [0, 1]}
    base = model.generate(**ask)
    edit = erase(model, CONCEPT, short(name, rank=2, lr=0.1, group="no-cross-attention"), seed=0)
    with edit.on(model):
        ours = model.generate(**ask)
    assert (ours - base).abs().max() > 1e-2
    edit.export_lora(tmp_path)
    model.pipe.load_lora_weights(tmp_path, weight_name=style)
    theirs = model.generate(**ask)
    # merged into the weights here, a separate path there: float32 rounding through the sampler
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)
    model.pipe.unload_lora_weights()
    torch.testing.assert_close(model.generate(**ask), base, atol=0, rtol=0)


def test_edits_of_two_concepts_nest() -> None:
    model = tiny.model()
    one = erase(model, CONCEPT, short("esd", rank=2), seed=0)
    two = erase(model, OTHER, short("esd", rank=2), seed=1)
    before = weights(model)
    with one.on(model), two.on(model):
        both = weights(model)
    with two.on(model), one.on(model):
        swapped = weights(model)
    for k in before:
        torch.testing.assert_close(both[k], swapped[k], atol=1e-6, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


@methods
def test_models_that_a_method_is_listed_for_are_those_it_runs_on(name: str) -> None:
    listed = describe(name)["backbones"]
    assert listed[0] == "text-to-image"
    assert ("class-conditional" in listed) == ((name, "class") in rows)
    assert ("one-step" in listed) == (name in ONE_STEP)


IN_ALL = "{} evaluations of the network, a sample each: "
TRAINED = "{} updates of 8 samples; " + IN_ALL + "{} in updates, "
SAMPLED = "{} to sample what is trained on"
PICTURES = "64 pictures of the concept and as many to retain, given or drawn"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("esd", TRAINED + SAMPLED),
        ("ap", TRAINED + SAMPLED + ", {} to search adversaries"),
        ("salun", TRAINED + "{} for the map of weights; " + PICTURES),
        ("ssd", "no update; " + IN_ALL + "{} for gradients, " + SAMPLED),
        ("uce", "no update; reads 512 prompts to erase and as many to keep at most"),
        ("itd", "no update; reads prompts through a sparse autoencoder, which is trained once"),
    ],
)
def test_costs_are_those_of_the_defaults(name: str, told: str) -> None:
    defaults = {f.name: f.default for f in fields(get(name))}
    parts = [n for n in evaluations(name, defaults).values() if n]
    numbers = [sum(parts), *parts]
    if told.startswith(TRAINED):
        numbers = [defaults["steps"], *numbers]
    assert describe(name)["cost"] == told.format(*(f"{n:,}" for n in numbers))


@pytest.mark.parametrize(
    ("name", "changes"),
    [(n, {}) for n in METHODS] + [("ap", {"adversary": a}) for a in ("gumbel", "pgd")],
)
def test_evaluations_are_counted_not_believed(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a method learns: its pictures are drawn before. What looks at samples meanwhile is left out."""
    model, seen, shown = tiny.model(), [0], door.pictures.shown
    method = short(name, **{"steps": 7, "draws": 7, "rollouts": 2, "every": 2, "ascent": 2, **changes})

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen[0] += len(args[0])

    def begun(*given: Any) -> Any:
        found = shown(*given)
        seen[0] = 0
        return found

    monkeypatch.setattr(door.pictures, "shown", begun)
    model.denoiser.module.register_forward_pre_hook(count, with_kwargs=True)
    erase(model, CONCEPT, method, seed=0)
    settings = {f.name: getattr(method, f.name) for f in fields(method)}
    # closed forms look once, for the layers that read text
    assert seen[0] == sum(evaluations(name, settings, shown=3).values()) + (name in ("rece", "speed", "uce"))


@pytest.mark.parametrize(("name", "backbone"), [(n, "class") for n in TEXT_ONLY] + [(n, "toy-eps") for n in ENCODERS])
def test_methods_for_texts_refuse_a_model_without(name: str, backbone: str) -> None:
    model, concept, method = case(name, backbone)
    before = model.hash
    wanted = "needs a model that reads text" if backbone == "class" else "has no text encoder"
    with pytest.raises(NeedsError, match=wanted):
        erase(model, concept, method, seed=0)
    assert model.fingerprint() == before
