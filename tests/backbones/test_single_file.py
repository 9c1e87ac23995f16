"""Single-file checkpoints: the key layout of the original release, read back to the same model bit for bit.

The layout is written here from the names that released checkpoints hold, in the direction opposite to the loader's.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import expunge
from expunge import cli
from expunge.backbones import tiny
from expunge.errors import BadModel
from expunge.records import Run

State = dict[str, torch.Tensor]

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
RESIDUAL = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the original layout


def original_unet(unet: Any) -> State:
    """Name a U-Net's tensors by place in three flat lists: input blocks, middle block, output blocks."""
    state, layers = unet.state_dict(), unet.config.layers_per_block + 1

    def name(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        if module in ENDS:
            return f"{ENDS[module]}.{leaf}"
        side, b, part, j, rest = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", key).groups()
        b, j, column = int(b or 0), int(j), int(part == "attentions")
        if part == "resnets":
            inner, _, leaf = rest.rpartition(".")
            rest = f"{RESIDUAL[inner]}.{leaf}"
        if side == "mid":
            return f"middle_block.{2 * j + column}.{rest}"
        if part == "downsamplers":  # a block of its own after the level
            return f"input_blocks.{(b + 1) * layers}.0.{rest.replace('conv', 'op')}"
        if part == "upsamplers":  # in the level's last block, behind its attention if it has one
            behind = 2 if any(k.startswith(f"up_blocks.{b}.attentions.") for k in state) else 1
            return f"output_blocks.{b * layers + layers - 1}.{behind}.{rest}"
        return f"{'output' if side == 'up' else 'input'}_blocks.{b * layers + j + (side == 'down')}.{column}.{rest}"

    return {UNET + name(key): tensor for key, tensor in state.items()}


def original_vae(vae: Any) -> State:
    """Name an autoencoder's tensors; levels of the decoder are counted from the finest, attention is convolutions."""
    state, last = vae.state_dict(), len(vae.config.block_out_channels) - 1
    out: State = {}
    for key, value in state.items():
        name, tensor = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut"), value
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            name = f"{found[1]}.mid.attn_1.{ATTENTION[found[2]]}.{found[3]}"
            tensor = value[:, :, None, None] if value.ndim == 2 else value
        out[VAE + name] = tensor
    return out


def original_text(text_encoder: Any, prefix: str = TEXT) -> State:
    """Name a text encoder's tensors, the positions among them as old files have them."""
    names = {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}
    positions = torch.arange(text_encoder.config.max_position_embeddings)[None]
    return {prefix + "embeddings.position_ids": positions} | {prefix + key: value for key, value in names.items()}


def original_open_clip(text_encoder: Any, prefix: str) -> State:
    """Name a text encoder's tensors as OpenCLIP does: queries, keys and values in one matrix, projection transposed."""
    state = {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}
    config = text_encoder.config
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "text_projection": state.get("text_projection.weight", torch.eye(config.hidden_size)).T,
    }
    for leaf in ("weight", "bias"):
        out[f"ln_final.{leaf}"] = state[f"final_layer_norm.{leaf}"]
        for i in range(config.num_hidden_layers):
            layer, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            out[f"{block}attn.in_proj_{leaf}"] = torch.cat([state[f"{layer}self_attn.{x}_proj.{leaf}"] for x in "qkv"])
            out |= {f"{block}{new}.{leaf}": state[f"{layer}{old}.{leaf}"] for old, new in OPEN_CLIP.items()}
    return {prefix + key: value for key, value in out.items()}


def original(pipe: Any, text: State | None = None) -> State:
    """Return a pipeline as the state of a released checkpoint, with a schedule that no reader needs."""
    text = original_text(pipe.text_encoder) if text is None else text
    state = original_unet(pipe.unet) | original_vae(pipe.vae) | text
    state |= {"betas": torch.linspace(0, 1, 10), "alphas_cumprod": torch.linspace(1, 0, 10)}
    return {key: value.contiguous() for key, value in state.items()}


def sd_1(prediction: str) -> tuple[Any, State]:
    """Return a pipeline and its file with the text encoder of Stable Diffusion 1."""
    pipe = tiny.pipeline(prediction, seed=1)
    return pipe, original(pipe)


def sd_1_levels(prediction: str) -> tuple[Any, State]:
    """Return a pipeline of Stable Diffusion 1's depth and its file."""
    pipe = like_sd_1(prediction, seed=1)
    return pipe, original(pipe)


def sd_2(prediction: str) -> tuple[Any, State]:
    """Return a pipeline and its file with OpenCLIP's layout, as Stable Diffusion 2 has it."""
    pipe = tiny.pipeline(prediction, seed=1)
    return pipe, original(pipe, original_open_clip(pipe.text_encoder, "cond_stage_model.model."))


