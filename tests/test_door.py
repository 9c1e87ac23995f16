"""The sealed door: what no method can forget. On a tiny real pipeline; kills are real kills."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from annotated_types import Ge
from PIL import Image

from expunge import checkpoint, door, flags, footprint, methods
from expunge.backbones import tiny
from expunge.concept import Concept, World
from expunge.door import CHECKPOINT, erase
from expunge.edits import Edit, WeightEdit, load_edit
from expunge.errors import BadModel, BadRun, ConceptError, Diverged, NeedsError, PromptCut, SettingError, StorageError
from expunge.kernel.model import Model
from expunge.kernel.state import State, Step
from expunge.methods.base import Needs
from expunge.methods.sfd import SFD
from expunge.records import Run

WINDOW = 64
pytestmark = pytest.mark.usefixtures("one_thread")
# three updates a rollout, so that six updates roll out twice
SHORT: dict[str, Any] = {"batch": 2, "rollouts": 2, "sampling_steps": 3, "reuse": 1}
BOMB = Concept("bomb", anchor="ball", keep=("drum", "pizza"))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdd": ("sdd", {**SHORT, "steps": 6}),
    "sdd-lowrank": ("sdd", {**SHORT, "steps": 6, "rank": 2}),
    "esd": ("esd", {**SHORT, "steps": 6}),
    "uce": ("uce", {}),
    "tuce": ("tuce", {}),
    "ssd": ("ssd", {"draws": 6, "rollouts": 2, "sampling_steps": 3}),
}


def made(case: str) -> Any:
    name, settings = CASES[case]
    return flags.build(methods.get(name), settings)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.model(window=WINDOW)


@pytest.fixture(scope="module")
def undisturbed(model: Model) -> dict[str, Edit]:
    torch.set_num_threads(1)
    return {case: erase(model, BOMB, made(case), seed=5) for case in CASES}


def same(a: Edit, b: Edit) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@dataclass(frozen=True, kw_only=True)
class Fake:
    """A method that walks one weight and can fail in every way."""

    steps: Annotated[int, Ge(0), "updates"] = 5
    nan_at: Annotated[int, Ge(-1), "step of a NaN loss; -1 for never"] = -1
    nan_weight_at: Annotated[int, Ge(-1), "step of a NaN weight under a finite loss"] = -1
    vandal: Annotated[bool, "change the base behind the door's back"] = False
    sae: Annotated[str, "file of an autoencoder"] = ""

    family: ClassVar[str] = "fake"
    needs: ClassVar[Needs] = Needs(text=True)

    def fit(self, model: Model, _targets: Any, state: State) -> Generator[Step, None, Edit]:
        student = state.keep("student", model.denoiser.unlock("text-readers"))
        name, weight = next(iter(student.weights.items()))
        if self.vandal:
            with torch.no_grad():
                model.modules()["text_encoder"].get_parameter("final_layer_norm.weight").add_(1)
        for i in state.steps(self.steps):
            with torch.no_grad():
                weight.add_(torch.rand(weight.shape, generator=state.generator))
                if i == self.nan_weight_at:
                    weight.fill_(float("nan"))
            yield Step(i, self.steps, {"walk": float("nan") if i == self.nan_at else 1.0})
        return WeightEdit({f"unet.{name}": weight.detach().clone()})


@dataclass(frozen=True, kw_only=True)
class Seeing(Fake):
    needs: ClassVar[Needs] = Needs(images=True, autoencoder=True)


@dataclass(frozen=True, kw_only=True)
class Sparse(Fake):
    needs: ClassVar[Needs] = Needs(sae=True)


# ---------------------------------------------------------------------------------------------- what an erasure leaves


@pytest.mark.parametrize("case", CASES)
def test_leaves_the_base_untouched_and_a_whole_run(
    model: Model, undisturbed: dict[str, Edit], tmp_path: Path, case: str
) -> None:
    before, out = model.fingerprint(), tmp_path / "run"
    seen: list[Step] = []
    edit = erase(model, BOMB, made(case), seed=5, out=out, progress=seen.append)
    assert model.fingerprint() == before
    # the seed decides, and neither the folder nor who looks on
    assert same(edit, undisturbed[case])
    run = Run.open(out)
    card = run.card
    assert edit.card == card
    assert (card.method, card.seed, card.base_hash, card.status) == (CASES[case][0], 5, before, "complete")
    assert card.concept["name"] == "bomb"
    assert card.steps == len(seen) == seen[0].n
    assert card.kind == edit.kind
    assert card.seconds > 0
    assert card.peak_bytes > 1e6
    assert {k: len(v) for k, v in card.losses.items()} == dict.fromkeys(seen[0].losses, len(seen))
    assert same(load_edit(run.edit_path), edit)
    lora = {"lora"} if card.kind == "lowrank" else set()
    assert {p.name for p in out.iterdir()} == {"card.json", "edit.safetensors"} | lora
    with edit.on(model):
        assert model.fingerprint() != before
    assert model.fingerprint() == before


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("uce", "tuce")])
def test_another_seed_is_another_edit(model: Model, undisturbed: dict[str, Edit], case: str) -> None:
    assert not same(undisturbed[case], erase(model, BOMB, made(case), seed=6))


def test_several_concepts_share_one_edit(model: Model, tmp_path: Path) -> None:
    edit = erase(model, [Concept("bomb"), Concept("dagger")], made("uce"), out=tmp_path)
    assert edit.card is not None
    assert [c["name"] for c in Run.open(tmp_path).card.concepts] == ["bomb", "dagger"]
    assert not same(edit, erase(model, Concept("bomb"), made("uce")))


def test_retained_prompts_belong_to_one_target_each() -> None:
    model = tiny.model(window=WINDOW)
    model.world = World("toy", ("bomb", "dagger", "pizza"), ("flat",), {}, ("{c}",), ("{c}",))
    targets = door._prepare(model, [Concept("bomb"), Concept("dagger")], Fake(), 0)
    assert [t.keeps for t in targets] == [("pizza", "flat"), ()]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("concept", "method", "error", "message"),
    [
        (Concept(""), Fake(), ConceptError, "is empty"),
        ([], Fake(), ConceptError, "no concept to erase"),
        ([Concept("a"), Concept("a")], Fake(), ConceptError, "given twice"),
        ([Concept("a"), Concept("b", keep=("a",))], Fake(), ConceptError, "erased and to be kept"),
        (Concept("a"), Fake(steps=-1), SettingError, "steps=-1"),
        (Concept("a"), Seeing(), NeedsError, "seeing needs pictures of 'a'.*--images"),
        (Concept("a"), Sparse(), NeedsError, "--set sae"),
    ],
)
def test_refuses_before_any_work(
    model: Model, tmp_path: Path, concept: Any, method: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        erase(model, concept, method, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_gets_the_pictures_it_needs(model: Model, tmp_path: Path) -> None:
    with pytest.raises(NeedsError):
        erase(model, Concept("a", images=tmp_path), Seeing())
    Image.new("RGB", (16, 16)).save(tmp_path / "a.PNG")
    assert erase(model, Concept("a", images=tmp_path), Seeing()).tensors()


def test_a_refusal_by_the_method_itself_leaves_nothing_in_the_way(model: Model, tmp_path: Path) -> None:
    many = flags.build(methods.get("esd"), {**SHORT, "steps": 2, "batch": 13})
    with pytest.raises(SettingError, match="batch=13 is more than the bank gives"):
        erase(model, BOMB, many, out=tmp_path / "run")
    assert erase(model, BOMB, replace(many, batch=12, rollouts=4), out=tmp_path / "run").tensors()


def test_gradients_may_be_off_where_it_is_called(model: Model, undisturbed: dict[str, Edit]) -> None:
    with torch.no_grad():
        assert same(erase(model, BOMB, made("sdd"), seed=5), undisturbed["sdd"])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_absurd_seeds(model: Model, seed: int) -> None:
    with pytest.raises(SettingError, match="out of range"):
        erase(model, Concept("a"), Fake(), seed=seed)


def test_a_folder_with_files_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    for resume in (False, True):
        with pytest.raises(BadRun, match=r"not empty|holds files"):
            erase(model, Concept("a"), Fake(), out=tmp_path, resume=resume)
    assert os.listdir(tmp_path) == ["mine.txt"]
    with pytest.raises(BadRun, match="is a file"):
        erase(model, Concept("a"), Fake(), out=tmp_path / "mine.txt")


def test_an_edited_model_is_refused(model: Model) -> None:
    edit = erase(model, Concept("a"), Fake())
    with edit.on(model), pytest.raises(BadModel, match="an edit is applied"):
        erase(model, Concept("a"), Fake())


def test_a_vandal_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="a bug of the method"):
        erase(tiny.model(window=WINDOW), Concept("a"), Fake(vandal=True), out=tmp_path)
    assert not (tmp_path / "card.json").exists()


def test_says_what_of_a_prompt_is_cut() -> None:
    short = tiny.model(window=16)
    with pytest.warns(PromptCut, match="does not see 'tail'"):
        erase(short, Concept("0123456789abcdtail", templates=("{c}",)), Fake())
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptCut)
        erase(short, Concept("0123456789abcd", templates=("{c}",), anchor="abcd0123456789", keep=("x",)), Fake())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"anchor": "0123456789abcdtail"}, "1 of 1 anchor prompts of 'ab' are longer .*Of '0123456789abcdtail' "),
        ({"keep": ("0123456789abcdtail",)}, "5 of 5 kept prompts of 'ab' are longer .*Of '0123456789abcdtail' "),
        (
            {
                "names": ("ab", "fedcba9876543210head"),
                "anchor": "a very long anchor",
                "keep": ("long enough to cut", "x"),
            },
            "1 of 2 prompts and 2 of 2 anchor prompts and 5 of 10 kept prompts of 'ab' are longer .*Of 'fedcba98",
        ),
    ],
)
def test_says_which_kind_of_prompt_is_cut(words: dict[str, Any], told: str) -> None:
    concept = Concept("ab", templates=("{c}",), **words)
    with pytest.warns(PromptCut) as warned:
        erase(tiny.model(window=16), concept, Fake())
    assert len(warned) == 1
    assert re.search(told, str(warned[0].message))


def test_one_prompt_that_tells_the_concept_is_enough() -> None:
    """The others end before its word."""
    short, far = tiny.model(window=16), "0123456789abcdef {c}"
    with pytest.warns(PromptCut):
        erase(short, Concept("bomb", templates=(far, "{c}")), Fake())
    with pytest.warns(PromptCut), pytest.raises(ConceptError, match="reads prompts of 'bomb' as it reads them without"):
        erase(short, Concept("bomb", templates=(far,)), Fake())


# ------------------------------------------------------------------------------------------------------- NaN, full disk


@pytest.mark.parametrize("method", [Fake(nan_at=3), Fake(nan_weight_at=3), Fake(nan_weight_at=4)])
def test_divergence_stops_and_keeps_the_last_good_state(model: Model, tmp_path: Path, method: Fake) -> None:
    before, step = model.fingerprint(), max(method.nan_at, method.nan_weight_at)
    with pytest.raises(Diverged, match=f"at step {step}.*after {step} steps, lies in .*{CHECKPOINT}") as caught:
        erase(model, Concept("a"), method, out=tmp_path, save_every=0)
    assert caught.value.step == step
    assert model.fingerprint() == before
    state = checkpoint.load(tmp_path / CHECKPOINT)
    assert state["done"] == step
    assert checkpoint.finite(state)
    assert Run.open(tmp_path).card.status == f"diverged at step {step}"
    assert not (tmp_path / "edit.safetensors").exists()


def test_nan_inside_a_real_method_is_noticed() -> None:
    broken, calls = tiny.model(window=WINDOW), [0]

    def poison(_module: Any, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return out * float("nan") if calls[0] > 12 else out

    broken.denoiser.module.get_submodule("conv_out").register_forward_hook(poison)
    with pytest.raises(Diverged, match=r"the loss 'distil' was NaN.*No --out was given") as caught:
        erase(broken, Concept("bomb"), made("sdd"))
    assert caught.value.step > 0


@pytest.mark.parametrize("limit", [256, 8_000])
def test_a_full_disk_leaves_nothing_half_written(model: Model, tmp_path: Path, limit: int) -> None:
    """256 bytes do not hold the first checkpoint, 8,000 hold it and not the edit. The failure is the kernel's own."""
    before, (soft, hard) = model.fingerprint(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError, match="the disk is full"):
            erase(model, BOMB, made("uce"), out=tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert model.fingerprint() == before
    left = os.listdir(tmp_path / "run")
    assert left == ([] if limit == 256 else [CHECKPOINT])
    # with room again the run goes on
    assert same(erase(model, BOMB, made("uce"), out=tmp_path / "run", resume=True), erase(model, BOMB, made("uce")))


def test_too_small_a_disk_is_refused_first(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "needed", lambda *_: 2**60)
    with pytest.raises(StorageError, match="not enough disk space"):
        erase(model, Concept("a"), Fake(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------- kill and resume

# One process imports torch and forks a child a kill: a fresh import each would take most of the suite's time.
KILLER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_door import BOMB, WINDOW, made
import torch
from expunge import storage
from expunge.backbones import tiny
from expunge.door import erase
torch.set_num_threads(1)
# what is imported on first use is imported here, once; closed form, because autograd's threads do not survive a fork
erase(tiny.model(window=WINDOW), BOMB, made("uce"))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(out, case, moment):
    kind, _, n = moment.partition(":")
    n, every, count, real = int(n), 0.0, [0], os.replace
    def replace(a, b):
        count[0] += 1
        if kind == "before" and count[0] == n:
            die()
        real(a, b)
        if kind == "after" and count[0] == n:
            die()
    storage.os.replace = replace
    def progress(step):
        if kind in ("step", "late") and step.i == n:
            die()
    every = 1e9 if kind == "late" else 0.0
    erase(tiny.model(window=WINDOW), BOMB, made(case), seed=5, out=out, save_every=every, progress=progress)
    os._exit(0)

for case, moment in (job.split("/") for job in sys.argv[3:]):
    if not (pid := os.fork()):
        try:
            child(Path(sys.argv[2]) / f"{case}-{moment}", case, moment)
        finally:
            os._exit(1)
    print(case, moment, os.waitpid(pid, 0)[1])
"""

# step: right after a checkpoint; late: long after one; before, after: around the n-th file's appearance, so that the
# first checkpoint (1), the edit (8) and the card (9) are all met while they are being written; what lies there after
# the n-th file and before the next differs only by the half-written one
MOMENTS = {
    "sdd": ["step:0", "step:3", "late:4", "before:1", "before:8", "before:9", "after:9"],
    "sdd-lowrank": ["step:1", "step:4", "after:8"],
    "esd": ["step:2", "late:3"],
    "uce": ["after:1", "step:0", "before:3"],
    "tuce": ["step:0", "before:3"],
    "ssd": ["step:3", "late:2"],
}  # fmt: skip
JOBS = [f"{case}/{moment}" for case, moments in MOMENTS.items() for moment in moments]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(folder), *JOBS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    statuses = [line.split()[-1] for line in done.stdout.splitlines()]
    assert statuses == ["9"] * len(JOBS), done.stdout + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_resumes_bit_identically_after_kill_9(
    model: Model, undisturbed: dict[str, Edit], killed: Path, job: str
) -> None:
    case, _, moment = job.partition("/")
    out = killed / f"{case}-{moment}"
    wanted, seen = undisturbed[case], list[Step]()
    resumed = erase(model, BOMB, made(case), seed=5, out=out, resume=True, progress=seen.append)
    assert same(wanted, resumed)
    assert same(wanted, load_edit(Run.open(out).edit_path))
    assert (out / CHECKPOINT).exists() is False
    assert list(out.glob(".*.tmp")) == []
    card = Run.open(out).card
    assert wanted.card is not None
    assert (card.status, card.steps, card.losses) == ("complete", wanted.card.steps, wanted.card.losses)
    if moment == "step:3":
        # the kill fell after the fourth update's checkpoint
        assert [s.i for s in seen] == [4, 5]


@dataclass
class Clock:
    """Stops a run by an exception at some step, as a cheap stand-in for a kill."""

    at: int
    seen: list[int] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        self.seen.append(step.i)
        if step.i == self.at:
            raise KeyboardInterrupt


def interrupted(model: Model, out: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        erase(model, Concept("bomb"), Fake(), out=out, save_every=0, progress=Clock(2), **options)


def test_an_interrupt_restores_the_base_and_can_go_on(model: Model, tmp_path: Path) -> None:
    before = model.fingerprint()
    interrupted(model, tmp_path)
    assert model.fingerprint() == before
    with pytest.raises(BadRun, match=r"--resume to go on with the interrupted run"):
        erase(model, Concept("bomb"), Fake(), out=tmp_path)
    clock = Clock(-1)
    edit = erase(model, Concept("bomb"), Fake(), out=tmp_path, resume=True, progress=clock)
    assert clock.seen == [3, 4]
    assert same(edit, erase(model, Concept("bomb"), Fake()))


def test_interrupted_again_before_the_next_checkpoint_loses_nothing(model: Model, tmp_path: Path) -> None:
    interrupted(model, tmp_path)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        erase(model, Concept("bomb"), Fake(), out=tmp_path, resume=True, save_every=1e9, progress=Clock(3))
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    edit = erase(model, Concept("bomb"), Fake(), out=tmp_path, resume=True)
    assert same(edit, erase(model, Concept("bomb"), Fake()))


@pytest.mark.parametrize(
    ("concept", "method", "seed", "message"),
    [
        (Concept("bomb"), Fake(), 1, "seed: 0 then, 1 now"),
        (Concept("bomb"), Fake(steps=9), 0, "setting steps: 5 then, 9 now"),
        (Concept("bomb"), Seeing(), 0, "method: 'fake' then, 'seeing' now"),
        (Concept("dagger"), Fake(), 0, "concept: bomb then, dagger now"),
        (Concept("bomb", anchor="ball"), Fake(), 0, "other details"),
    ],
)
def test_another_run_is_not_resumed(
    model: Model, tmp_path: Path, concept: Concept, method: Fake, seed: int, message: str
) -> None:
    interrupted(model, tmp_path / "run")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"")
    concept = replace(concept, images=pictures) if isinstance(method, Seeing) else concept
    with pytest.raises(BadRun, match=message):
        erase(model, concept, method, seed=seed, out=tmp_path / "run", resume=True)


def test_another_base_is_not_resumed(model: Model, tmp_path: Path) -> None:
    interrupted(model, tmp_path)
    with pytest.raises(BadRun, match="base_hash"):
        erase(tiny.model(window=WINDOW, seed=1), Concept("bomb"), Fake(), out=tmp_path, resume=True)


def test_a_finished_run_is_given_back(model: Model, tmp_path: Path) -> None:
    edit = erase(model, Concept("bomb"), Fake(), out=tmp_path)
    clock = Clock(-1)
    assert same(edit, erase(model, Concept("bomb"), Fake(), out=tmp_path, resume=True, progress=clock))
    assert clock.seen == []
    with pytest.raises(BadRun, match="seed"):
        erase(model, Concept("bomb"), Fake(), seed=1, out=tmp_path, resume=True)


def test_only_a_run_that_can_go_on_keeps_its_state(model: Model, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="keep_state is for methods that can go on to more steps, not for fake"):
        erase(model, Concept("bomb"), Fake(), out=tmp_path / "run", keep_state=True)
    assert not (tmp_path / "run").exists()
    method = {"steps": 1, "batch": 2, "probe": 0, "guidance": 1.0}
    concept = Concept("bomb", anchor="cat", keep=("dog",))
    whole = erase(model, concept, SFD(**method | {"steps": 2}))
    for keep in (False, True):
        out = tmp_path / str(keep)
        erase(model, concept, SFD(**method), out=out, keep_state=keep)
        assert (out / CHECKPOINT).exists() == keep
    assert same(erase(model, concept, SFD(**method | {"steps": 2}), out=out, resume=True), whole)
    assert not (out / CHECKPOINT).exists()


def test_nothing_to_resume_without_a_folder(model: Model) -> None:
    with pytest.raises(BadRun, match="without a folder"):
        erase(model, Concept("bomb"), Fake(), resume=True)


def test_a_broken_checkpoint_is_told(model: Model, tmp_path: Path) -> None:
    interrupted(model, tmp_path)
    data = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(BadRun, match="cannot be read"):
        erase(model, Concept("bomb"), Fake(), out=tmp_path, resume=True)
