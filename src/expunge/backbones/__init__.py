"""The only door to diffusers: a name, a folder, a hub id or a checkpoint becomes a `Model`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..concept import World
from ..errors import BadModel, Unsupported, nearest
from ..kernel.model import Model, OneStep
from ..records import CARD, CHECKPOINT, Run
from ..zoo.fashion.world import GENERATOR, ONE_STEP

SHIPPED = ("emoji", "fashion", ONE_STEP, "tiny")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PICKLED = (
    "which can run any code when it is read. Convert it to .safetensors, or pass allow_pickle=True (--allow-pickle) if "
    "you trust its source."
)
# diffusers' pipeline class -> adapter
ADAPTERS = {"StableDiffusionPipeline": "unet", "StableDiffusionXLPipeline": "unet"}
# a U-Net and a scheduler; the first is the one that draws classes, the others are where people keep such networks
ADAPTERS |= dict.fromkeys(("ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline"), "classcond")


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    config: str | Path | None = None,
) -> Model:
    """Load a model.

    Args:
        name: "emoji", "fashion" or "fashion-one-step" (shipped, no download), "tiny" (untrained, for trying things
            out), a diffusers folder, a hub id, a single-file `.safetensors` checkpoint, or the run of a one-step
            generator.
        device: where to put it.
        dtype: of the weights.
        allow_pickle: read pickled checkpoints (`.ckpt`, `.bin`), which can run code on this machine.
        config: for a single-file checkpoint: a diffusers folder or hub id with its configuration and tokenizer;
            without it diffusers looks the checkpoint's family up on the hub.

    Raises:
        BadModel: not there, not a model, cut off, or a pickle.
        Unsupported: a pipeline that no adapter knows.
    """
    name = str(name)
    if name == "emoji":
        return emoji(device, dtype)
    if name == "fashion":
        return fashion(device, dtype)
    if name == ONE_STEP:
        return one_step(device, dtype)
    if name == "tiny":
        from . import tiny

        pipe = tiny.pipeline()
        # diffusers logs a cast even where there is nothing to cast
        return adapt(pipe if dtype == torch.float32 else pipe.to(dtype), "tiny", device, sampling=tiny.SAMPLING)
    path = Path(name)
    if path.suffix in PICKLES and not allow_pickle:
        raise BadModel(f"{name} is a pickled checkpoint, {PICKLED}")
    if path.is_file():
        return adapt(single_file(path, dtype, allow_pickle, config), name, device)
    if path.is_dir() and (path / CARD).is_file():
        return generator(path, device=device, dtype=dtype, allow_pickle=allow_pickle, config=config)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise BadModel(
            f"{name} is a folder without model_index.json, so not a diffusers pipeline. Save one with "
            "pipe.save_pretrained."
        )
    if not path.exists() and (path.is_absolute() or path.suffix or name.startswith(".") or name.count("/") != 1):
        raise BadModel(
            f"there is no model at {name!r}.{nearest(name, SHIPPED)} Give 'emoji', a diffusers folder, a hub id or a "
            "file."
        )
    return adapt(pretrained(name, dtype, allow_pickle), name, device)


def generator(run: Path, **options: Any) -> Model:
    """Load the one-step generator of a run: the model it was made of, and the weights in the run.

    Raises:
        BadModel: the run made something else.
    """
    from .. import fake
    from ..edits import GeneratorEdit, load_edit

    opened = Run.open(run)
    edit, base = load_edit(opened.edit_path), opened.card.model
    if not isinstance(edit, GeneratorEdit):
        raise BadModel(
            f"{run} holds an edit of kind {edit.kind!r} of the model {base!r}; only the run of a one-step generator "
            f"can stand for a model. Give {base!r}."
        )
    model = load(base, **options)
    first = model.one_step is None
    edit.settle(model)
    if first and (run / CHECKPOINT).is_file():
        # a second distillation's fake score is an update of the first one's, which may be gone
        model.become(OneStep(edit.t, model.teacher, partial(fake.read, run / CHECKPOINT, model.teacher)))
    model.name = str(run)
    return model


def pretrained(name: str, dtype: torch.dtype, allow_pickle: bool) -> Any:
    """Read a diffusers folder or hub id; see to it that no weight is missing."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    folder, here = Path(name), Path(name).is_dir()
    options: dict[str, Any] = {} if allow_pickle else {"use_safetensors": True}
    try:
        if not here:
            folder = Path(DiffusionPipeline.download(name, safety_checker=None, **options))
        check_folder(folder, allow_pickle)
        read = encoders(folder, dtype=dtype, **options)
        if adapter(folder) != "classcond":
            options |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options, **read)
    except (OSError, ValueError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        where = "on disk" if here else "on disk, nor could it be had from the hub"
        raise BadModel(f"{name!r} could not be loaded {where}: {first_line(error)}") from error
    check_whole(pipe, name)
    return pipe


def encoders(folder: Path, **options: Any) -> dict[str, Any]:
    """Read the text encoders of a diffusers folder, by component.

    Raises:
        BadModel: weights are missing, which transformers makes up at random where diffusers reads the encoder.
    """
    import transformers

    found = {}
    for component, told in components(folder).items():
        kind: Any = getattr(transformers, str(told[-1]), None)
        # whatever else it may be, diffusers refuses
        if component.startswith("text_encoder") and kind is not None:
            encoder, about = kind.from_pretrained(folder / component, output_loading_info=True, **options)
            need_all(sorted(about["missing_keys"]), component, folder)
            found[component] = encoder
    return found


def check_whole(pipe: Any, name: str | Path) -> None:
    """Find the weights that were not in a model's files: diffusers leaves those without storage.

    Raises:
        BadModel: there are some.
    """
    for component, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            need_all([n for n, p in part.named_parameters() if p.is_meta], component, name)


def need_all(absent: list[str], component: str, name: str | Path) -> None:
    """Raise BadModel if a component lacks any weights, naming the first of them."""
    if absent:
        first = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise BadModel(f"{name} lacks {len(absent)} weights of its {component} ({first}). Copy it again.")


def check_folder(folder: Path, allow_pickle: bool = False) -> None:
    """Find missing, cut-off and pickled weight files before diffusers spends time on them."""
    from safetensors import SafetensorError, safe_open

    kind, parts = adapter(folder), components(folder)
    for component in parts:
        if not (folder / component).is_dir():
            raise BadModel(f"{folder} names a {component} in model_index.json but has no folder {component}/")
    for file in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{file} is cut off or damaged ({first_line(error)}). Copy it again.") from error
    second = [c for c in parts if c == "text_encoder_2"]
    for component in ("unet", "vae", "text_encoder", *second) if kind == "unet" else ("unet",):
        if [*(folder / component).glob("*.safetensors")]:
            continue
        pickles = sorted((folder / component).glob("*.bin"))
        if not pickles:
            raise BadModel(f"{folder / component} holds no weights. Copy the whole folder again.")
        if not allow_pickle:
            raise BadModel(f"{pickles[0]} is a pickled checkpoint, {PICKLED}")


def components(folder: Path) -> dict[str, list[str]]:
    """Return component -> [library, class] of those that a folder's index takes from diffusers and transformers."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    told = {name: value for name, value in index.items() if isinstance(value, list)}
    return {name: value for name, value in told.items() if value[:1] in (["diffusers"], ["transformers"])}


def adapter(folder: Path) -> str:
    """Return the adapter of a folder's pipeline.

    Raises:
        BadModel: its index cannot be read.
        Unsupported: no adapter knows the pipeline.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise BadModel(f"{folder / 'model_index.json'} is not JSON ({error}). Copy the folder again.") from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in ADAPTERS:
        raise Unsupported(f"{folder} holds a {kind!r}; this version reads {', '.join(ADAPTERS)}.")
    return ADAPTERS[kind]


def single_file(path: Path, dtype: torch.dtype, allow_pickle: bool, config: str | Path | None) -> Any:
    """Read a one-file checkpoint of the Stable Diffusion family."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import SafetensorError, safe_open

    xl = False
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{path} is cut off or damaged ({first_line(error)}). Copy it again.") from error
        if not any(k.startswith("model.diffusion_model.") for k in keys):
            raise BadModel(
                f"{path} holds no Stable-Diffusion checkpoint (no key 'model.diffusion_model...'); its first key is "
                f"{keys[:1]}"
            )
        xl = any(k.startswith("conditioner.embedders.1.") for k in keys)
    elif not allow_pickle:
        raise BadModel(f"{path} is no model file: give a .safetensors checkpoint, a diffusers folder or a hub id")
    # the checker's weights are never in such a file, and configurations of released models ask for it
    options: dict[str, Any] = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    return from_file(pipeline, path, config, dtype=dtype, feature_extractor=None, **options)


def from_file(pipeline: Any, path: Path, config: str | Path | None, **options: Any) -> Any:
    """Let diffusers read a checkpoint; see to it that nothing is missing, and that no network is asked needlessly."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    what = "a diffusers folder of the same family; its configuration and tokenizer are used, not its weights"
    advice = f"Without a network, pass config=FOLDER (--config FOLDER): {what}."
    if config is not None:
        advice = f"Is config (--config) {what}?"
        name, there = str(config), Path(config)
        if not there.is_dir() and (there.exists() or there.is_absolute() or name[0] == "." or name.count("/") != 1):
            raise BadModel(f"{path} could not be loaded: there is no configuration folder at {name!r}. {advice}")
        options |= {"config": name, "local_files_only": there.is_dir()}
    try:
        pipe = pipeline.from_single_file(str(path), **options)
    except NotImplementedError as error:  # torch's word for a weight that was not in the file
        raise BadModel(f"{path} lacks some weights of the unet or vae that its configuration asks for.") from error
    except (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError) as error:
        raise BadModel(f"{path} could not be loaded: {first_line(error).rstrip('.')}. {advice}") from error
    check_whole(pipe, path)
    return pipe


def adapt(
    pipe: Any,
    name: str,
    device: str | torch.device,
    world: World | None = None,
    *,
    labels: Path | None = None,
    **options: Any,
) -> Model:
    """Wrap a diffusers pipeline in its adapter; `labels` is the folder of a class-conditional one's labels."""
    kind = type(pipe).__name__
    if kind not in ADAPTERS:
        raise Unsupported(f"{name} is a {kind}; this version knows {', '.join(ADAPTERS)}.")
    if ADAPTERS[kind] == "classcond":
        from .classcond import ClassModel, read_labels

        # without a table of classes there is nothing to label, and the model says so
        classes = read_labels(labels or Path(name), pipe.unet.config.num_class_embeds or 0)
        return ClassModel(pipe.to(device), name, classes)
    from .unet import UNetModel

    words, size = len(pipe.tokenizer), pipe.text_encoder.config.vocab_size
    if words < size // 2 or words > size:
        # transformers makes a two-word tokenizer out of an empty folder without a word of warning
        raise BadModel(
            f"the tokenizer of {name} knows {words} tokens, its text encoder {size}: tokenizer files are missing"
        )
    quiet(pipe)
    return UNetModel(pipe.to(device), name, world, **options)


def quiet(pipe: Any) -> None:
    """Keep a pipeline from logging that a prompt was cut: `PromptCut` says so already, once and through `warnings`."""
    # the same function every time, so that a second pipeline of a class adds nothing
    logging.getLogger(type(pipe).__module__).addFilter(not_about_a_cut)


def not_about_a_cut(record: logging.LogRecord) -> bool:
    """Return whether a log record is about anything else than a prompt that was cut."""
    return not record.getMessage().startswith("The following part of your input was truncated")


def emoji(device: str | torch.device, dtype: torch.dtype) -> Model:
    """Load the shipped text-to-image world."""
    from diffusers.models.attention_processor import AttnProcessor

    from ..kernel.model import Sampling
    from ..zoo.emoji import world

    if not (world.WEIGHTS / "model_index.json").is_file():
        raise BadModel(
            "this installation holds no emoji weights. Reinstall expunge, or make them: python -m expunge.zoo.emoji all"
        )
    with no_bars():
        pipe = pretrained(str(world.WEIGHTS), dtype, allow_pickle=False)
    # fused attention's backward is a third of a training step on CPU, and the pictures are too small to gain from it
    pipe.unet.set_attn_processor(AttnProcessor())
    # a tenth off every forward pass on CPU; values stay what they are, and hashes with them
    pipe.unet.to(memory_format=torch.channels_last)
    return adapt(pipe, "emoji", device, world.world(), sampling=Sampling(steps=20, guidance=5.0, size=64))


def fashion(device: str | torch.device, dtype: torch.dtype) -> Model:
    """Load the shipped class-conditional world."""
    from ..zoo.fashion.world import WEIGHTS
    from .classcond import unfused

    if not (WEIGHTS / "model_index.json").is_file():
        raise BadModel(
            "this installation holds no fashion weights. Reinstall expunge, or make them: "
            "python -m expunge.zoo.fashion all"
        )
    with no_bars():
        pipe = pretrained(str(WEIGHTS), dtype, allow_pickle=False)
    unfused(pipe.unet)
    return adapt(pipe, "fashion", device, labels=WEIGHTS)


def one_step(device: str | torch.device, dtype: torch.dtype) -> Model:
    """Load the one-step generator of the shipped class-conditional world."""
    if not (GENERATOR / CARD).is_file():
        raise BadModel(
            f"this installation holds no {ONE_STEP} weights. Reinstall expunge, or make them: "
            "python -m expunge.zoo.fashion one-step"
        )
    model = generator(GENERATOR, device=device, dtype=dtype)
    model.name = ONE_STEP
    return model


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep the libraries' loading bars away: the shipped model is there in a second."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    logs = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in logs:
            log.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().split("\n")[0]