def sd_xl(prediction: str) -> tuple[Any, State]:
    """Return an SDXL pipeline, its second text encoder wider than the first, and its file."""
    pipe = tiny.xl_pipeline(seed=1)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        config = CLIPTextConfig.from_dict(pipe.text_encoder_2.config.to_dict() | {"hidden_size": 24})
        unet = type(pipe.unet).from_config({**pipe.unet.config, "cross_attention_dim": 40})
        second = CLIPTextModelWithProjection(config).eval()
    scheduler = tiny.scheduler(prediction)
    parts = {**pipe.components, "unet": unet.eval(), "text_encoder_2": second, "scheduler": scheduler}
    text = original_text(pipe.text_encoder, "conditioner.embedders.0.transformer.text_model.")
    pipe = StableDiffusionXLPipeline(**parts)
    return pipe, original(pipe, text | original_open_clip(second, "conditioner.embedders.1.model."))


def like_sd_1(prediction: str = "v_prediction", seed: int = 0) -> StableDiffusionPipeline:
    """Return a pipeline with Stable Diffusion 1's levels and layers, a fortieth as wide."""
    pipe = tiny.pipeline(prediction, seed)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        config = CLIPTextConfig.from_dict(pipe.text_encoder.config.to_dict() | {"num_hidden_layers": 12})
        unet = type(pipe.unet)(
            sample_size=8, block_out_channels=(8, 16, 32, 32), layers_per_block=2, attention_head_dim=2,
            norm_num_groups=4, cross_attention_dim=16,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=2, sample_size=64,
        )  # fmt: skip
        parts = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": CLIPTextModel(config).eval()}
    return StableDiffusionPipeline(**{**pipe.components, **parts}, requires_safety_checker=False)


def bare(folder: Path, to: Path) -> Path:
    """Copy a pipeline's folder without its weights: configuration and tokenizer."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ (weights), config/ (no weights) and model.safetensors (the original layout)."""
    root = tmp_path_factory.mktemp("single")
    tiny.save(root / "model", seed=1)
    bare(root / "model", root / "config")
    save_file(original(tiny.pipeline(seed=1)), root / "model.safetensors")
    return root


