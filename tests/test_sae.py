"""Training, keeping and finding a model's sparse autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from expunge import sae
from expunge.backbones import tiny, toy
from expunge.backbones.unet import UNetModel
from expunge.cli.sae import sae as command
from expunge.concept import World
from expunge.errors import BadRun, Diverged, NeedsError, SettingError
from expunge.kernel.model import Sampling
from expunge.kernel.state import Step

MODELS: dict[str, Callable[[], UNetModel]] = {
    "one encoder": tiny.model,
    "two encoders": lambda: UNetModel(tiny.xl_pipeline(), "xl", sampling=Sampling(2, 3.0, 16)),
}
models = pytest.mark.parametrize("name", MODELS)
PROMPTS = [
    f"{a} {b}" for a in ("a", "my", "red", "big", "no") for b in ("cat", "dog", "bomb", "house", "dagger", "tree")
]
APP = typer.Typer()
APP.command()(command)
SHORT = sae.Training(expansion=4, k=4, steps=12, batch=8, lr=1e-2, patience=3)


class Killed(Exception):
    """A process's end."""


def trained(out: Path, model: UNetModel | None = None, **options: Any) -> sae.Dictionary:
    return sae.train(model or tiny.model(), PROMPTS, out, SHORT, **options)


@models
def test_it_learns_what_the_layer_puts_out_and_leaves_the_model_alone(name: str, tmp_path: Path) -> None:
    model, losses = MODELS[name](), list[float]()
    before = model.hash
    found = trained(tmp_path / "sae", model, progress=lambda step: losses.append(step.losses["error"]))
    assert found.saes.keys() == model.soft.encoders.keys()
    assert losses[-1] < losses[0] / 2
    again = sae.explained(model, found.layers, found.saes, found.held)
    assert again == {e: f["explained"] for e, f in found.figures.items()}
    assert model.fingerprint() == before
    assert not set(found.held) - set(PROMPTS)
    assert len(found.held) == 3


def test_states_are_the_layers_own() -> None:
    """The state after the last layer, normalised, is what the denoiser gets."""
    model = tiny.model()
    h = sae.states(model, {"text_encoder": 1}, PROMPTS[:3])["text_encoder"]
    tokens = model.encode(PROMPTS[:3]).tokens
    assert not torch.allclose(h, tokens)
    torch.testing.assert_close(model.pipe.text_encoder.final_layer_norm(h), tokens)


@models
def test_a_file_holds_what_was_trained_in_half_precision(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    made = trained(tmp_path / "sae", model)
    read = sae.Dictionary.read(tmp_path / "sae")
    assert (read.layers, read.base, read.held, read.figures) == (made.layers, made.base, made.held, made.figures)
    for encoder, ours in made.saes.items():
        theirs = read.saes[encoder]
        assert theirs.k == ours.k
        for n, p in theirs.named_parameters():
            assert torch.equal(p, dict(ours.named_parameters())[n].half().float())
    assert sae.find(model, str(tmp_path / "sae")).base == made.base


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    trained(whole)

    def kill(step: Step) -> None:
        if step.i == 7:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path / "killed", progress=kill, save_every=0)
    assert not (tmp_path / "killed").exists()
    trained(tmp_path / "killed", resume=True)
    assert (tmp_path / "killed").read_bytes() == whole.read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["killed", "whole"]
    assert trained(whole, resume=True, progress=kill).layers == {"text_encoder": 1}
    other = tmp_path / "other"
    trained(other, seed=1)
    assert other.read_bytes() != whole.read_bytes()


def test_another_training_is_neither_overwritten_nor_continued(tmp_path: Path) -> None:
    def kill(_: Step) -> None:
        raise Killed

    out = tmp_path / "sae"
    with pytest.raises(Killed):
        trained(out, progress=kill, save_every=0)
    with pytest.raises(BadRun, match=r"sae\.part is in the way.*--resume"):
        trained(out)
    with pytest.raises(BadRun, match="another training: other seed"):
        trained(out, resume=True, seed=1)
    trained(out, resume=True)
    with pytest.raises(BadRun, match=r"sae is in the way"):
        trained(out)
    with pytest.raises(BadRun, match="other text encoders"):
        trained(out, tiny.model(seed=1), resume=True)


def test_bad_input_is_told_before_any_training(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    with pytest.raises(NeedsError, match="2 different prompts are too few"):
        sae.train(tiny.model(), ["a", "a", "b"], out)
    with pytest.raises(SettingError, match="depth"):
        sae.train(tiny.model(), PROMPTS, out, sae.Training(depth=2))
    with pytest.raises(NeedsError, match="'toy' has no text encoder"):
        sae.train(toy.model(), PROMPTS, out)
    assert not list(tmp_path.iterdir())


def test_divergence_stops_the_training(tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.soft.layers["text_encoder"][0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(Diverged, match="'error' was NaN or infinite at step 0"):
        trained(tmp_path / "sae", model)


def test_it_is_found_beside_the_weights_and_refused_for_others(tmp_path: Path) -> None:
    from expunge.backbones import load

    folder = tiny.save(tmp_path / "model")
    model = load(folder)
    with pytest.raises(NeedsError, match=r"no sparse autoencoder beside the weights.*expunge sae .*--prompts FILE"):
        sae.find(model, "")
    made = trained(folder / sae.FILE, tiny.model())
    assert sae.find(model, "").base == made.base
    with pytest.raises(NeedsError, match=r"trained on other text encoders.*--prompts FILE`, then --set sae="):
        sae.find(tiny.model(seed=1), str(folder / sae.FILE))
    with pytest.raises(NeedsError, match="no sparse autoencoder at nowhere"):
        sae.find(model, "nowhere")


@pytest.mark.parametrize("content", [b"", b"no tensors", None, {}, {sae.FORMAT: "[]"}, {sae.FORMAT: '{"k": {"e": 2}}'}])
def test_a_broken_file_is_refused(content: bytes | dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "sae"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({"a": torch.zeros(1)}, path, content)
    with pytest.raises(NeedsError, match="holds no sparse autoencoder"):
        sae.Dictionary.read(path)


def test_a_worlds_prompts_name_everything_in_every_style() -> None:
    world = World("w", ("cat", "dog"), ("ink",), {"cat": ("puss",)}, ("{c}", "{c} in {x}"), ())
    assert sorted(sae.known(world)) == ["cat", "cat in ink", "dog", "dog in ink", "puss", "puss in ink"]


def test_the_command_trains_and_says_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    out, prompts = tmp_path / "sae.safetensors", f"--prompts={tmp_path / 'prompts.txt'}"
    settings = [f"--set={k}={getattr(SHORT, k)}" for k in ("expansion", "k", "steps", "batch", "lr", "patience")]
    done = CliRunner().invoke(APP, ["tiny", "--out", str(out), prompts, *settings])
    assert done.exit_code == 0, done.output
    assert "of the variance of 3 held-out prompts explained" in done.output
    assert out.read_bytes() == (trained(tmp_path / "ours"), (tmp_path / "ours").read_bytes())[1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "'tiny' can draw is not known"),
        (["--prompts=nowhere"], "nowhere cannot be read"),
        (["--set=feature=3"], "unknown setting 'feature' of Training"),
        (["--set=k=0"], "k=0 of Training is refused"),
    ],
)
def test_the_command_tells_what_is_wrong(extra: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(APP, ["tiny", "--out", str(tmp_path / "sae"), *extra])
    assert done.exit_code != 0
    assert message in str(done.exception)