@pytest.fixture
def state(saved: Path) -> State:
    return load_file(saved / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------- same model


def test_the_layout_is_the_released_one() -> None:
    """Stable Diffusion 1 has 686 tensors in its U-Net, 248 in its autoencoder and 197 in its text encoder."""
    state = original(like_sd_1())
    assert [sum(k.startswith(p) for k in state) for p in (UNET, VAE, TEXT)] == [686, 248, 197]
    known = {
        UNET + "time_embed.2.bias",
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        UNET + "input_blocks.3.0.op.weight",
        UNET + "input_blocks.11.0.out_layers.3.weight",
        UNET + "middle_block.1.proj_in.weight",
        UNET + "output_blocks.2.1.conv.weight",
        UNET + "output_blocks.5.2.conv.bias",
        UNET + "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
        VAE + "encoder.down.2.downsample.conv.weight",
        VAE + "decoder.up.3.upsample.conv.weight",
        VAE + "decoder.up.0.block.2.norm2.weight",
        VAE + "decoder.mid.attn_1.proj_out.weight",
        VAE + "post_quant_conv.weight",
        TEXT + "encoder.layers.11.self_attn.q_proj.weight",
        TEXT + "final_layer_norm.bias",
    }
    assert not known - set(state)
    assert state[VAE + "encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)


def drawn(model: Any) -> torch.Tensor:
    """Draw two pictures, with the weights where torch puts its own.

    Memory-mapped tensors start anywhere, and the kernel that a convolution takes, so its rounding, depends on where.
    """
    for part in (*model.modules().values(), model.pipe.vae):
        for p in part.parameters():
            p.data = p.data.clone()
    return model.generate(["a bomb", "a cat"], seeds=[0, 1], steps=2, guidance=3.0)


@pytest.mark.parametrize(
    ("build", "prediction"),
    [(sd_1, "v_prediction"), (sd_1, "epsilon"), (sd_1_levels, "epsilon"), (sd_2, "v_prediction"), (sd_xl, "epsilon"),
     (sd_xl, "v_prediction")],
)  # fmt: skip
def test_file_and_folder_are_one_model(build: Any, prediction: str, tmp_path: Path) -> None:
    pipe, state = build(prediction)
    pipe.save_pretrained(tmp_path / "model")
    save_file(state, tmp_path / "model.safetensors")
    folder = expunge.load(tmp_path / "model")
    file = expunge.load(tmp_path / "model.safetensors", config=bare(tmp_path / "model", tmp_path / "config"))
    assert type(file.pipe) is type(pipe)
    assert file.hash == folder.hash
    assert file.painter == folder.painter
    assert file.pipe.scheduler.config.prediction_type == prediction
    assert file.pipe.components.get("safety_checker") is None
    pictures = drawn(file)
    assert torch.equal(pictures, drawn(folder))
    assert not torch.equal(*pictures)


def test_weights_come_from_the_file_alone(saved: Path, tmp_path: Path) -> None:
    """Another model's weights beside the configuration are not read."""
    other = expunge.load(tiny.save(tmp_path / "other", seed=2))
    file = expunge.load(saved / "model.safetensors", config=tmp_path / "other")
    assert file.hash == expunge.load(saved / "model").hash != other.hash
    assert file.painter != other.painter


def test_half_precision_becomes_the_precision_asked_for(state: State, saved: Path, tmp_path: Path) -> None:
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "half.safetensors")
    model = expunge.load(tmp_path / "half.safetensors", config=saved / "config")
    types = {p.dtype for m in (*model.modules().values(), model.pipe.vae) for p in m.parameters()}
    assert types == {torch.float32}
    assert model.generate(["a bomb"], seeds=[0], steps=2).isfinite().all()


def test_a_configuration_with_a_safety_checker_loads_without_it(saved: Path, tmp_path: Path) -> None:
    """As the folders of released models have it: the checker needs weights that the file does not hold."""
    config = bare(saved / "model", tmp_path / "config")
    index = json.loads((config / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (config / "model_index.json").write_text(json.dumps(index))
    model = expunge.load(saved / "model.safetensors", config=config)
    assert model.hash == expunge.load(saved / "model").hash
    assert model.pipe.safety_checker is None
    assert not model.pipe.config.requires_safety_checker


def test_pickled_checkpoint_if_allowed(state: State, saved: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(BadModel, match="pickled checkpoint"):
        expunge.load(tmp_path / "model.ckpt", config=saved / "config")
    model = expunge.load(tmp_path / "model.ckpt", config=saved / "config", allow_pickle=True)
    assert model.hash == expunge.load(saved / "model").hash


def test_command_line(saved: Path, tmp_path: Path) -> None:
    file, config, run = saved / "model.safetensors", saved / "config", tmp_path / "run"
    arguments = ["--concept", "bomb", "--method", "uce", "--device", "cpu"]
    assert cli.main(["erase", str(file), "--config", str(config), *arguments, "--out", str(run)]) == 0
    card = Run(run).card
    assert card.model == str(file)
    model = expunge.load(saved / "model")
    assert card.base_hash == model.hash
    before = model.generate(["bomb"], seeds=[0], steps=2)
    with expunge.load_edit(run / "edit.safetensors").on(model) as edited:
        assert not torch.equal(edited.generate(["bomb"], seeds=[0], steps=2), before)


# -------------------------------------------------------------------------------------------------------------- errors


def fails(path: Path, **options: Any) -> str:
    """Return the message of the error that loading ends with, in seconds."""
    start = time.monotonic()
    with pytest.raises(BadModel) as error:
        expunge.load(path, **options)
    assert time.monotonic() - start < 10
    assert str(path) in str(error.value)
    return str(error.value)


def test_without_a_configuration_offline(saved: Path) -> None:
    assert "config=FOLDER" in fails(saved / "model.safetensors")


def test_without_a_configuration_and_without_a_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody set HF_HUB_OFFLINE, and no name can be resolved."""
    import huggingface_hub.constants

    asked: list[str] = []

    def nowhere(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(str(host))
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    assert "config=FOLDER" in fails(saved / "model.safetensors")
    assert asked
    asked.clear()
    expunge.load(saved / "model.safetensors", config=saved / "config")
    assert not asked


def test_command_line_without_a_configuration(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--concept", "bomb", "--method", "uce", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main(["erase", str(saved / "model.safetensors"), *arguments]) == 2
    err = capsys.readouterr().err
    assert "--config" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "./a/b"])
def test_configuration_that_is_not_there(saved: Path, name: str) -> None:
    assert f"no configuration folder at {name!r}" in fails(saved / "model.safetensors", config=name)


def test_configuration_folder_without_a_pipeline(saved: Path, tmp_path: Path) -> None:
    assert "model_index.json" in fails(saved / "model.safetensors", config=tmp_path)


def test_configuration_of_another_size(saved: Path, tmp_path: Path) -> None:
    like_sd_1().save_pretrained(tmp_path / "other")
    assert "shape" in fails(saved / "model.safetensors", config=bare(tmp_path / "other", tmp_path / "config"))


@pytest.mark.parametrize("keep", [5, 1000, 0.5, -1])
def test_truncated(saved: Path, tmp_path: Path, keep: float) -> None:
    data = (saved / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "cut off or damaged" in fails(path, config=saved / "config")


def test_truncated_pickle(state: State, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    fails(path, config=saved / "config", allow_pickle=True)


MISSING = {
    VAE: "AutoencoderKL",
    VAE + "post_quant_conv": "unet or vae",
    TEXT: "CLIPTextModel",
    TEXT + "final_layer_norm": "text_encoder .*final_layer_norm",
    UNET + "out.2": "unet or vae",
}


@pytest.mark.parametrize(("prefix", "told"), MISSING.items())
def test_missing_weights(state: State, saved: Path, tmp_path: Path, prefix: str, told: str) -> None:
    """A part of a model is never made up, nor taken from elsewhere."""
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith(prefix)}, path)
    for config in ("config", "model"):
        assert re.search(told, fails(path, config=saved / config))
